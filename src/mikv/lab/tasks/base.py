"""What a task is: seeded samples, each a text or a conversation that a model reads through the cache under test.

A sample is read in pieces. The context of the first turn is read at once, exactly, as every cache reads a prompt, and
is what the cache compresses: no policy has seen the question that follows. All later pieces are read through the cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from random import Random
from typing import Any, ClassVar

from mikv.errors import ConfigError

Label = str | int | float
Score = Callable[[str], float]
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Turn:
    """One message of the user, and the model's answer to it.

    question        what is asked, or how the text goes on
    context         precedes the question in the same message; a piece of its own
    reply           what the model is made to say, for turns that only carry facts; None lets it answer
    answer_start    the words that an answer begins with, given to the model
    max_new_tokens  answers are cut after so many tokens, or at the first of the strings `stop`
    score           of an answer, `answer_start` included, from 0 (wrong) to 1; None leaves the turn out of the score
    label           what this turn measures, in samples that measure several things
    """

    question: str
    context: str = ""
    reply: str | None = None
    answer_start: str = ""
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    score: Score | None = None
    label: str = ""


@dataclass(frozen=True)
class Sample:
    """A conversation, or with `chat` False one turn of plain text that is not wrapped in the model's chat template.

    labels  what the sample varies, such as a needle's depth; reports group by them
    """

    turns: tuple[Turn, ...]
    system: str | None = None
    chat: bool = True
    labels: Mapping[str, Label] = field(default_factory=dict)


@dataclass(frozen=True)
class Task(ABC):
    """A family of samples. A subclass is a frozen dataclass whose fields are its options, each with a default.

    Options are of the types int, str and tuple[int, ...]. `runs_code` is True if scoring runs what the model wrote.
    """

    name: ClassVar[str]
    runs_code: ClassVar[bool] = False

    @property
    def spec(self) -> str:
        """The task's name with the options that are not the defaults, as `parse_task` reads it."""
        changed = [
            f"{option.name}={_spell(value)}"
            for option in fields(self)
            if (value := getattr(self, option.name)) != option.default
        ]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    @abstractmethod
    def samples(self, num_samples: int, seed: int, count_tokens: CountTokens) -> Sequence[Sample]:
        """The first `num_samples` samples of `seed`: asking for more only adds to them.

        `count_tokens` tells how many tokens the model makes of a text, for tasks whose option is a length in tokens.
        """


class SeededTask(Task):
    """A task that makes up each sample from random numbers of its own."""

    def samples(self, num_samples: int, seed: int, count_tokens: CountTokens) -> Sequence[Sample]:
        """See Task."""
        return [self.sample(index, Random(f"{self.name} {seed} {index}"), count_tokens) for index in range(num_samples)]

    @abstractmethod
    def sample(self, index: int, random: Random, count_tokens: CountTokens) -> Sample:
        """Sample number `index`, which depends on nothing else but `random`."""


def _spell(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def require_count(option: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise ConfigError if a task's option is not a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(f"{option}={value!r} must be a whole number, {allowed}")
