"""The attention function `mikv` of transformers: routes a step to the cache layer that its keys came from.

`MiKVCache.update` hands a zero-length key tensor to the model that carries the cache layer; the model passes it on to
its attention function, which thereby gets the queries, the mask and the cache without hooks or patched models. Keys
without a cache layer (no cache, a sliding-window layer, another cache) get ordinary attention.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mikv.cache.warm_up import ExactAttention
from mikv.errors import CacheStateError, UnsupportedModelError
from mikv.integrations.transformers import compiled
from mikv.ops import AttentionOptions, attend_unpacked, visible

NAME = "mikv"
# What may be asked of keys that are in a cache: their properties, and what torch.compile wants to know of its inputs.
_FACTS = frozenset(
    ("__get__", "dim", "size", "stride", "storage_offset", "untyped_storage", "is_conj", "is_neg", "_is_view")
)
# Keyword arguments with which models change the arithmetic of attention in ways mikv does not reproduce.
_REFUSED = ("position_bias", "head_mask", "indices")


class CacheLayer(Protocol):
    """What the attention function needs of a cache layer."""

    def attend(
        self,
        queries: Tensor,
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        """Attend from queries (B, H, Tq, D) to the cache and the keys last handed to it: (B, H, Tq, D)."""


def register() -> None:
    """Make `attn_implementation="mikv"` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, mikv_attention)
    # without a mask function of the same name transformers passes no mask at all, and padding would be attended to
    AttentionMaskInterface.register(NAME, sdpa_mask)


class Carrier(Tensor):
    """A zero-length key tensor (B, G, 0, D) that carries `layer` through the model to `mikv_attention`.

    Attention that knows nothing of it would find no tokens and answer with zeros, so whatever else computes with it, or
    changes it on the way, gets a CacheStateError.
    """

    layer: CacheLayer

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse everything but questions."""
        if func.__name__ not in _FACTS:
            raise CacheStateError(
                f"{func.__name__} was called on keys that are in a MiKV cache, so the model does not compute its "
                "attention with 'mikv' or changes keys after the cache; load the model with attn_implementation='mikv' "
                "and call cache.reset() before using this cache again"
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def carrier(keys: Tensor, layer: CacheLayer) -> Carrier:
    """A tensor like `keys` (B, G, any, D), but empty, that carries `layer`."""
    empty = keys[:, :, :0].as_subclass(Carrier)
    empty.layer = layer
    return empty


def mikv_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, Tq, D) -> (B, Tq, H, D), no weights.

    Raises UnsupportedModelError for arithmetic that mikv does not reproduce (position biases, attention dropout).
    """
    options = AttentionOptions(
        scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, s_aux, dropout=dropout
    )
    output = None
    if torch.compiler.is_compiling():
        if compiled.is_entered():
            _refuse(module, dropout, kwargs)
        output = compiled.attention(query, key, value, attention_mask, options)
    elif isinstance(key, Carrier):
        _refuse(module, dropout, kwargs)
        output = _carried_attention(module, query, key, attention_mask, options, kwargs)
    if output is None:
        output = _exact_attention(module, query, (key, value), attention_mask, options, dropout, **kwargs)
    return output.transpose(1, 2).contiguous(), None


def _refuse(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for what a cached step cannot do."""
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name} to its attention, which mikv does not support"
            )
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError("output_attentions=True: mikv never computes the matrix of attention weights")
    if dropout:
        raise UnsupportedModelError(f"attention dropout of {dropout} while using a MiKV cache; call model.eval() first")


@torch.compiler.disable
def _carried_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Carrier,
    mask: Tensor | None,
    options: AttentionOptions,
    kwargs: dict[str, Any],
) -> Tensor:
    """The step of the layer that the key carries (B, H, Tq, D)."""

    def exact(keys: Tensor, values: Tensor) -> Tensor:
        return _exact_attention(module, query, (keys, values), mask, options, 0.0, **kwargs)

    return key.layer.attend(query, mask, options, exact)


def _exact_attention(
    module: torch.nn.Module,
    query: Tensor,
    key_value: tuple[Tensor, Tensor],
    mask: Tensor | None,
    options: AttentionOptions,
    dropout: float,
    **kwargs: Any,
) -> Tensor:
    """Attention over unpacked keys and values: transformers' sdpa, or our own for softcap and sinks. (B, H, Tq, D)."""
    keys, values = key_value
    if options.softcap is None and options.sinks is None:
        output, _ = sdpa_attention_forward(module, query, keys, values, mask, dropout, options.scale, **kwargs)
        return output.transpose(1, 2)
    seen = None if mask is None else visible(mask)
    return attend_unpacked(query, keys, values, seen, options, causal=getattr(module, "is_causal", True))
