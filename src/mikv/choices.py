"""Names to choose from: a wrong one is refused with the names that there are, the nearest first."""

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr

from mikv.errors import ConfigError

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = 12


def shown(value: object) -> str:
    """`repr`, cut to what fits into a line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # whole numbers of more than 4,300 digits have no text
        return f"a {type(value).__name__} that is too large to print"


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """`; did you mean small?`, to follow a wrong name or the list of right ones; empty if no known name is near."""
    spelled = {str(one).casefold(): str(one) for one in known}
    near = get_close_matches(shown(name).strip("'").casefold()[:100], spelled, n=2)
    return f"; did you mean {' or '.join(spelled[one] for one in near)}?" if near else ""


def require_one_of(option: str, value: object, known: Iterable[object]) -> None:
    """Raise ConfigError if `value` is none of the known ones; `option` is a setting's name, or begins with dashes."""
    known = tuple(known)
    if value not in known:
        given = f"{option} {shown(value)}" if option.startswith("--") else f"{option}={shown(value)}"
        raise ConfigError(f"{given} is not one of {', '.join(map(str, known))}{did_you_mean(value, known)}")
