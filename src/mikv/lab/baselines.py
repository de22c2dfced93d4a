"""What a mixed-precision cache is measured against, as configurations of the same storage with the same byte counts."""

from typing import Any

from mikv.cache.accounting import cache_bytes
from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import CacheGeometry
from mikv.errors import ConfigError

_PLAIN: dict[str, Any] = {
    "center_keys": False,
    "balance_keys": False,
    "hadamard_keys": False,
    "center_values": False,
    "hadamard_values": False,
    "sinks": 0,
    "min_recent": 0,
}


def uniform(name: str) -> MiKVConfig:
    """Every token in `name` (int8, int4, int3, int2): round-to-nearest in groups of D/2, the MiKV paper's quantizer."""
    return MiKVConfig(importance_ratio=0.0, high=name, low=name, high_grid="group", low_grid="group", **_PLAIN)


def h2o(share: float, geometry: CacheGeometry, num_tokens: int) -> MiKVConfig:
    """H2O eviction with fp16 tokens in at most `share` of the fp16 bytes, scores and positions counted.

    Raises ConfigError if not even one block fits.
    """
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if cache_bytes(_evicting(middle), geometry, num_tokens).ratio <= share:
            low = middle
        else:
            high = middle
    if low == 0.0:
        raise ConfigError(f"h2o cannot keep any of {num_tokens} tokens in {share:g} of the fp16 bytes")
    return _evicting(low)


def kivi(name: str) -> MiKVConfig:
    """KIVI: keys per channel over 32 tokens, values per token, no transforms; the newest, up to 31, in fp16."""
    grids = {"high": "fp16", "high_grid": "group", "low_grid": "channel", "group_size": 32}
    return MiKVConfig(importance_ratio=0.0, low=name, **(_PLAIN | grids))


def _evicting(importance_ratio: float) -> MiKVConfig:
    return MiKVConfig(importance_ratio=importance_ratio, high="fp16", low="drop", policy="h2o", **_PLAIN)
