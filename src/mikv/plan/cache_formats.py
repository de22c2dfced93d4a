"""How a KV cache is stored, by name; bytes come from the cache's own accounting wherever it is one of mikv's."""

from dataclasses import dataclass

from mikv.cache.accounting import cache_bytes
from mikv.cache.config import PRESETS, MiKVConfig
from mikv.cache.geometry import FP16_BYTES, CacheGeometry
from mikv.cache_names import parse_cache
from mikv.choices import did_you_mean
from mikv.errors import ConfigError

_MOST_BITS = 32
SPELLINGS = ("full", *PRESETS, "fp8", "int4", "kivi2", "mikv:PRESET+SETTING=VALUE", "a number of bits such as 4.25")


@dataclass(frozen=True)
class CacheFormat:
    """`config` is that of a cache of mikv's; otherwise every number takes `bits`, or the model's own if None."""

    name: str
    config: MiKVConfig | None = None
    bits: float | None = None

    @property
    def is_packed(self) -> bool:
        """Whether mikv's kernels read it."""
        return self.config is not None

    def row_bytes(self, geometry: CacheGeometry, context: int) -> float:
        """Bytes of one sequence of `context` tokens."""
        if self.config is not None:
            return cache_bytes(self.config, geometry, context).bytes
        bits = 8 * geometry.model_dtype_bytes if self.bits is None else self.bits
        return geometry.fp16_bytes(context) * bits / (8 * FP16_BYTES)


def parse_cache_format(name: str) -> CacheFormat:
    """The format of that name. Raises ConfigError naming what there is."""
    if name == "full":
        return CacheFormat(name)
    if name == "fp8":
        return CacheFormat(name, bits=8)
    if name in PRESETS:
        return CacheFormat(name, MiKVConfig.preset(name))
    try:
        bits = float(name)
    except ValueError:
        return _named(name)
    if not 1 <= bits <= _MOST_BITS:
        raise ConfigError(f"--cache {name} must be between 1 and {_MOST_BITS} bits per number")
    return CacheFormat(f"{bits:g} bits", bits=bits)


def _named(name: str) -> CacheFormat:
    """Whatever the grammar of cache names calls a fixed MiKVConfig."""
    try:
        config = parse_cache(name).config
    except ConfigError as error:
        if name.startswith("mikv:"):
            raise
        near = did_you_mean(name, SPELLINGS)
        raise ConfigError(f"--cache {name!r} is not one of {', '.join(SPELLINGS)}{near}") from error
    if config is None:
        raise ConfigError(f"--cache {name!r}: how many bits it takes is not known; give them as a number instead")
    return CacheFormat(name, config)
