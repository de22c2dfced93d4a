"""From a configuration and a head dim to the formats of the tiers; refuses the combinations that cannot be."""

from dataclasses import dataclass

import torch

from mikv.cache.config import MiKVConfig
from mikv.errors import ConfigError
from mikv.formats import Format, quantized_format, raw_format
from mikv.packing import UNIT

RAW_FORMATS = ("exact", "fp16")


@dataclass(frozen=True)
class LayerFormats:
    """(keys, values) of each tier; `low` is None if tokens are dropped."""

    high: tuple[Format, Format]
    low: tuple[Format, Format] | None
    high_is_quantized: bool


def layer_formats(config: MiKVConfig, head_dim: int, model_dtype: torch.dtype) -> LayerFormats:
    """The formats of one layer. Raises ConfigError if the head dim does not allow them."""
    if head_dim % UNIT:
        raise ConfigError(f"head_dim={head_dim} is not a multiple of {UNIT}, the unit in which codes are packed")
    group_size = _group_size(config, head_dim)
    high_is_quantized = config.high not in RAW_FORMATS
    if high_is_quantized:
        high = quantized_format(config.high, config.high_grid, group_size)
    else:
        high = raw_format(config.high, model_dtype)
    low = None
    if not config.drops_tokens:
        value_grid = "group" if config.low_grid == "channel" else config.low_grid
        keys = quantized_format(config.low_k, config.low_grid, group_size)
        low = (keys, quantized_format(config.low_v, value_grid, group_size))
    return LayerFormats((high, high), low, high_is_quantized)


def _group_size(config: MiKVConfig, head_dim: int) -> int:
    group_size = config.group_size or head_dim // 2
    if head_dim % group_size:
        divisors = [size for size in (128, 64, 32, 16, 8) if head_dim % size == 0]
        raise ConfigError(f"head_dim={head_dim} is not a multiple of group_size={group_size}; use one of {divisors}")
    return group_size
