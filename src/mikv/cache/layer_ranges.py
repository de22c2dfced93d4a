"""Layers of a model in words: "0", "1-3", "-1" (the last), "-2--1" (the last two). Both ends count."""

import re
from collections.abc import Iterable
from itertools import pairwise

from mikv.choices import shown
from mikv.errors import ConfigError

_RANGE = re.compile(r"(-?[0-9]{1,4})(?:-(-?[0-9]{1,4}))?")  # no model has 10,000 layers


def parse_range(text: object) -> tuple[int, int]:
    """First and last layer as they are written. Raises ConfigError if `text` is no range, or one without layers."""
    match = _RANGE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"{shown(text)} is not a layer such as '0' or '-1', or a range such as '1-3' or '-2--1'")
    first, last = int(match[1]), int(match[2] or match[1])
    if (first < 0) == (last < 0) and last < first:
        raise ConfigError(f"{text!r} has no layers; the first one of a range comes first")
    return first, last


def layers_in(text: str, num_layers: int) -> range:
    """The layers of a range in a model of `num_layers`. Raises ConfigError if it has no such layers."""
    first, last = (end + num_layers if end < 0 else end for end in parse_range(text))
    if not 0 <= first <= last < num_layers:
        raise ConfigError(f"{text!r} is not among this model's layers, 0 to {num_layers - 1}")
    return range(first, last + 1)


def range_of_each(texts: Iterable[str], num_layers: int) -> dict[int, str]:
    """By which of several ranges each layer is named. Raises ConfigError if one is named twice."""
    found: dict[int, str] = {}
    for text in texts:
        for layer in layers_in(text, num_layers):
            if layer in found:
                raise ConfigError(
                    f"{found[layer]!r} and {text!r} both name layer {layer} of {num_layers}; name it once"
                )
            found[layer] = text
    return found


def require_disjoint(texts: Iterable[str]) -> None:
    """Raise ConfigError for ranges that overlap in a model of any size."""
    ends = [(*parse_range(text), text) for text in texts]
    comparable = sorted(end for end in ends if (end[0] < 0) == (end[1] < 0))  # counted from the same side
    for (_, last, one), (first, _, other) in pairwise(comparable):
        if first <= last and (first < 0) == (last < 0):
            raise ConfigError(f"{one!r} and {other!r} both name layer {first}; name it once")


def ranges_of(layers: Iterable[int]) -> list[str]:
    """The fewest ranges that name exactly these layers, ascending."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
