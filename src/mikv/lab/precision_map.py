"""Where a cache keeps each token of one prompt: the tier and the policy's score, per layer and head.

Tiers are read from a cache that has been filled with the prompt; scores are the policy's priorities of all tokens at
the moment of the partition, of which a packed cache keeps only those of the high tier.

L compressed layers, G KV heads, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mikv.cache.config import MiKVConfig
from mikv.cache.packed import Packed
from mikv.cache.partition import protected_tokens
from mikv.cache.warm_up import WarmUp
from mikv.errors import ConfigError
from mikv.integrations.transformers import MiKVCache
from mikv.integrations.transformers.layer import MiKVLayer
from mikv.lab.recording import fill, record
from mikv.models import LoadedModel

_NEVER = 1 << 30  # tokens of warm-up that no prompt reaches


@dataclass(frozen=True)
class LayerMap:
    """One layer with two tiers.

    config      of this layer
    high        (G, T) bool, which tokens are in the high tier
    priority    (G, T) float32, what the policy says of them
    protection  (T,) why a token is never demoted: sink, recent or protected; empty if the policy decides
    """

    layer: int
    config: MiKVConfig
    high: Tensor
    priority: Tensor
    protection: tuple[str, ...]

    @property
    def rest(self) -> str:
        """Where the tokens are that are not in the high tier."""
        return "dropped" if self.config.drops_tokens else "low"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; tiers are a string of 1 (high) and 0 per head, priorities have three digits."""
        return {
            "layer": self.layer,
            "formats": {"high": self.config.high, "low_k": self.config.low_k, "low_v": self.config.low_v},
            "policy": self.config.policy,
            "rest": self.rest,
            "high": ["".join("01"[flag] for flag in head) for head in self.high.tolist()],
            "priority": [[float(f"{x:.3g}") for x in head] for head in self.priority.tolist()],
            "protection": list(self.protection),
        }


@dataclass(frozen=True)
class PrecisionMap:
    """The tokens of a prompt and where a cache keeps them.

    texts   (T,) what each token says
    layers  those with two tiers; layers that stay exact or that the cache does not compress are left out
    ratio   measured bytes of the cache / fp16 bytes of the same keys and values
    """

    model: str
    config: MiKVConfig
    texts: tuple[str, ...]
    layers: tuple[LayerMap, ...]
    ratio: float

    def share_high(self) -> Tensor:
        """(T,) the share of layers and heads in which a token is in the high tier."""
        return torch.cat([layer.high for layer in self.layers]).float().mean(0)

    def always_kept(self) -> list[bool]:
        """(T,) whether a token is protected in every layer."""
        return [all(reasons) for reasons in zip(*(layer.protection for layer in self.layers), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "model": self.model,
            "config": self.config.to_dict(),
            "texts": list(self.texts),
            "layers": [layer.to_dict() for layer in self.layers],
            "ratio": self.ratio,
        }


def precision_map(loaded: LoadedModel, config: MiKVConfig, tokens: Sequence[int]) -> PrecisionMap:
    """Read `tokens` once and see what a cache of `config` does with them. Switches the model's attention to `mikv`.

    Raises ConfigError if the cache would leave every token as it is.
    """
    cache = MiKVCache(loaded.model.config, config)
    recording = record(loaded.model, torch.tensor(list(tokens)))
    fill(cache, recording)
    packed = {layer.layer_idx for layer in _compressed(cache) if isinstance(layer.tokens.tokens, Packed)}
    if not packed:
        raise ConfigError(
            f"this cache leaves all {len(tokens)} tokens exact in every layer of {loaded.name}, so it has no tiers to "
            f"show; it takes at least warmup_tokens={config.warmup_tokens} tokens, importance_ratio below 1 and layers "
            "that are compressed"
        )
    scored = MiKVCache(loaded.model.config, replace(config, warmup_tokens=_NEVER))  # has the scores of all tokens
    fill(scored, recording)
    layers = tuple(
        _layer_map(layer, other, len(tokens))
        for layer, other in zip(_compressed(cache), _compressed(scored), strict=True)
        if layer.layer_idx in packed
    )
    texts = token_texts(loaded.tokenizer, tokens)
    return PrecisionMap(loaded.name, config, texts, layers, cache.memory().ratio)


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text; a character spread over several tokens belongs to the last of them."""
    texts: list[str] = []
    before, known = 0, 0  # the text of tokens[:known] is told; from `before` on it is decoded again, for its spaces
    for end in range(1, len(tokens) + 1):
        told = _decode(tokenizer, tokens[before:known])
        text = _decode(tokenizer, tokens[before:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            texts.append("")
            continue
        texts.append(text[len(told) :])
        before, known = known, end
    return tuple(texts)


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)


def _compressed(cache: MiKVCache) -> list[MiKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, MiKVLayer)]


def _layer_map(layer: MiKVLayer, scored: MiKVLayer, num_tokens: int) -> LayerMap:
    """Of a layer with two tiers, and the same layer in its warm-up."""
    packed, warm_up, config = layer.tokens.tokens, scored.tokens.tokens, layer.tokens.config
    assert isinstance(packed, Packed), type(packed)
    assert isinstance(warm_up, WarmUp), type(warm_up)
    kept = packed.high.positions[0, :, : packed.high.counts[0]].long()
    high = torch.zeros(kept.shape[0], num_tokens, dtype=torch.bool).scatter_(1, kept, True)
    positions = torch.arange(num_tokens, dtype=torch.int32)
    scores = warm_up.policy.initial_scores(warm_up.tokens.keys, warm_up.statistics.attention)[0]  # (G, T)
    priority = warm_up.policy.priority(scores, positions, num_tokens).expand_as(scores).float()
    return LayerMap(layer.layer_idx, config, high, priority, _protection(config, positions))


def _protection(config: MiKVConfig, positions: Tensor) -> tuple[str, ...]:
    num_tokens = len(positions)
    recent = num_tokens - config.recent_window(num_tokens)
    reasons = []
    for position, is_protected in enumerate(protected_tokens(positions, num_tokens, config).tolist()):
        by_place = "sink" if position < config.sinks else "recent" if position >= recent else "protected"
        reasons.append(by_place if is_protected else "")
    return tuple(reasons)
