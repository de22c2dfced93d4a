"""The mikv caches that the suite is run on: the full cache, and packed ones whose tiers overflow in a short text."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import Cache, PreTrainedModel

from conformance.trial import Subject
from mikv import MiKVCache, MiKVConfig

EXACT_CONFIG = MiKVConfig(importance_ratio=1, high="exact")


# Packing begins early, and a third of the few tokens is high: enough for scores to decide which.
SHORT: dict[str, Any] = {"importance_ratio": 0.3, "warmup_tokens": 16, "min_recent": 4}


def packed_config(preset: str) -> MiKVConfig:
    """A preset, with tiers for short texts."""
    return replace(MiKVConfig.preset(preset), **SHORT)


def packed(preset: str) -> Subject:
    """A cache of two tiers under test."""
    return Subject(f"MiKVCache ({preset})", _maker(packed_config(preset)), exact=False, stored=_stored_tokens)


def _maker(config: MiKVConfig) -> Callable[[PreTrainedModel], Cache]:
    return lambda model: MiKVCache(model.config, config)


def _stored_tokens(cache: Cache) -> list[int]:
    if not isinstance(cache, MiKVCache):
        return []  # the oracle's
    compressed = [layer.tokens_by_tier for layer in cache.memory().layers if not layer.skipped]
    return [sum(tiers.values()) - tiers["dropped"] for tiers in compressed]


EXACT = Subject("MiKVCache (exact)", _maker(EXACT_CONFIG), exact=True, stored=_stored_tokens)
BALANCED = packed("balanced")
# Rounds so little that wrong arithmetic shows: a softcap, sink logits or a whole tier left out.
FINE = replace(
    BALANCED, name="MiKVCache (int8)", make=_maker(MiKVConfig(high="int8", low="int8", **SHORT)), rounding=0.05
)
