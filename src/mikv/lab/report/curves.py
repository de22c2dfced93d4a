"""Size against quality: what is compared over which tasks, one point per cache, the front, the best of a budget.

Pure functions. The page, its summary and the pictures all show what `overview` and `of_task` compute.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from mikv.lab.report.families import FULL, family_of, method_of
from mikv.records import Record

BUDGETS = (0.20, 0.27, 0.33)
OVERVIEW = "overview"


@dataclass(frozen=True)
class Point:
    """A cache on a model: means over its records. None where nothing has them; errors are standard errors."""

    cache: str
    family: str
    method: str
    symbol: str
    ratio: float
    bytes_per_token: float
    score: float | None
    score_stderr: float | None
    kl: float | None
    kl_stderr: float | None


Value = Callable[[Point], float | None]


def cost(point: Point) -> float | None:
    """KL: less is better."""
    return point.kl


def negative_score(point: Point) -> float | None:
    """A score's opposite, of which less is better."""
    return None if point.score is None else -point.score


@dataclass(frozen=True)
class Panel:
    """What one chart shows: the caches that were measured on each of `tasks`, and the names of those that were not."""

    tasks: tuple[str, ...]
    points: tuple[Point, ...]
    missing: tuple[str, ...]

    @property
    def extent(self) -> str:
        """Over what the means are, and what is not among them."""
        over = f"{'mean over ' if len(self.tasks) > 1 else ''}{', '.join(self.tasks)}"
        return f"{over}; not measured there: {', '.join(self.missing)}" if self.missing else over


@dataclass(frozen=True)
class View:
    """A chart of scores and one of divergences; a panel is None where nothing has such numbers."""

    score: Panel | None
    kl: Panel | None


def overview(records: Sequence[Record]) -> View:
    """Scores, and KL on texts (on all tasks if there are no texts), of one model's records.

    Each over the tasks that the most caches were measured on, so that as many as can be are compared.
    """
    scored = [record for record in records if record["score"] is not None]
    diverged = [record for record in records if record["kl_mean"] is not None]
    texts = [record for record in diverged if record["score"] is None] or diverged
    return View(_panel(scored), _panel(texts))


def of_task(records: Sequence[Record], task: str) -> View:
    """Scores and KL of one task."""
    own = [record for record in records if record["task"] == task]
    return View(
        *(_panel([record for record in own if record[key] is not None]) for key in ("score", "kl_mean")),
    )


def _panel(records: Sequence[Record]) -> Panel | None:
    if not records:
        return None
    tasks = _most_common(records)
    return Panel(tasks, tuple(points(records, tasks)), tuple(incomplete(records, tasks)))


def _most_common(records: Sequence[Record]) -> tuple[str, ...]:
    """The tasks that the most caches were measured on; of several such sets the largest."""
    caches: dict[str, set[str]] = {}
    for record in records:
        caches.setdefault(record["task"], set()).add(record["cache"])
    most = max(map(len, caches.values()))
    sets = [tuple(task for task in caches if caches[task] >= own) for own in caches.values() if len(own) == most]
    return max(sets, key=len)


def points(records: Sequence[Record], tasks: Collection[str] | None = None) -> list[Point]:
    """The caches that were measured on every one of `tasks` (of the records, by default); smallest first.

    A mean over fewer tasks would be one over easier or harder ones. The mean over tasks weighs each the same. The
    records are of one model.
    """
    tasks = {record["task"] for record in records} if tasks is None else set(tasks)
    by_cache: dict[str, list[Record]] = {}
    for record in records:
        if record["task"] in tasks:
            by_cache.setdefault(record["cache"], []).append(record)
    complete = [own for own in by_cache.values() if {record["task"] for record in own} == tasks]
    return sorted((_point(own) for own in complete), key=lambda point: (point.ratio, point.cache))


def incomplete(records: Sequence[Record], tasks: Collection[str] | None = None) -> list[str]:
    """The caches that `points` leaves out."""
    known = {point.cache for point in points(records, tasks)}
    return sorted({record["cache"] for record in records} - known)


def compared(found: Iterable[Point]) -> list[Point]:
    """All but the full cache, which is what they are compared with."""
    return [point for point in found if point.family != FULL.name]


def full_cache(found: Iterable[Point]) -> Point | None:
    """The full cache's own point."""
    return next((point for point in found if point.family == FULL.name), None)


def pareto_front(found: Sequence[Point], value: Value) -> list[Point]:
    """The points that no other one beats in bytes and in `value` (less is better), smallest first."""
    best, front = math.inf, []
    for point, own in sorted(_valued(found, value), key=lambda pair: (pair[0].ratio, pair[1])):
        if own < best:
            best = own
            front.append(point)
    return front


def best_within(found: Sequence[Point], budget: float, value: Value) -> list[Point]:
    """The best point within a budget of bytes, and the best of any other family; fewer if there are fewer."""
    fitting = sorted(
        ((own, point) for point, own in _valued(found, value) if point.ratio <= budget), key=lambda p: p[0]
    )
    ranked = [point for _, point in fitting]
    others = [point for point in ranked if point.family != ranked[0].family]
    return [*ranked[:1], *others[:1]]


def _valued(found: Iterable[Point], value: Value) -> list[tuple[Point, float]]:
    return [(point, own) for point in found if (own := value(point)) is not None and math.isfinite(own)]


def _point(records: Sequence[Record]) -> Point:
    cache, config = records[0]["cache"], records[0].get("config")
    return Point(
        cache=cache,
        family=family_of(cache, config).name,
        method=method_of(cache, config).name,
        symbol=method_of(cache, config).symbol,
        ratio=_mean_of_tasks(records, "ratio") or 0.0,
        bytes_per_token=_mean_of_tasks(records, "bytes_per_token") or 0.0,
        score=_mean_of_tasks(records, "score"),
        score_stderr=_error_of_tasks([_mean(own, "score_stderr") for own in _per_task(records)]),
        kl=_mean_of_tasks(records, "kl_mean"),
        kl_stderr=_error_of_tasks([_kl_stderr(own) for own in _per_task(records)]),
    )


def _error_of_tasks(errors: Sequence[float | None]) -> float | None:
    """The standard error of a mean over tasks."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known else None


def _kl_stderr(records: Sequence[Record]) -> float | None:
    """How far the mean KL of one task would move with other samples; None with fewer than two."""
    found = [detail.get("kl_mean") for record in records for detail in record.get("details") or ()]
    known = [kl for kl in found if isinstance(kl, (int, float)) and math.isfinite(kl)]
    return statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None


def _per_task(records: Sequence[Record]) -> list[list[Record]]:
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(record["task"], []).append(record)
    return list(tasks.values())


def _mean_of_tasks(records: Sequence[Record], key: str) -> float | None:
    means = [_mean(own, key) for own in _per_task(records)]
    known = [mean for mean in means if mean is not None]
    return sum(known) / len(known) if known else None


def _mean(records: Sequence[Record], key: str) -> float | None:
    """None if no record has a value, NaN if one is not a number: what broke once is not averaged away."""
    known = [record[key] for record in records if record[key] is not None]
    return sum(known) / len(known) if known else None
