"""What the value of a setting may be: a share, a count, a span of tokens. Knows no configuration."""

from collections.abc import Callable, Iterable
from typing import Any

from mikv.choices import shown
from mikv.errors import ConfigError

MOST = 2**31 - 1  # positions of tokens are 32-bit integers


def is_share(value: object) -> bool:
    """A number between 0 and 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def is_count(value: object) -> bool:
    """A whole number from 0 to `MOST`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def is_span(value: object) -> bool:
    """(start, stop) of tokens, at least one."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value)) and value[0] < value[1]


def require_count(name: str, value: object, least: int = 0, most: int = MOST, unit: str = "tokens") -> None:
    """Raise ConfigError unless `value` is a whole number of that range."""
    if not (is_count(value) and least <= value <= most):  # type: ignore[operator]
        raise ConfigError(f"{name}={shown(value)} must be a whole number of {unit}, {least} or more, {most:,} at most")


def tuple_of(name: str, value: object, is_valid: Callable[[object], bool], what: str) -> tuple[Any, ...]:
    """`value` as a tuple. Raises ConfigError naming the first part that is not `what`."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name}={shown(value)} must be {what}")
    for index, part in enumerate(value):
        if not is_valid(part):
            place = f" (number {index}: {shown(part)})" if len(value) > 1 else ""
            raise ConfigError(f"{name}={shown(value)} must be {what}{place}")
    return tuple(value)


def merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The fewest spans of the same tokens, ascending."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)
