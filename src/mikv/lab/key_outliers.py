"""Channels of a model's keys that are far larger than the others, and whether a cache's transforms even them out.

A few such channels take all levels of a scale that a whole token shares: the known killer of low-bit keys.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mikv.cache.config import MiKVConfig
from mikv.cache.packed import Packed
from mikv.integrations.transformers import MiKVCache
from mikv.integrations.transformers.layer import MiKVLayer
from mikv.lab.recording import Recording, fill
from mikv.models import LoadedModel

OUTLIER_RATIO = 10.0
TAMED_RATIO = 5.0


@dataclass(frozen=True)
class KeyOutliers:
    """The largest channel over the median one, by max |k| over a prompt, in the worst head of a layer.

    raw          of the keys as the model computes them
    transformed  of the keys as they are quantized
    """

    layer: int
    raw: float
    transformed: float

    @property
    def is_outlier(self) -> bool:
        """Whether plain rounding would lose this layer's keys."""
        return self.raw > OUTLIER_RATIO

    @property
    def is_tamed(self) -> bool:
        """Whether no channel stands out in the basis in which keys are quantized."""
        return self.transformed <= TAMED_RATIO

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"is_outlier": self.is_outlier, "is_tamed": self.is_tamed}


def key_outliers(loaded: LoadedModel, config: MiKVConfig, recording: Recording) -> list[KeyOutliers]:
    """Of every compressed layer, for a recorded prompt that is longer than the warm-up."""
    cache = fill(MiKVCache(loaded.model.config, config), recording)
    found = []
    for index, (layer, recorded) in enumerate(zip(cache.layers, recording.layers, strict=True)):
        if isinstance(layer, MiKVLayer) and isinstance(layer.tokens.tokens, Packed):
            keys = recorded.keys[:, :, config.sinks :]  # (1, G, T, D); sinks are never in the low tier
            transform, _ = layer.tokens.tokens.transforms
            found.append(KeyOutliers(index, spread(keys), spread(transform.encode(keys))))
    return found


def spread(keys: Tensor) -> float:
    """The largest channel of keys (..., T, D) over the median one, by max |k| over tokens, in the worst head."""
    largest = keys.abs().amax(-2).float()  # (..., D)
    return float((largest.amax(-1) / largest.median(-1).values.clamp_min(torch.finfo(torch.float32).tiny)).max())
