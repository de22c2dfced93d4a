"""A cached layer's step as one operation of PyTorch, so that torch.compile traces a decode step without a break.

Compiled code cannot run the cache's Python, and a graph cannot hold a cache. So `update` leaves the layer's handle, a
tensor with a number, for the attention function of the same layer, which calls the operation; the operation finds the
layer by that number. What it does to the cache the graph need not know: each step's output depends on the one before.
"""

from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mikv.cache.warm_up import ExactAttention
from mikv.errors import CacheStateError
from mikv.integrations.transformers import loan
from mikv.ops import AttentionOptions, attend_unpacked, visible


@runtime_checkable
class Layer(Protocol):
    """A cache layer that wants the queries too; what the operation needs of one."""

    def step(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        """Attend from queries (B, H, Tq, D) to the cache and the new keys and values, and store those."""


class _Route:
    """Which layer the attention function that is traced next belongs to; None outside of a compiled cache layer.

    config, own   the model's configuration, and the attention implementation that it is to have back
    """

    handle: Tensor | None = None
    config: Any = None
    own: str = ""


_ROUTE = _Route()
_LAYERS: WeakValueDictionary[int, Layer] = WeakValueDictionary()
_LIBRARY = torch.library.Library("mikv_transformers", "DEF")
_LIBRARY.define(
    "cached_attention(Tensor handle, Tensor queries, Tensor keys, Tensor values, Tensor? mask, float scale, "
    "float softcap, Tensor? sinks) -> Tensor"
)


def register(layer: Layer) -> Tensor:
    """A handle for `layer`, valid as long as the layer lives."""
    _LAYERS[id(layer)] = layer
    return torch.tensor(id(layer), dtype=torch.int64, device="cpu")


def enter(handle: Tensor, config: PreTrainedConfig, borrowed: str) -> None:
    """The next attention is that of the layer with this handle: the configuration names it until then."""
    _ROUTE.handle, _ROUTE.config, _ROUTE.own = handle, config, config._attn_implementation
    loan.put(config, borrowed)


def is_entered() -> bool:
    """Whether the attention that is traced next is that of a cache layer."""
    return _ROUTE.handle is not None


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    """The step of the layer that was entered (B, H, Tq, D)."""
    handle, _ROUTE.handle = _ROUTE.handle, None
    loan.put(_ROUTE.config, _ROUTE.own)
    _ROUTE.config = None
    return torch.ops.mikv_transformers.cached_attention(
        handle, queries, keys, values, mask, options.scale, options.softcap or 0.0, options.sinks
    )


def _step(
    handle: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    layer = _LAYERS.get(int(handle))
    if layer is None:
        raise CacheStateError("a compiled step refers to a MiKV cache that is gone; call the model with a cache again")
    options = AttentionOptions(scale, softcap or None, sinks)

    def exact(all_keys: Tensor, all_values: Tensor) -> Tensor:
        if options.softcap is not None or sinks is not None:
            seen = None if mask is None else visible(mask)
            return attend_unpacked(queries, all_keys, all_values, seen, options, causal=True)
        return torch.nn.functional.scaled_dot_product_attention(
            queries,
            all_keys,
            all_values,
            mask,
            is_causal=mask is None and queries.shape[2] > 1,
            scale=scale,
            enable_gqa=True,
        )

    # the graph's tensors must not live on in the cache, nor be what it returns
    return layer.step(queries, (keys.clone(), values.clone()), mask, options, exact).contiguous()


def _step_shape(
    handle: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *options: object
) -> Tensor:
    return torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)


_LIBRARY.impl("cached_attention", _step, "CompositeExplicitAutograd")
torch.library.register_fake("mikv_transformers::cached_attention", _step_shape, lib=_LIBRARY)
