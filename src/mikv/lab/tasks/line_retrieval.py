"""A record of lines, one of which is asked for: LongEval's task, on which the MiKV paper measures."""

import uuid
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import ClassVar

from mikv.choices import require_one_of
from mikv.lab.tasks.base import CountTokens, Sample, SeededTask, Turn, require_count
from mikv.lab.tasks.scoring import last_number_is
from mikv.lab.tasks.words import names

# the words of the original, so that numbers can be compared: github.com/DachengLi1/LongChat
_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
_QUESTION = "\n\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {index}? I need the number."
_MOST_LINES = 1000


@dataclass(frozen=True)
class LineRetrieval(SeededTask):
    """The number in one of `lines` lines. `index` is how lines are called: number, word (amber-anchor) or uuid.

    Scored as the original: the last whole number of the answer. Unlike there, the answer's beginning is given.
    """

    name: ClassVar[str] = "line-retrieval"
    index: str = "word"
    lines: int = 40

    def __post_init__(self) -> None:
        require_one_of("index", self.index, ("number", "word", "uuid"))
        require_count("lines", self.lines, most=_MOST_LINES)

    def sample(self, index: int, random: Random, count_tokens: CountTokens) -> Sample:
        """See SeededTask."""
        indices = self._indices(random)
        contents = [random.randint(1, 50_000) for _ in indices]
        asked = random.randrange(self.lines)
        record = [
            f"line {line}: REGISTER_CONTENT is <{content}>" for line, content in zip(indices, contents, strict=True)
        ]
        turn = Turn(
            context=_HEADER + "\n".join(record),
            question=_QUESTION.format(index=indices[asked]),
            answer_start=f"The <REGISTER_CONTENT> in line {indices[asked]} is <",
            max_new_tokens=12,
            stop=(">", "\n"),
            score=partial(last_number_is, contents[asked]),
        )
        return Sample((turn,), labels={"line": asked + 1})

    def _indices(self, random: Random) -> list[str]:
        if self.index == "word":
            return names(random, self.lines, "-")
        if self.index == "uuid":
            return [str(uuid.UUID(int=random.getrandbits(128), version=4)) for _ in range(self.lines)]
        return [str(number) for number in range(1, self.lines + 1)]
