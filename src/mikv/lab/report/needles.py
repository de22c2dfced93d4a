"""Heat maps of retrieval: mean score by depth and length, from the labels of a record's samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from mikv.lab.report.tables import family_name, method_name
from mikv.records import Record

ROW, COLUMN = "depth", "length"


@dataclass(frozen=True)
class NeedleMap:
    """Scores of a cache on a model and task: `cells[depth, length]` is (mean score, samples)."""

    model: str
    task: str
    cache: str
    family: str
    method: str
    ratio: float
    score: float
    depths: tuple[float, ...]
    lengths: tuple[float, ...]
    cells: dict[tuple[float, float], tuple[float, int]]


def needle_maps(records: Sequence[Record]) -> list[NeedleMap]:
    """One per record whose samples are labelled with a depth and a length."""
    return [found for record in records if (found := _needle_map(record)) is not None]


def _needle_map(record: Record) -> NeedleMap | None:
    scores: dict[tuple[float, float], list[float]] = {}
    for detail in record["details"] or ():
        labels = detail.get("labels") or {}
        if ROW in labels and COLUMN in labels and detail.get("score") is not None:
            scores.setdefault((labels[ROW], labels[COLUMN]), []).append(detail["score"])
    if not scores:
        return None
    every = [score for own in scores.values() for score in own]
    return NeedleMap(
        record["model"],
        record["task"],
        record["cache"],
        family_name(record),
        method_name(record),
        record["ratio"],
        sum(every) / len(every),
        tuple(sorted({depth for depth, _ in scores})),
        tuple(sorted({length for _, length in scores})),
        {place: (sum(own) / len(own), len(own)) for place, own in scores.items()},
    )
