"""The names of caches, one grammar for every command: `full`, `h2o@0.25`, `kivi2`, `mikv:balanced+policy=window`.

Knows how to make each cache and what it takes; imports PyTorch and transformers only when one is asked for.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mikv.cache.config import PRESETS, MiKVConfig
from mikv.choices import did_you_mean
from mikv.errors import ConfigError
from mikv.lab.baselines.held_bytes import held_bytes
from mikv.lab.baselines.kivi import kivi
from mikv.lab.baselines.uniform import uniform

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_HOW_TO_INSTALL = "pip install 'mikv[bench]'"
_PRESS = "kvpress:"
_NEXT_SETTING = re.compile(r"\+(?=[A-Za-z_]\w*(?:[=+]|$))")  # not the plus of 1e+3 or of a+b.json

Share = Callable[["PreTrainedModel", int], float]  # (model, num_tokens) the share of the fp16 bytes


@dataclass(frozen=True)
class NamedCache:
    """A cache that can be asked for by name.

    make         (model, num_tokens) an empty cache that will hold `num_tokens` at the end; raises ValueError if it
                 cannot hold this model's layers, ConfigError if not so many tokens
    bytes        all that such a cache holds, scales and bookkeeping included
    unavailable  why the cache cannot be made on this machine, or None
    config       the settings, where they are a MiKVConfig that depends neither on the model nor on the length
    is_foreign   whether another library does the work, whose errors of any kind are its own
    """

    name: str
    make: "Callable[[PreTrainedModel, int], Cache]"
    bytes: "Callable[[Cache], int]"
    unavailable: Callable[[], str | None]
    config: MiKVConfig | None = None
    is_foreign: bool = False


def parse_cache(name: str, also: Sequence[str] = ()) -> NamedCache:
    """The cache of that name. Raises ConfigError naming what exists, `also` included: names a command adds of its own.

    Does not care whether the cache is available; a configuration file is read at once.
    """
    if name in _PLAIN:
        return _PLAIN[name](name)
    if name.startswith("mikv:"):
        return _mikv(name)
    family, _, share = name.partition("@")
    if family in _EVICTING:
        return _evicting(name, family, _share(name, share))
    if family.startswith(_PRESS):
        return _pressed(name, family.removeprefix(_PRESS), _share(name, share))
    known = (*_PLAIN, *(f"{family}@0.25" for family in _EVICTING), *(f"mikv:{preset}" for preset in PRESETS), *also)
    near = did_you_mean(name, known)
    raise ConfigError(f"unknown cache {name!r}{near or ';'} the caches are {', '.join((*spellings(), *also))}")


def split_names(names: str) -> tuple[str, ...]:
    """The names of a comma-separated list. Raises ConfigError if there is none or one twice."""
    found = tuple(name.strip() for name in _at_commas(names) if name.strip())
    if not found:
        raise ConfigError(f"--caches {names!r} names no cache; for example --caches full,mikv:balanced")
    for name in found:
        if found.count(name) > 1:
            raise ConfigError(f"--caches names {name!r} {found.count(name)} times; name each cache once")
    return found


def _at_commas(names: str) -> list[str]:
    """Split at commas that are not inside of the brackets of a value."""
    parts, depth = [""], 0
    for character in names:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def spellings() -> tuple[str, ...]:
    """All names, parametrised ones with their parameter in capitals."""
    evicting = (f"{family}@SHARE" for family in _EVICTING)
    own = f"mikv:PRESET ({', '.join(PRESETS)})", "mikv:FILE.json", "mikv:PRESET+SETTING=VALUE+..."
    return (*_PLAIN, *evicting, f"{_PRESS}NAME@SHARE", *own)


def is_installed(package: str) -> bool:
    """Whether `package` can be found, without importing it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of a dotted name's parent
        return False


def _share(name: str, text: str) -> Share:
    """What follows the @: a number, or a cache whose bytes are to be taken at every length."""
    example = name.partition("@")[0]
    if text in _PLAIN or text.startswith("mikv:"):
        config = parse_cache(text).config
        if text.startswith("mikv:") and ".json" in text:
            raise ConfigError(
                f"{name!r}: a record would not hold what is in the file; {example}@mikv:PRESET+SETTING=VALUE"
            )
        if config is None:
            raise ConfigError(
                f"{name!r}: the bytes of {text!r} are not known before it is measured; a preset's, int4's and kivi2's "
                f"are: {example}@mikv:balanced, or name the share of the fp16 bytes: {example}@0.25"
            )
        return partial(_share_of, config)
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise ConfigError(
            f"{name!r} needs the share of the fp16 bytes that it may take, more than 0 and at most 1: {example}@0.25; "
            f"or the cache whose bytes it may take: {example}@mikv:balanced"
        )
    return lambda model, num_tokens: number


def _share_of(config: MiKVConfig, model: "PreTrainedModel", num_tokens: int) -> float:
    from mikv.cache.accounting import cache_bytes
    from mikv.cache.geometry import CacheGeometry

    return cache_bytes(config, CacheGeometry.from_model_config(model.config), num_tokens).ratio


def _full(name: str) -> NamedCache:
    def make(model: "PreTrainedModel", num_tokens: int) -> "Cache":
        from mikv.lab.baselines.full import full

        return full(model)

    return NamedCache(name, make, held_bytes, _available)


def _packed(name: str, config: MiKVConfig) -> NamedCache:
    """A cache in mikv's own storage."""

    def make(model: "PreTrainedModel", num_tokens: int) -> "Cache":
        from mikv.integrations.transformers import MiKVCache

        return MiKVCache(model.config, config)

    return NamedCache(name, make, _packed_bytes, _available, config)


def _packed_bytes(cache: "Cache") -> int:
    return int(cache.memory().bytes)


def _evicting(name: str, family: str, share: Share) -> NamedCache:
    """Tokens are dropped; how many depends on the model's shape and the length."""

    def make(model: "PreTrainedModel", num_tokens: int) -> "Cache":
        from mikv.cache.geometry import CacheGeometry
        from mikv.integrations.transformers import MiKVCache
        from mikv.lab.baselines.h2o import h2o
        from mikv.lab.baselines.snapkv import snapkv
        from mikv.lab.baselines.streaming import streaming

        evicting = {"h2o": h2o, "snapkv": snapkv, "streaming": streaming}[family]
        geometry = CacheGeometry.from_model_config(model.config)
        return MiKVCache(model.config, evicting(share(model, num_tokens), geometry, num_tokens))

    return NamedCache(name, make, _packed_bytes, _available)


def _zipcache(name: str) -> NamedCache:
    def make(model: "PreTrainedModel", num_tokens: int) -> "Cache":
        from mikv.lab.baselines.zipcache import zipcache

        return zipcache(model)

    return NamedCache(name, make, _simulated_bytes, _available)


def _turboquant(name: str) -> NamedCache:
    def make(model: "PreTrainedModel", num_tokens: int) -> "Cache":
        from mikv.lab.baselines.turboquant import turboquant

        return turboquant(model, float(name.removeprefix("turboquant")))

    return NamedCache(name, make, _simulated_bytes, _available)


def _simulated_bytes(cache: "Cache") -> int:
    return int(cache.stored_bytes())


def _quantized(name: str) -> NamedCache:
    """`QuantizedCache` of transformers."""
    backend, options, unavailable = _QUANTIZED[name]

    def make(model: "PreTrainedModel", num_tokens: int) -> "Cache":
        from mikv.lab.baselines.quantized import quantized

        return quantized(model, backend, options)

    return NamedCache(name, make, held_bytes, unavailable, is_foreign=True)


def _pressed(name: str, press: str, share: Share) -> NamedCache:
    def make(model: "PreTrainedModel", num_tokens: int) -> "Cache":
        from mikv.lab.baselines.kvpress import kvpress

        return kvpress(model, press, share(model, num_tokens), num_tokens)

    def unavailable() -> str | None:
        from mikv.lab.baselines.kvpress import why_unavailable

        return why_unavailable()

    return NamedCache(name, make, held_bytes, unavailable, is_foreign=True)


def _mikv(name: str) -> NamedCache:
    """`mikv:PRESET` or `mikv:FILE.json`, and settings that differ from it."""
    base, *overrides = _NEXT_SETTING.split(name.removeprefix("mikv:"))
    if not base.endswith(".json") and base not in PRESETS:
        near = did_you_mean(base, PRESETS)
        raise ConfigError(
            f"unknown preset {base!r} in {name!r}{near or ';'} the presets are {', '.join(PRESETS)}, and "
            "mikv:FILE.json reads a configuration written with MiKVConfig.to_json"
        )
    config = MiKVConfig.from_file(base) if base.endswith(".json") else MiKVConfig.preset(base)
    if not overrides:
        return _packed(name, config)
    try:
        return _packed(name, MiKVConfig.from_dict(config.to_dict() | _settings(overrides)))
    except ConfigError as error:
        hint = "values are JSON or plain words: +low=drop+balance_keys=false"
        raise ConfigError(f"{name!r}: {error} ({hint})") from error


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """The settings that SETTING=VALUE name; a value that is not JSON is a word."""
    settings: dict[str, Any] = {}
    for override in overrides:
        setting, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} has no value; write {setting}=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        for one in ("low_k", "low_v") if setting == "low" else (setting,):
            if one in settings:
                raise ConfigError(f"{one!r} is set twice; set it once")
            settings[one] = value
    return settings


def _available() -> None:
    """Always there."""


def _needs(package: str) -> Callable[[], str | None]:
    def why_not() -> str | None:
        return None if is_installed(package) else f"needs {package.replace('.', '-')}: {_HOW_TO_INSTALL}"

    return why_not


def _why_no_fp8() -> str | None:
    from transformers import __version__, cache_utils

    has_it = hasattr(cache_utils, "Fp8QuantizedLayer")
    return None if has_it else f"transformers {__version__} has no fp8 cache; newer ones do"


_EVICTING = ("h2o", "snapkv", "streaming")
_HQQ_AXES = {"axis_key": 1, "axis_value": 1}  # its authors' axis: scales along the channels of a token
_QUANTIZED: dict[str, tuple[str, dict[str, int], Callable[[], str | None]]] = {
    "quanto4": ("quanto", {"nbits": 4}, _needs("optimum.quanto")),
    "quanto2": ("quanto", {"nbits": 2}, _needs("optimum.quanto")),
    "hqq4": ("hqq", {"nbits": 4, **_HQQ_AXES}, _needs("hqq")),
    "hqq2": ("hqq", {"nbits": 2, **_HQQ_AXES}, _needs("hqq")),
    "fp8": ("fp8", {}, _why_no_fp8),
}
_PLAIN: dict[str, Callable[[str], NamedCache]] = {
    "full": _full,
    **{name: lambda name: _packed(name, uniform(name)) for name in ("int8", "int4", "int3", "int2")},
    **{name: lambda name: _packed(name, kivi(f"int{name[-1]}")) for name in ("kivi4", "kivi2")},
    "zipcache": _zipcache,
    **dict.fromkeys(("turboquant4", "turboquant3", "turboquant2.5"), _turboquant),
    **dict.fromkeys(_QUANTIZED, _quantized),
}
