"""What a cache holds and takes, in numbers: the answer to `MiKVCache.memory()`."""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Self

import torch

from mikv.cache.accounting import cache_bytes
from mikv.cache.budget import shortest
from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import FP16_BYTES, FULL_ATTENTION, CacheGeometry, LayerGeometry
from mikv.cache.layer import TwoTierLayer
from mikv.formats import BLOCK_TOKENS

_HALF, _NOTHING = 0.5, 0.85  # of fp16


@dataclass(frozen=True)
class LayerMemory:
    """One layer. `skipped` says why it is not compressed, and is None if it is.

    bytes_by_part   allocated bytes; the parts add up to `bytes`
    fp16_bytes      what keys and values of the same tokens take in 16-bit floats, padding not counted
    tokens_by_tier  tokens of all rows
    saves_from      tokens of a row from which the layer takes half of fp16 or less; None if it does, or never will
    """

    layer: int
    skipped: str | None
    bytes_by_part: dict[str, int]
    fp16_bytes: int
    tokens_by_tier: dict[str, int]
    saves_from: int | None = None

    @property
    def bytes(self) -> int:
        """All bytes allocated for the layer."""
        return sum(self.bytes_by_part.values())

    @classmethod
    def of_tiers(cls, layer: int, tokens: TwoTierLayer) -> Self:
        """A compressed layer."""
        num_tokens = sum(tokens.columns.num_tokens)
        _, num_heads, head_dim = tokens.shape or (0, 0, 0)
        fp16_bytes = num_tokens * num_heads * head_dim * 2 * FP16_BYTES
        parts = tokens.bytes_by_part()
        is_small = num_tokens and sum(parts.values()) > _HALF * fp16_bytes
        saves_from = _saves_from(_of_bytes(tokens.config), num_heads, head_dim) if is_small else None
        return cls(layer, None, parts, fp16_bytes, tokens.tokens_by_tier(), saves_from)

    @classmethod
    def of_other(cls, layer: int, skipped: str, cache_layer: Any) -> Self:
        """A layer that transformers stores: every tensor it holds counts, also the states of linear attention."""
        attributes = vars(cache_layer).values()
        values = [x for value in attributes for x in (value.values() if isinstance(value, dict) else (value,))]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        numbers = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
        keys = getattr(cache_layer, "keys", None)
        num_tokens = keys.shape[0] * keys.shape[2] if isinstance(keys, torch.Tensor) and keys.dim() == 4 else 0
        parts = {"uncompressed": sum(tensor.nbytes for tensor in tensors)}
        return cls(layer, skipped, parts, numbers * FP16_BYTES, {"uncompressed": num_tokens})


@dataclass(frozen=True)
class MemoryReport:
    """All layers of a cache. `print` shows a summary; `to_dict` is for JSON."""

    layers: tuple[LayerMemory, ...]

    @property
    def bytes(self) -> int:
        """All bytes allocated."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def fp16_bytes(self) -> int:
        """What the same keys and values take in 16-bit floats."""
        return sum(layer.fp16_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """bytes / fp16_bytes, whatever the model's dtype; 0 for an empty cache."""
        return self.bytes / self.fp16_bytes if self.fp16_bytes else 0.0

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of all layers by part."""
        return _summed(layer.bytes_by_part for layer in self.layers)

    @property
    def tokens_by_tier(self) -> dict[str, int]:
        """Tokens of all rows and layers by tier."""
        return _summed(layer.tokens_by_tier for layer in self.layers)

    @property
    def skipped(self) -> dict[int, str]:
        """Layers that are not compressed, and why."""
        return {layer.layer: layer.skipped for layer in self.layers if layer.skipped}

    @property
    def note(self) -> str | None:
        """Why a short context saves nothing or little, and from how many tokens on it does; None if it saves."""
        lengths = [layer.saves_from for layer in self.layers if layer.saves_from is not None]
        if not lengths or self.ratio <= _HALF:
            return None
        amount = "nothing" if self.ratio >= 1 else "next to nothing" if self.ratio > _NOTHING else "little"
        return (
            f"a context this short saves {amount}: its first and newest tokens stay in high precision, in whole blocks "
            f"of {BLOCK_TOKENS}; from about {max(lengths):,} tokens on the compressed layers take half of fp16 or less"
        )

    def to_dict(self) -> dict[str, Any]:
        """Totals and layers as JSON types."""
        totals = {
            name: getattr(self, name) for name in ("bytes", "fp16_bytes", "ratio", "bytes_by_part", "tokens_by_tier")
        }
        layers = [asdict(layer) | {"bytes": layer.bytes} for layer in self.layers]
        return totals | {"skipped": self.skipped, "note": self.note, "layers": layers}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size:,}" for name, size in self.bytes_by_part.items() if size)
        skipped = f"; {len(self.skipped)} layers uncompressed" if self.skipped else ""
        return f"{self.bytes:,} bytes = {self.ratio:.3f} of fp16 ({parts}){skipped}" + (
            f"; {self.note}" if self.note else ""
        )


def _of_bytes(config: MiKVConfig) -> str:
    """What decides bytes, but for the user's spans, as a key."""
    return replace(config, protected=(), layer_settings={}, policy="recency", policy_options={}).to_json()


@lru_cache(maxsize=256)
def _saves_from(config_json: str, num_heads: int, head_dim: int) -> int | None:
    config, layer = MiKVConfig.from_json(config_json), LayerGeometry(FULL_ATTENTION, None, num_heads, head_dim)
    geometry = CacheGeometry((layer,), model_dtype_bytes=FP16_BYTES)
    return shortest(lambda num_tokens: cache_bytes(config, geometry, num_tokens).ratio, _HALF)


def _summed(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return {name: value for name, value in total.items() if value}
