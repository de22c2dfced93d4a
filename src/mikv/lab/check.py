"""`mikv check`: is a preset good enough for this model? A few texts and conversations, criteria, and a verdict."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mikv.cache.accounting import cache_bytes
from mikv.cache.config import BEST_FIRST, MiKVConfig
from mikv.cache.geometry import CacheGeometry, context_length
from mikv.cache_names import parse_cache
from mikv.errors import ConfigError
from mikv.integrations.transformers import MiKVCache
from mikv.lab.cells import summary
from mikv.lab.examination import Examination, SampleResult, Skipped
from mikv.lab.key_outliers import KeyOutliers, key_outliers
from mikv.lab.model_facts import ModelFacts
from mikv.lab.recording import record
from mikv.lab.tasks import parse_task
from mikv.lab.tasks.base import Sample
from mikv.lab.tasks.text import passages
from mikv.models import LoadedModel

TEXT_LENGTHS = (1024, 512, 256)  # tokens of a prompt; the longest that the model was trained for
CONVERSATIONS = ("needle:length=500", "system-prompt:length=400")
MAX_SAMPLES = 12
SECONDS = 240.0
BYTES_AT = (1024, 4096, 16384, 65536)
_OUTLIER_PROMPT = 256  # tokens
_FORGIVING_FROM = 5  # answers

Show = Callable[[str, int, int], None]
Results = dict[tuple[str, str], list[SampleResult | Skipped]]  # by task and preset, or `full`


@dataclass(frozen=True)
class Criteria:
    """What a preset has to keep of the full cache, on the same samples.

    kl_mean         at most so many nats, on prose and on code
    top1_agreement  at least this share of equal predictions, on prose and on code
    score_loss      at most this share of a conversation task's score may be lost; of five or more answers one may
    """

    kl_mean: float
    top1_agreement: float
    score_loss: float


# What the presets are chosen for (KL .0015, .005, .020 on many texts), and a quarter more for the chance of few.
# A check has one yardstick, that of the preset asked for: all presets are held to it, the recommended one too.
CRITERIA = {
    "lossless": Criteria(kl_mean=0.002, top1_agreement=0.98, score_loss=0.02),
    "balanced": Criteria(kl_mean=0.006, top1_agreement=0.96, score_loss=0.05),
    "small": Criteria(kl_mean=0.025, top1_agreement=0.92, score_loss=0.10),
}


@dataclass(frozen=True)
class Finding:
    """One criterion on one task: the value measured, and its limit: the least for top-1, the most for all others."""

    task: str
    criterion: str
    value: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """What a preset keeps. `skipped` is why it could not be measured, or None."""

    preset: str
    ratio: float
    findings: tuple[Finding, ...]
    skipped: str | None

    @property
    def passed(self) -> bool:
        """Whether it was measured and meets every criterion."""
        return self.skipped is None and all(finding.passed for finding in self.findings)


@dataclass(frozen=True)
class Report:
    """All that was found.

    bytes_at      per context length, the bytes of the full cache in fp16 and of every preset
    uncompressed  layers that stay as they are, and why
    left_out      what was not measured, and why
    """

    model: str
    preset: str
    samples: int
    seconds: float
    verdicts: tuple[Verdict, ...]
    outliers: tuple[KeyOutliers, ...]
    uncompressed: Mapping[int, str]
    num_layers: int
    bytes_at: Mapping[int, Mapping[str, int]]
    left_out: Mapping[str, str]

    @property
    def verdict(self) -> Verdict:
        """Of the preset that was asked for."""
        return next(verdict for verdict in self.verdicts if verdict.preset == self.preset)

    @property
    def recommended(self) -> str | None:
        """The smallest preset that meets the criteria of the one asked for, or None."""
        passing = [verdict for verdict in self.verdicts if verdict.passed]
        return min(passing, key=lambda verdict: verdict.ratio).preset if passing else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "kind": "check",
            "model": self.model,
            "preset": self.preset,
            "passed": self.verdict.passed,
            "recommended": self.recommended,
            "samples": self.samples,
            "seconds": self.seconds,
            "verdicts": [asdict(verdict) | {"passed": verdict.passed} for verdict in self.verdicts],
            "criteria": {"of": self.preset} | asdict(criteria_of(self.preset)),
            "outliers": [layer.to_dict() for layer in self.outliers],
            "uncompressed": dict(self.uncompressed),
            "num_layers": self.num_layers,
            "bytes_at": self.bytes_at,
            "left_out": dict(self.left_out),
        }


def criteria_of(preset: str) -> Criteria:
    """The criteria of a preset; those of the paper, which promise nothing, are held to the mildest."""
    return CRITERIA.get(preset, CRITERIA["small"])


class Check:
    """What will be asked of a model; made before its weights are loaded."""

    def __init__(self, model: str, preset: str = "balanced") -> None:
        """Raises MiKVError for a model or preset that cannot be checked."""
        self.preset = preset
        self.presets = tuple(dict.fromkeys((*BEST_FIRST, preset)))
        configs = {name: MiKVConfig.preset(name) for name in self.presets}
        self._facts = ModelFacts.of_model(model)
        self._geometry = CacheGeometry.from_model_config(self._facts.config)
        self._bytes_at = _bytes_at(configs, self._geometry, context_length(self._facts.config))
        self._left_out: dict[str, str] = {}
        self._samples = self._texts() | self._conversations()

    def run(self, loaded: LoadedModel, seconds: float = SECONDS, show: Show = lambda what, done, total: None) -> Report:
        """Ask, as many samples of every task as fit into about `seconds`, at least one."""
        start = time.monotonic()
        outliers = self._outliers(loaded)
        results: Results = {}
        first_round = time.monotonic()
        self._round(loaded, 0, 1, results, show)
        num_samples = max(1, min(MAX_SAMPLES, int(seconds / (time.monotonic() - first_round))))
        for index in range(1, num_samples):
            self._round(loaded, index, num_samples, results, show)
        silent = {
            task: "the model answers nothing right with the full cache, so nothing can be lost"
            for task, samples in self._samples.items()
            if samples[0].chat and not any(_scores(_measured(results[task, "full"])))
        }
        cache = MiKVCache(loaded.model.config, MiKVConfig.preset(self.preset))
        return Report(
            model=self._facts.name,
            preset=self.preset,
            samples=num_samples,
            seconds=time.monotonic() - start,
            verdicts=tuple(self._verdict(preset, results, silent) for preset in self.presets),
            outliers=tuple(outliers),
            uncompressed=cache.memory().skipped,
            num_layers=len(cache.layers),
            bytes_at=self._bytes_at,
            left_out=self._left_out | silent,
        )

    def _round(self, loaded: LoadedModel, index: int, num_samples: int, results: Results, show: Show) -> None:
        """Sample `index` of every task through all presets."""
        for number, (task, samples) in enumerate(self._samples.items()):
            done = index * len(self._samples) + number
            show(f"{task} · sample {index + 1}", done, num_samples * len(self._samples))
            examination = Examination(loaded, samples[index])
            results.setdefault((task, "full"), []).append(examination.full)
            for preset in self.presets:
                results.setdefault((task, preset), []).append(examination.through(parse_cache(f"mikv:{preset}")))

    def _verdict(self, preset: str, results: Results, silent: Collection[str]) -> Verdict:
        findings: list[Finding] = []
        skipped = None
        for task, samples in self._samples.items():
            if task in silent:
                continue
            own, full = _measured(results[task, preset]), _measured(results[task, "full"])
            reasons = [result.reason for result in results[task, preset] if isinstance(result, Skipped)]
            if reasons:
                skipped = reasons[0]
            elif samples[0].chat:
                findings.append(_score_finding(task, full, own, criteria_of(self.preset)))
            else:
                findings += _text_findings(task, own, criteria_of(self.preset))
        return Verdict(preset, self._bytes_ratio(preset), tuple(findings), skipped)

    def _bytes_ratio(self, preset: str) -> float:
        return cache_bytes(MiKVConfig.preset(preset), self._geometry, 4096).ratio

    def _outliers(self, loaded: LoadedModel) -> list[KeyOutliers]:
        """Of a short prompt."""
        tokens = self._facts.tokenizer.encode(passages("prose", "report")[: 16 * _OUTLIER_PROMPT], verbose=False)
        prompt = torch.tensor(tokens[:_OUTLIER_PROMPT], device=loaded.model.device)
        return key_outliers(loaded, MiKVConfig.preset(self.preset), record(loaded.model, prompt))

    def _texts(self) -> dict[str, Sequence[Sample]]:
        """Prose and code, as long as the model was trained for."""
        for prompt in TEXT_LENGTHS:
            tasks = self._make(f"text:prompt={prompt}") | self._make(f"text:kind=code,prompt={prompt}")
            try:
                self._require_room(tasks)
            except ConfigError:
                if prompt == TEXT_LENGTHS[-1]:
                    raise
            else:
                return tasks
        raise AssertionError

    def _conversations(self) -> dict[str, Sequence[Sample]]:
        """Those that the model can hold; why the others cannot be asked is noted."""
        found: dict[str, Sequence[Sample]] = {}
        for spec in CONVERSATIONS:
            try:
                tasks = self._make(spec)
                self._require_room(tasks)
                found |= tasks
            except ConfigError as error:
                self._left_out[spec] = str(error)
        return found

    def _make(self, spec: str) -> dict[str, Sequence[Sample]]:
        """The samples of a task by its name."""
        task = parse_task(spec)
        return {task.spec: task.samples(MAX_SAMPLES, 0, self._facts.count_tokens)}

    def _require_room(self, tasks: Mapping[str, Sequence[Sample]]) -> None:
        for task, samples in tasks.items():
            for sample in samples:
                self._facts.require_room(task, sample)


def _text_findings(task: str, own: Sequence[SampleResult], criteria: Criteria) -> list[Finding]:
    found = summary(own, [{}] * len(own))
    kl, top1 = found["kl_mean"], found["top1_agreement"]
    return [
        Finding(task, "KL", kl, criteria.kl_mean, kl <= criteria.kl_mean),
        Finding(task, "top-1", top1, criteria.top1_agreement, top1 >= criteria.top1_agreement),
    ]


def _score_finding(task: str, full: Sequence[SampleResult], own: Sequence[SampleResult], criteria: Criteria) -> Finding:
    """How much of the full cache's score is lost; the loss of one answer of several is chance."""
    theirs, ours = _scores(full), _scores(own)
    forgiven = 1 / len(theirs) if len(theirs) >= _FORGIVING_FROM else 0.0
    loss, limit = (sum(theirs) - sum(ours)) / len(theirs), max(criteria.score_loss, forgiven)
    return Finding(task, "score lost", loss, limit, loss <= limit + 1e-9)


def _measured(results: Sequence[SampleResult | Skipped]) -> list[SampleResult]:
    return [result for result in results if isinstance(result, SampleResult)]


def _scores(results: Sequence[SampleResult]) -> list[float]:
    return [answer.score for result in results for answer in result.answers if answer.score is not None]


def _bytes_at(
    configs: Mapping[str, MiKVConfig], geometry: CacheGeometry, longest: int | None
) -> dict[int, dict[str, int]]:
    found = {}
    for num_tokens in BYTES_AT:
        if longest is None or num_tokens <= longest:
            sizes = {name: cache_bytes(config, geometry, num_tokens) for name, config in configs.items()}
            fp16 = next(iter(sizes.values())).fp16_bytes
            found[num_tokens] = {"full": fp16} | {name: size.bytes for name, size in sizes.items()}
    return found
