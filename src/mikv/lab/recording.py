"""The exact prefill of one prompt, recorded once and given to many caches.

Every cache computes a prompt's attention exactly, on fresh keys and values, so that what a prompt leaves behind depends
on nothing but the queries, keys and values of each layer. `fill` hands those to an empty cache, which does with them
what it would have done in its own prefill: score, partition, quantize, evict.

B = 1 row, H query heads, G KV heads, T tokens, D head dim.
"""

import copy
import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mikv.cache.geometry import text_config
from mikv.cache.warm_up import ExactAttention
from mikv.integrations.transformers import attention
from mikv.integrations.transformers.compiled import Layer
from mikv.integrations.transformers.versions import as_argument
from mikv.ops import AttentionOptions


@runtime_checkable
class PromptReader(Protocol):
    """A cache that wants more than queries, keys and values: hidden states, weights."""

    def read_prompt(self, tokens: Tensor) -> None:
        """Read the prompt `tokens` (T,) with the model it was made for."""


@dataclass(frozen=True)
class LayerPrompt:
    """What a full-attention layer computed: queries (1, H, T, D), keys and values (1, G, T, D), after RoPE."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    options: AttentionOptions


@dataclass(frozen=True)
class Recording:
    """A prompt that a model has read exactly.

    tokens     (T,) token ids
    layers     per layer, what it computed, or its own cache layer where it is not full attention
    log_probs  (vocabulary,) float32, of the token after the prompt
    seconds    that the prefill took
    """

    tokens: Tensor
    layers: tuple[Any, ...]
    log_probs: Tensor
    seconds: float


@torch.no_grad()
def record(model: PreTrainedModel, tokens: Tensor) -> Recording:
    """Read the prompt `tokens` (T,) with the full cache, by the model's own attention."""
    text = text_config(model.config)
    cache = DynamicCache(config=model.config)
    # only full-attention layers are of this very class; sliding ones derive from it
    cache.layers = [_Recorder(text) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    start = time.perf_counter()
    logits = model(tokens[None], **as_argument(cache), logits_to_keep=1).logits[0, -1]
    seconds = time.perf_counter() - start
    recorded = tuple(layer.prompt if isinstance(layer, _Recorder) else layer for layer in cache.layers)
    return Recording(tokens, recorded, logits.float().log_softmax(-1), seconds)


@torch.no_grad()
def fill(cache: Cache, recording: Recording) -> Cache:
    """Bring an empty cache of the same model to where reading the recorded prompt at once would have brought it."""
    if isinstance(cache, PromptReader):
        cache.read_prompt(recording.tokens)
        return cache
    for index, recorded in enumerate(recording.layers):
        layer = cache.layers[index]
        if not isinstance(recorded, LayerPrompt):
            cache.layers[index] = copy.deepcopy(recorded)
        elif isinstance(layer, Layer):
            # what attention returns is not wanted, so the exact attention of the warm-up need not be computed again
            new = recorded.keys, recorded.values
            layer.step(recorded.queries, new, None, recorded.options, lambda keys, values: keys)
        else:
            layer.update(recorded.keys, recorded.values)
    return cache


class _Recorder(DynamicLayer):
    """A full-attention layer that reads one prompt and keeps what `fill` needs."""

    prompt: LayerPrompt
    wants_proof = False

    def __init__(self, model_config: PreTrainedConfig) -> None:
        super().__init__()
        self._model_config = model_config

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Lead the attention function here, which brings the queries."""
        super().update(key_states, value_states)
        return attention.carriers(key_states, value_states, self, self._model_config)

    def attend(self, queries: Tensor, mask: Tensor | None, options: AttentionOptions, exact: ExactAttention) -> Tensor:
        """The model's own attention."""
        self.prompt = LayerPrompt(queries, self.keys, self.values, options)
        return exact(self.keys, self.values)
