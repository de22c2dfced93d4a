"""Which preset fits into a budget of bytes at a length, and from which length on a cache saves anything."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mikv.cache.accounting import cache_bytes
from mikv.cache.config import BEST_FIRST, MiKVConfig
from mikv.cache.geometry import CacheGeometry
from mikv.cache.settings import is_share, require_count
from mikv.choices import shown
from mikv.errors import ConfigError, UnsupportedModelError
from mikv.formats import BLOCK_TOKENS

LONGEST = 1 << 20  # tokens, the longest context that is tried
_SLACK = 2 * BLOCK_TOKENS


@dataclass(frozen=True)
class PresetChoice:
    """The best preset within `budget` of the fp16 bytes at `num_tokens`; `ratios` of all presets, the best first."""

    preset: str
    budget: float
    num_tokens: int
    ratios: dict[str, float]

    def __str__(self) -> str:
        taken = f"budget {self.budget:g} at {self.num_tokens:,} tokens: preset {self.preset!r}, "
        taken += f"{self.ratios[self.preset]:.3f} of fp16"
        better = BEST_FIRST[: BEST_FIRST.index(self.preset)]
        return taken + (f"; {better[-1]!r} would take {self.ratios[better[-1]]:.3f}" if better else "")


def choose_preset(budget: float, model_config: Any, num_tokens: int) -> PresetChoice:
    """The best preset that takes at most `budget` of the fp16 bytes of a cache of `num_tokens`.

    Raises ConfigError if none does, naming the smallest and the length from which it would; UnsupportedModelError.
    """
    require_budget(budget)
    require_count("num_tokens", num_tokens, least=1)
    geometry = _geometry(model_config)
    ratios = preset_ratios(geometry, num_tokens)
    fitting = [name for name in BEST_FIRST if ratios[name] <= budget]
    if fitting:
        return PresetChoice(fitting[0], budget, num_tokens, ratios)
    smallest = _smallest(ratios)
    length = shortest(partial(_ratio, MiKVConfig.preset(smallest), geometry), budget)
    longer = "no length of context is enough" if length is None else f"from about {length:,} tokens on it meets it"
    least = ratios[smallest] + 5e-4
    raise ConfigError(
        f"budget={budget:g} cannot be met with {num_tokens} tokens on this model: the smallest preset, "
        f"{smallest!r}, takes {ratios[smallest]:.3f}, and {longer}"
        + (f"; ask for budget={least:.3f}" if least < 1 else "; so short a cache takes more than the full one")
    )


def smallest_preset(budget: float, model_config: Any, num_tokens: int) -> PresetChoice | None:
    """The smallest preset, for a context too short for any to meet `budget`; None if it would not at any length."""
    geometry = _geometry(model_config)
    ratios = preset_ratios(geometry, num_tokens)
    smallest = _smallest(ratios)
    if shortest(partial(_ratio, MiKVConfig.preset(smallest), geometry), budget) is None:
        return None
    return PresetChoice(smallest, budget, num_tokens, ratios)


def preset_ratios(geometry: CacheGeometry, num_tokens: int) -> dict[str, float]:
    """Bytes of every preset as a share of fp16, the best preset first."""
    return {name: _ratio(MiKVConfig.preset(name), geometry, num_tokens) for name in BEST_FIRST}


def require_budget(budget: object, name: str = "budget=") -> None:
    """Raise ConfigError unless it is a share of the fp16 bytes."""
    if not is_share(budget) or budget == 0:
        raise ConfigError(f"{name}{shown(budget)} must be a share of the fp16 bytes, more than 0 and at most 1")


def shortest(ratio_at: Callable[[int], float], share: float) -> int | None:
    """The fewest tokens from which on a cache takes at most `share` of fp16; None if it never does.

    Ratios fall with the length, but for the slack of a block or two: all lengths within those must do.
    """

    def is_enough(num_tokens: int) -> bool:
        return all(ratio_at(num_tokens + more) <= share for more in range(_SLACK))

    if not is_enough(LONGEST):
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _smallest(ratios: dict[str, float]) -> str:
    """While all tokens are exact all presets take the same: then the one that will be smallest."""
    return min(reversed(ratios), key=lambda name: ratios[name])


def _ratio(config: MiKVConfig, geometry: CacheGeometry, num_tokens: int) -> float:
    return cache_bytes(config, geometry, num_tokens).ratio


def _geometry(model_config: Any) -> CacheGeometry:
    geometry = CacheGeometry.from_model_config(model_config)
    if not geometry.fp16_bytes(1):
        raise UnsupportedModelError("no layer of this model caches keys and values, so there are no bytes to budget")
    return geometry
