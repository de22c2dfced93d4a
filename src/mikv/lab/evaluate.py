"""`mikv eval`: tasks through caches, sample by sample, as one record per task and cache. Resumable, over processes.

A *cell* is one task, one model and one cache. The model reads a sample once for all caches, so samples are the outer
loop and the cells of a task are finished together, at its last sample.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mikv.bench import machine
from mikv.cache_names import parse_cache
from mikv.errors import ConfigError
from mikv.lab.cells import skipped, summary
from mikv.lab.examination import Examination, SampleResult, Skipped
from mikv.lab.model_facts import ModelFacts, require_memory
from mikv.lab.processes import results
from mikv.lab.records import KIND, Ledger
from mikv.lab.tasks import parse_task
from mikv.lab.tasks.base import Sample
from mikv.models import find_model, load_model, require_dtype
from mikv.records import Record


@dataclass(frozen=True)
class Plan:
    """What to measure. Tasks and caches have their canonical names; `threads` are those of each process.

    `reference` is a model with the same tokenizer that predictions are compared with; None is `model` itself.
    """

    tasks: tuple[str, ...]
    model: str
    caches: tuple[str, ...]
    samples: int = 20
    seed: int = 0
    chunk: int = 32
    dtype: str | None = None
    threads: int = 1
    processes: int = 1
    allow_code_execution: bool = False
    reference: str | None = None

    def __post_init__(self) -> None:
        for option, value in (("samples", self.samples), ("chunk", self.chunk), ("processes", self.processes)):
            if value < 1:
                raise ConfigError(f"--{option} {value} must be 1 or more")
        require_dtype(self.dtype)
        if not self.caches:
            raise ConfigError("no cache is named; for example --cache full --cache mikv:balanced")
        tasks = tuple(parse_task(task, allow_code_execution=self.allow_code_execution).spec for task in self.tasks)
        caches = tuple(parse_cache(cache).name for cache in self.caches)
        for option, names in (("TASK", tasks), ("--cache", caches)):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ConfigError(f"{option} {twice[0]} is given {names.count(twice[0])} times; name each once")
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "caches", caches)
        find_model(self.model)
        if self.reference is not None:
            find_model(self.reference)

    def make_samples(self, task: str, facts: ModelFacts) -> Sequence[Sample]:
        """The samples of one task."""
        made = parse_task(task, allow_code_execution=self.allow_code_execution)
        return made.samples(self.samples, self.seed, facts.count_tokens)


@dataclass(frozen=True)
class Job:
    """A sample that some caches have not been through."""

    task: str
    sample: int
    caches: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """What one cache did with one sample."""

    task: str
    sample: int
    cache: str
    result: SampleResult | Skipped


OnSample = Callable[[Finished, int, int], None]
Found = dict[int, SampleResult | Skipped]


class Evaluation:
    """A plan that was checked against the model's configuration and tokenizer, its samples made."""

    def __init__(self, plan: Plan, command: str) -> None:
        """Raises MiKVError for everything that can be known to fail before the model's weights are loaded."""
        self._plan = plan
        self._model = ModelFacts.of_model(plan.model)
        if plan.reference is not None:
            self._model.require_same_tokens(ModelFacts.of_model(plan.reference))
        self._samples = {task: plan.make_samples(task, self._model) for task in plan.tasks}
        for task, samples in self._samples.items():
            for sample in samples:
                self._model.require_room(task, sample)
        if plan.processes > 1:
            everything = [sample for samples in self._samples.values() for sample in samples]
            bytes_each = self._model.bytes_needed(everything, self._model.dtype(plan.dtype))
            require_memory(plan.processes, bytes_each if plan.reference is None else 2 * bytes_each)
        self._facts = machine.circumstances(command) | {"threads": plan.threads, "processes": plan.processes}

    def run(self, ledger: Ledger, on_sample: OnSample = lambda finished, done, total: None) -> list[Record]:
        """Measure what the ledger lacks; returns the records of all cells.

        `on_sample` is told what this run has just finished, how many results it has and how many there will be.
        """
        cells = {(task, name): self._cell(task, name) for task in self._plan.tasks for name in self._plan.caches}
        found = {key: self._found(ledger, cell) for key, cell in cells.items() if not ledger.is_finished(cell)}
        jobs = self._jobs(found)
        for key in found:
            self._finish_if_complete(ledger, cells[key], found[key])
        total = sum(len(job.caches) for job in jobs)
        for done, finished in enumerate(results(Worker, self._plan, jobs, self._plan.processes), 1):
            key = finished.task, finished.cache
            found[key][finished.sample] = finished.result
            if isinstance(finished.result, SampleResult):
                ledger.add_sample(cells[key], finished.sample, finished.result)
            on_sample(finished, done, total)
            self._finish_if_complete(ledger, cells[key], found[key])
        return [record for cell in cells.values() if (record := ledger.record(cell)) is not None]

    def _cell(self, task: str, cache: str) -> Record:
        """What identifies a cell, and how its record begins."""
        plan, config = self._plan, parse_cache(cache).config
        return {
            "kind": KIND,
            "task": task,
            "model": plan.model,
            "cache": cache,
            "samples": plan.samples,
            "seed": plan.seed,
            "dtype": self._model.dtype(plan.dtype),
            "chunk": plan.chunk,
            "config": None if config is None else config.to_dict(),
            "reference": plan.reference,
        }

    def _found(self, ledger: Ledger, cell: Record) -> Found:
        """What is known of a cell's samples already."""
        if (reason := parse_cache(cell["cache"]).unavailable()) is not None:
            return dict.fromkeys(range(self._plan.samples), Skipped(reason))
        return dict(ledger.samples(cell))

    def _jobs(self, found: Mapping[tuple[str, str], Found]) -> list[Job]:
        jobs = []
        for task in self._plan.tasks:
            for sample in range(self._plan.samples):
                missing = tuple(name for (of, name), done in found.items() if of == task and sample not in done)
                if missing:
                    jobs.append(Job(task, sample, missing))
        return jobs

    def _finish_if_complete(self, ledger: Ledger, cell: Record, found: Found) -> None:
        if len(found) < self._plan.samples:
            return
        ordered = [found[index] for index in range(self._plan.samples)]
        reasons = [result.reason for result in ordered if isinstance(result, Skipped)]
        measured = [result for result in ordered if isinstance(result, SampleResult)]
        labels = [sample.labels for sample in self._samples[cell["task"]]]
        ledger.finish(cell, cell | (skipped(reasons[0]) if reasons else summary(measured, labels)) | self._facts)


class Worker:
    """A process's model, which takes samples through caches."""

    def __init__(self, plan: Plan) -> None:
        """Load the model, and the one to compare with."""
        torch.set_num_threads(plan.threads)
        self._plan = plan
        dtype = None if plan.dtype is None else getattr(torch, plan.dtype)
        self._loaded = load_model(plan.model, dtype=dtype)
        self._reference = None if plan.reference is None else load_model(plan.reference, dtype=dtype)
        self._samples: dict[str, Sequence[Sample]] = {}
        self._caches = {name: parse_cache(name) for name in plan.caches}
        self._skipped: dict[tuple[str, str], Skipped] = {}

    def __call__(self, job: Job) -> Iterator[Finished]:
        """Take one sample through the caches; one that was skipped before is skipped for the whole task."""
        sample, chunk = self._sample(job), self._plan.chunk
        reference = None if self._reference is None else Examination(self._reference, sample, chunk)
        examination = Examination(self._loaded, sample, chunk, reference)
        for name in job.caches:
            result = self._skipped.get((job.task, name)) or examination.through(self._caches[name])
            if isinstance(result, Skipped):
                self._skipped[job.task, name] = result
            yield Finished(job.task, job.sample, name, result)

    def _sample(self, job: Job) -> Sample:
        if job.task not in self._samples:
            facts = ModelFacts(self._loaded.name, self._loaded.model.config, self._loaded.tokenizer)
            self._samples[job.task] = self._plan.make_samples(job.task, facts)
        return self._samples[job.task][job.sample]


def threads_each(processes: int) -> int:
    """PyTorch's threads, divided among processes."""
    return max(1, torch.get_num_threads() // max(1, processes))
