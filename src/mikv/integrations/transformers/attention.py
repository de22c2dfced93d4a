"""The attention function `mikv` of transformers: routes a step to the cache layer that its keys came from.

`MiKVCache.update` hands a zero-length key tensor to the model that carries the cache layer; the model passes it on to
its attention function, which thereby gets the queries, the mask and the cache without hooks or patched models. Keys
without a cache layer (no cache, a sliding-window layer, another cache) get ordinary attention.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mikv.errors import CacheStateError, UnsupportedModelError
from mikv.ops import AttentionOptions, Segment, attend, causal_mask

NAME = "mikv"
_CARRIER = "_mikv_layer"
# Keyword arguments with which models change the arithmetic of attention in ways mikv does not reproduce.
_REFUSED = ("position_bias", "head_mask", "indices")


class CacheLayer(Protocol):
    """What the attention function needs of a cache layer."""

    def attend(
        self,
        queries: Tensor,
        mask: Tensor | None,
        options: AttentionOptions,
        exact: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Attend from queries (B, H, Tq, D) to the cache and the keys last handed to it: (B, H, Tq, D)."""


def register() -> None:
    """Make `attn_implementation="mikv"` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, mikv_attention)
    # without a mask function of the same name transformers passes no mask at all, and padding would be attended to
    AttentionMaskInterface.register(NAME, sdpa_mask)


def carrier(keys: Tensor, layer: CacheLayer) -> Tensor:
    """A zero-length key tensor (B, G, 0, D) that carries `layer` through the model to `mikv_attention`."""
    empty = keys[:, :, :0]
    setattr(empty, _CARRIER, layer)
    return empty


@torch.compiler.disable
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
    layer: CacheLayer | None = getattr(key, _CARRIER, None)
    options = AttentionOptions(scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, s_aux)

    def exact(keys: Tensor, values: Tensor) -> Tensor:
        return _exact_attention(module, query, (keys, values), attention_mask, options, dropout, **kwargs)

    if layer is None:
        if key.shape[2] == 0 and query.shape[2] > 0:
            raise CacheStateError(
                f"{type(module).__name__} changed the keys between the cache and the attention function, so mikv "
                "cannot tell which layer they belong to; this model is not supported"
            )
        return exact(key, value).transpose(1, 2).contiguous(), None
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name} to its attention, which mikv does not support"
            )
    if dropout:
        raise UnsupportedModelError(f"attention dropout of {dropout} while using a MiKV cache; call model.eval() first")
    return layer.attend(query, attention_mask, options, exact).transpose(1, 2).contiguous(), None


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
    num_queries = query.shape[2]
    if mask is None and num_queries > 1 and getattr(module, "is_causal", True):
        mask = causal_mask(num_queries, keys.shape[2], keys.device)
    visible = mask if mask is None or mask.dtype == torch.bool else mask == 0
    return attend(query, [Segment.of_tensors(keys, values, visible)], None, options)[0]
