"""The mikv caches that the suite is run on: the full cache, and packed ones whose tiers overflow in a short text."""

from collections.abc import Callable
from dataclasses import replace

from transformers import Cache, PreTrainedModel

from conformance.trial import Subject
from mikv import MiKVCache, MiKVConfig

EXACT_CONFIG = MiKVConfig(importance_ratio=1, high="exact")


def packed_config(preset: str) -> MiKVConfig:
    """A preset that begins to pack after 16 tokens and keeps no more than 8 recent ones."""
    return replace(MiKVConfig.preset(preset), warmup_tokens=16, min_recent=8)


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
