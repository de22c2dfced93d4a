"""How many bits each layer gets, so that a budget of bytes buys the least error in all.

Every layer offers some widths, each with its error and its bytes; the errors of the layers add up. The choice is by
dynamic programming over the bytes that are spent beyond the smallest widths, in the largest unit that divides them all.
It is exact while the budget has at most 65,536 such units; else bytes are rounded up to 1 / 65,536 of it per layer.
Of equal totals it takes the fewest bits for the layer that comes last, so that the same offers give the same choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from mikv.errors import ConfigError

_MOST_UNITS = 2**16


@dataclass(frozen=True)
class Offer:
    """What one width costs a layer: the error it adds to the model, in any unit, and its bytes."""

    error: float
    num_bytes: int


def allocate(layers: Mapping[str, Mapping[int, Offer]], budget_bytes: int) -> dict[str, int]:
    """The bits of each layer, of those it offers, with the least total error within the budget.

    Raises ConfigError if the smallest offers are beyond the budget.
    """
    least = {name: min(offer.num_bytes for offer in offers.values()) for name, offers in layers.items()}
    extra = budget_bytes - sum(least.values())
    if extra < 0:
        raise ConfigError(f"a budget of {budget_bytes} bytes is too small: the smallest widths need {-extra} more")
    costs = [
        {bits: offer.num_bytes - least[name] for bits, offer in sorted(offers.items())}
        for name, offers in layers.items()
    ]
    divisor = max(gcd(*(cost for widths in costs for cost in widths.values())), 1)
    unit = divisor * max(-(-extra // (divisor * _MOST_UNITS)), 1)
    total = torch.zeros(
        extra // unit + 1, dtype=torch.float64, device="cpu"
    )  # the least error with at most so many units
    chosen = []
    for offers, widths in zip(layers.values(), costs, strict=True):
        total, choice = _with_layer(total, [(offers[bits].error, -(-cost // unit)) for bits, cost in widths.items()])
        chosen.append(choice)
    return _read_back(list(layers), costs, chosen, unit)


def _with_layer(total: Tensor, offers: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    """The least errors with one more layer, and which of its (error, units) each takes."""
    least = torch.full_like(total, torch.inf)
    choice = torch.zeros_like(total, dtype=torch.uint8)
    for index, (error, units) in enumerate(offers):
        candidate = torch.full_like(total, torch.inf)
        candidate[units:] = total[: max(0, len(total) - units)] + error
        is_less = candidate < least
        least[is_less], choice[is_less] = candidate[is_less], index
    return least, choice


def _read_back(names: list[str], costs: list[dict[int, int]], chosen: list[Tensor], unit: int) -> dict[str, int]:
    """The widths that led to the last total, from the last layer to the first."""
    left, widths = len(chosen[0]) - 1 if chosen else 0, {}
    for name, cost, choice in reversed(list(zip(names, costs, chosen, strict=True))):
        widths[name] = list(cost)[int(choice[left])]
        left -= -(-cost[widths[name]] // unit)
    return {name: widths[name] for name in names}
