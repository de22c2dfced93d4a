"""Plain text that is only read and compared: part of it as the prompt, the rest through the cache.

The text is on every machine with Python: its language reference, and the sources of its standard library. Settings are
chosen on the split `tune` and reported on `report`, which share no paragraph. The text depends on Python's version.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from re import finditer
from typing import ClassVar

from mikv.choices import require_one_of
from mikv.errors import ConfigError
from mikv.lab.tasks.base import CountTokens, Sample, SeededTask, Turn, require_count

# characters of the reference; the sweep that the first presets came from used [20_000, 40_000) and [200_000, 220_000)
_TUNE_PROSE = 240_000
# argparse is what that sweep used
_TUNE_CODE = ("argparse", "calendar", "configparser", "difflib", "doctest", "ipaddress", "optparse", "pickle", "shutil")
_REPORT_CODE = (
    "ast",
    "dataclasses",
    "enum",
    "inspect",
    "logging",
    "mailbox",
    "pdb",
    "smtplib",
    "socket",
    "statistics",
    "subprocess",
    "tarfile",
    "tempfile",
    "threading",
    "traceback",
    "typing",
)
_MOST_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Text(SeededTask):
    """`prompt` tokens read exactly and `read` more that follow them, of a `kind`: prose or code."""

    name: ClassVar[str] = "text"
    kind: str = "prose"
    prompt: int = 1024
    read: int = 128
    split: str = "report"

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, ("prose", "code"))
        require_count("prompt", self.prompt, least=16)
        require_count("read", self.read, least=16)
        require_one_of("split", self.split, ("report", "tune"))

    def sample(self, index: int, random: Random, count_tokens: CountTokens) -> Sample:
        """See SeededTask. Raises ConfigError if the texts are not that long."""
        text = passages(self.kind, self.split)
        length = (self.prompt + self.read) * _MOST_CHARACTERS_PER_TOKEN
        paragraphs = [match.end() for match in finditer(r"\n\n+", text[: max(0, len(text) - length)])]
        if not paragraphs:
            raise ConfigError(
                f"prompt={self.prompt} and read={self.read} are too many: the texts have {len(text)} characters, and "
                f"{_MOST_CHARACTERS_PER_TOKEN} are needed for each token"
            )
        start = random.choice(paragraphs)
        prompt, rest = _cut(text[start : start + length], self.prompt, count_tokens)
        continuation, _ = _cut(rest, self.read, count_tokens)
        return Sample((Turn(context=prompt, question=continuation, reply=""),), chat=False, labels={"kind": self.kind})


@cache
def passages(kind: str, split: str) -> str:
    """All text of a kind, prose or code, that belongs to a split, tune or report."""
    if kind == "prose":
        from pydoc_data.topics import topics

        reference = "\n\n".join(topics[name] for name in sorted(topics))
        tune, rest = reference[:_TUNE_PROSE], reference[_TUNE_PROSE:]
        return tune if split == "tune" else _without_repeats(rest, tune)
    return "\n\n".join(_source(module) for module in (_TUNE_CODE if split == "tune" else _REPORT_CODE))


def _without_repeats(text: str, other: str) -> str:
    """The paragraphs of a text, each once, that are not in the other: the reference has sections in several topics."""
    seen = set(other.split("\n\n"))
    return "\n\n".join(part for part in dict.fromkeys(text.split("\n\n")) if part not in seen)


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"this Python has no source of its standard module {module!r}; use kind=prose")
    return Path(spec.origin).read_text(encoding="utf-8")


def _cut(text: str, num_tokens: int, count_tokens: CountTokens) -> tuple[str, str]:
    """The longest beginning of whole words that has at most `num_tokens`, and the rest."""
    ends = [match.start() for match in finditer(r"\s+", text)]
    fitting = bisect_right(ends, num_tokens, key=lambda end: count_tokens(text[:end]))
    end = ends[fitting - 1]
    return text[:end], text[end:]
