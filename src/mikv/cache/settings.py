"""What the value of a setting may be: a share, a count, a span of tokens, a choice. Knows no configuration.

Shows values in messages, whatever they are: a list of 100,000 spans or a number of 5,000 digits is cut.
"""

from collections.abc import Callable, Iterable
from reprlib import Repr
from typing import Any

from mikv.errors import ConfigError

MOST = 2**31 - 1  # positions of tokens are 32-bit integers

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = 12


def shown(value: object) -> str:
    """`repr`, cut to what fits into a line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # whole numbers of more than 4,300 digits have no text
        return f"a {type(value).__name__} that is too large to print"


def is_share(value: object) -> bool:
    """A number between 0 and 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def is_count(value: object) -> bool:
    """A whole number from 0 to `MOST`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def is_span(value: object) -> bool:
    """(start, stop) of tokens, at least one."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value)) and value[0] < value[1]


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={shown(value)} is not one of {', '.join(choices)}")


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
