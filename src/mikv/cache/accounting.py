"""How many bytes a cache will take, without building it: the same numbers as the storage's own `nbytes`."""

from dataclasses import dataclass
from math import prod

import torch

from mikv.cache.config import MiKVConfig
from mikv.cache.formats import layer_formats
from mikv.cache.geometry import FP16_BYTES, CacheGeometry, LayerGeometry
from mikv.cache.settings import merged
from mikv.errors import UnsupportedModelError
from mikv.formats import BLOCK_TOKENS, Format

_SLOT_BOOKKEEPING = 8  # score float32, position int32
_WINDOW_COUNTER = 8  # transformers' sliding layers keep their window as a tensor


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache and of the same cache in 16-bit floats."""

    bytes: int
    fp16_bytes: int

    @property
    def ratio(self) -> float:
        """bytes / fp16_bytes; 0 for a model that caches no keys and values."""
        return self.bytes / self.fp16_bytes if self.fp16_bytes else 0.0


def cache_bytes(config: MiKVConfig, geometry: CacheGeometry, num_tokens: int, batch: int = 1) -> CacheBytes:
    """Bytes after a prompt of `num_tokens` per row, slack included.

    Raises ConfigError for impossible head dims, and for settings of layers that do not exist.
    """
    total = 0
    for index, layer in enumerate(geometry.layers):
        if layer.is_compressible and index not in config.skip_layers:
            own = config.for_layer(index, len(geometry.layers))
            total += batch * layer_bytes(own, layer, num_tokens, geometry.model_dtype_bytes)
        else:
            total += batch * layer.num_numbers(num_tokens) * geometry.model_dtype_bytes
            total += 0 if layer.window is None else _WINDOW_COUNTER
    return CacheBytes(total, batch * geometry.fp16_bytes(num_tokens))


def layer_bytes(config: MiKVConfig, layer: LayerGeometry, num_tokens: int, dtype_bytes: int) -> int:
    """Bytes of one compressed layer of one row after a prompt of `num_tokens`; `config` is that of the layer.

    Raises UnsupportedModelError if its keys have other dims than its values.
    """
    head_dim, heads = layer.head_dim, layer.num_kv_heads
    if layer.value_dim not in (None, head_dim):
        raise UnsupportedModelError(
            f"keys of {head_dim} channels with values of {layer.value_dim}: mikv compresses only heads whose keys and "
            "values have the same dim; name these layers in skip_layers"
        )
    dtype = torch.float32 if dtype_bytes == 4 else torch.float16
    formats = layer_formats(config, head_dim, dtype)
    if config.keeps_everything_exact or num_tokens < max(1, config.warmup_tokens):
        statistics = 0 if config.keeps_everything_exact else num_tokens * 4
        moment = head_dim * head_dim * 4 if config.has_feedback else 0
        return heads * (num_tokens * 2 * head_dim * dtype.itemsize + statistics + moment + head_dim * 4)
    low_tokens = low_tier_tokens(config, num_tokens)
    slots = high_tier_capacity(config, num_tokens, num_tokens - low_tokens)
    total = slots // BLOCK_TOKENS * (_block_bytes(formats.high) + BLOCK_TOKENS * _SLOT_BOOKKEEPING)
    if formats.low is not None:
        total += low_tokens // BLOCK_TOKENS * _block_bytes(formats.low)
    vectors = sum((config.center_keys, config.balance_keys, config.center_values))
    feedback = head_dim * (head_dim - 1) // 2 if config.has_feedback else 0
    return heads * (total + vectors * head_dim * FP16_BYTES + feedback)


def low_tier_tokens(config: MiKVConfig, num_tokens: int) -> int:
    """Tokens that leave the high tier of a prompt of `num_tokens`: whole blocks."""
    recent = num_tokens - config.recent_window(num_tokens)
    spans = merged([(0, config.sinks), (max(0, recent), num_tokens), *config.protected])
    movable = num_tokens - sum(max(0, min(stop, num_tokens) - start) for start, stop in spans)
    return max(0, min(num_tokens - config.high_budget(num_tokens), movable)) // BLOCK_TOKENS * BLOCK_TOKENS


def high_tier_capacity(config: MiKVConfig, num_tokens: int, num_slots: int) -> int:
    """Slots allocated for `num_slots` tokens: the tier fills up to its budget and a block, in whole blocks."""
    return -(-max(num_slots, config.high_budget(num_tokens) + BLOCK_TOKENS) // BLOCK_TOKENS) * BLOCK_TOKENS


def nominal_bits(config: MiKVConfig, head_dim: int) -> float:
    """Bits per number in the limit of long contexts, codes, scales and zeros only: the paper's size formula.

    Of a layer that has no settings of its own.
    """
    formats = layer_formats(config, head_dim, torch.float16)
    high = _block_bytes(formats.high) / BLOCK_TOKENS
    low = 0.0 if formats.low is None else _block_bytes(formats.low) / BLOCK_TOKENS
    share = config.importance_ratio
    return (share * high + (1 - share) * low) * 8 / (2 * head_dim)


def _block_bytes(formats: tuple[Format, Format]) -> int:
    parts = [part for form in formats for part in form.part_shapes().values()]
    return sum(prod(shape) * dtype.itemsize for shape, dtype in parts)
