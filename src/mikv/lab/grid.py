"""The grid of `mikv sweep`: every combination of settings as a configuration, and its short name in tables."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mikv.cache.config import BEST_FIRST, HIGH_FORMATS, KEY_ROUNDINGS, MiKVConfig
from mikv.cache.geometry import CacheGeometry
from mikv.cache.policies import make_policy
from mikv.cache_names import parse_cache
from mikv.choices import require_one_of
from mikv.errors import ConfigError
from mikv.lab.layer_bits import is_uniform, uniform_twin, with_wide_edges

_SWITCHES = ("center_keys", "balance_keys", "hadamard_keys", "center_values", "hadamard_values")
_OFF = {
    "all": (),
    "no-centering": ("center_keys", "center_values"),
    "no-balancer": ("balance_keys",),
    "no-hadamard": ("hadamard_keys", "hadamard_values"),
    "none": _SWITCHES,
}
TRANSFORMS = tuple(_OFF)
LAYERS = ("uniform", "first-last", "sensitivity")
Settings = Sequence[dict[str, Any]]
_LOW = re.compile(r"K([8432])V([8432])")


@dataclass(frozen=True)
class Grid:
    """The values of each setting. `base` is a cache name that has all other settings; None leaves a setting to it."""

    ratios: tuple[float, ...] = (0.05, 0.08, 0.12, 0.2)
    high: tuple[str, ...] = ("int8", "int4")
    low: tuple[str, ...] = ("K4V4", "K4V3", "K3V3", "K3V2", "K2V2")
    transforms: tuple[str, ...] | None = None
    roundings: tuple[str, ...] | None = None
    policies: tuple[str, ...] | None = None
    layers: tuple[str, ...] = ("uniform",)
    base: str = "mikv:balanced"

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise ConfigError(
                    f"--ratios {ratio:g} must be more than 0 and at most 1; uniform caches are added anyway"
                )
        for low in self.low:
            if not _LOW.fullmatch(low):
                raise ConfigError(f"--low {low!r} must name bits of keys and values, 8, 4, 3 or 2, such as K4V3")
        known = {"high": HIGH_FORMATS, "transforms": TRANSFORMS, "roundings": KEY_ROUNDINGS, "layers": LAYERS}
        for option, names in known.items():
            for value in getattr(self, option) or ():
                require_one_of(f"--{option}", value, names)
        for policy in self.policies or ():
            make_policy(policy, {})
        config = parse_cache(self.base).config
        if config is None or not self.base.startswith("mikv:"):
            raise ConfigError(f"--base {self.base!r} must be mikv:PRESET or mikv:FILE.json, and settings as you like")
        if config.layer_settings or config.skip_layers or config.drops_tokens:
            raise ConfigError(f"--base {self.base!r} has settings of layers, or drops tokens; a sweep cannot vary that")

    @property
    def base_config(self) -> MiKVConfig:
        """The settings that are not varied."""
        config = parse_cache(self.base).config
        assert config is not None
        return config

    def mixed(self) -> list[MiKVConfig]:
        """Every combination with two tiers, all layers alike."""
        policies: Settings = [{"policy": name, "policy_options": {}} for name in self.policies or ()]
        return [
            replace(config, importance_ratio=ratio, high=high, **policy)
            for config, policy, high, ratio in product(self._low_tiers(), policies or [{}], self.high, self.ratios)
        ]

    def uniform(self) -> list[MiKVConfig]:
        """The same low tiers, for every token."""
        return [uniform_twin(config) for config in self._low_tiers()]

    def presets(self) -> list[MiKVConfig]:
        """What the sweep could replace."""
        return [MiKVConfig.preset(name) for name in BEST_FIRST]

    def _low_tiers(self) -> Iterator[MiKVConfig]:
        """Every combination of what the low tier is."""
        roundings: Settings = [{"key_rounding": name} for name in self.roundings or ()] or [{}]
        switches: Settings = [
            {switch: switch not in _OFF[name] for switch in _SWITCHES} for name in self.transforms or ()
        ] or [{}]
        for low, rounding, switch in product(self.low, roundings, switches):
            yield replace(self.base_config, low_k=f"int{low[1]}", low_v=f"int{low[3]}", **rounding, **switch)


def name_of(config: MiKVConfig, preset: str = "balanced") -> str:
    """The cache name that stands for a configuration: the preset and all settings that differ from its own."""
    same = MiKVConfig.preset(preset).to_dict()
    changed = {name: value for name, value in config.to_dict().items() if value != same[name]}
    return "+".join([f"mikv:{preset}", *(f"{name}={_spell(value)}" for name, value in changed.items())])


def label_of(config: MiKVConfig, base: MiKVConfig, geometry: CacheGeometry | None) -> str:
    """`r 0.08 8/K4V3`, and whatever differs from `base` besides; `uniform K4V3` for its uniform twin.

    The geometry tells how settings of layers came about; without it they must be none.
    """
    low = f"K{config.low_k.removeprefix('int')}V{config.low_v.removeprefix('int')}"
    if is_uniform(config):
        parts, base = [f"uniform {low}"], uniform_twin(base)
    else:
        parts = [f"r {config.importance_ratio:g} {config.high.removeprefix('int')}/{low}"]
    parts += [_transforms_of(config)] if _switches(config) != _switches(base) else []
    own, theirs = config.to_dict(), base.to_dict()
    said = {"importance_ratio", "high", "low_k", "low_v", "layer_settings", "skip_layers", *_SWITCHES}
    parts += [f"{name}={_spell(own[name])}" for name in own if name not in said and own[name] != theirs[name]]
    if config.layer_settings:
        assert geometry is not None
        wide_edges = with_wide_edges(replace(config, layer_settings={}), geometry)
        parts.append("first-last" if config == wide_edges else "sensitivity")
    parts += [f"{len(config.skip_layers)} layers exact"] if config.skip_layers else []
    return ", ".join(parts)


def _switches(config: MiKVConfig) -> list[bool]:
    return [getattr(config, switch) for switch in _SWITCHES]


def _transforms_of(config: MiKVConfig) -> str:
    off = tuple(switch for switch in _SWITCHES if not getattr(config, switch))
    names = {frozenset(switches): name for name, switches in _OFF.items()}
    return names.get(frozenset(off), "without " + " ".join(off))


def _spell(value: Any) -> str:
    """A value as cache names have it: JSON, or a plain word."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
