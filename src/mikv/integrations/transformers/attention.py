"""The attention function `mikv` of transformers: routes a step to the cache layer that its keys came from.

`MiKVCache.update` hands a zero-length key tensor to the model that carries the cache layer; the model passes it on to
its attention function, which thereby gets the queries, the mask and the cache without hooks or patched models. Keys
without a cache layer (no cache, a sliding-window layer, another cache) get the model's own attention.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mikv.cache.warm_up import ExactAttention
from mikv.errors import CacheStateError, UnsupportedModelError
from mikv.integrations.transformers import compiled, loan
from mikv.ops import AttentionOptions, attend_unpacked, visible

# What may be asked of keys that are in a cache: their properties, and what torch.compile wants to know of its inputs.
_FACTS = frozenset(
    ("__get__", "dim", "size", "stride", "storage_offset", "untyped_storage", "is_conj", "is_neg", "_is_view")
)
# Tensors that mikv computes with, and those that models hand to every attention function and that none uses.
_KNOWN_TENSORS = frozenset(("s_aux", "position_ids", "cache_position"))
_PROBED_QUERIES = 4
_PROBE_TOLERANCE = 0.05  # of the output's root mean square; bfloat16 rounds to .004, another formula is at .3 and more


class CacheLayer(Protocol):
    """What the attention function needs of a cache layer.

    wants_proof   whether the model's own attention has yet to be compared with what the layer computes later on
    """

    wants_proof: bool

    def attend(
        self,
        queries: Tensor,
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        """Attend from queries (B, H, Tq, D) to the cache and the keys last handed to it: (B, H, Tq, D)."""


class Carrier(Tensor):
    """A zero-length key tensor (B, G, 0, D) that carries `layer` through the model to `mikv_attention`.

    Attention that knows nothing of it would find no tokens and answer with zeros, so whatever else computes with it, or
    changes it on the way, gets a CacheStateError. The model's configuration is borrowed as long as the carrier lives.
    """

    layer: CacheLayer
    loan: loan.Loan

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse everything but questions."""
        if func.__name__ not in _FACTS:
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, Carrier):
                    value.loan.give_back()
            raise CacheStateError(
                f"{func.__name__} was called on keys or values that are in a MiKV cache: the model does not compute "
                "its attention by way of transformers' attention interface, or the cache was made for a copy of its "
                "configuration; make it for model.config itself, or use transformers' DynamicCache"
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def carriers(keys: Tensor, values: Tensor, layer: CacheLayer, config: PreTrainedConfig) -> tuple[Carrier, Carrier]:
    """Tensors like keys and values (B, G, any, D), but empty, that carry `layer` through the model of `config`."""
    empty = _carrier(keys, layer), _carrier(values, layer)
    borrowed = loan.Loan(config, mikv_attention)  # last, when nothing can fail any more
    for each in empty:
        each.loan = borrowed
    return empty


def _carrier(like: Tensor, layer: CacheLayer) -> Carrier:
    empty = like[:, :, :0].as_subclass(Carrier)
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
    own: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query (B, H, Tq, D) -> (B, Tq, H, D), no weights.

    `own` is the implementation that the model computes with otherwise, None if it was loaded as 'mikv'. Raises
    UnsupportedModelError for arithmetic that mikv does not reproduce: arguments it does not know, position biases,
    attention dropout, attention weights.
    """
    call = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux, **kwargs}
    options = AttentionOptions(scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, s_aux)
    if torch.compiler.is_compiling():
        if compiled.is_entered():
            _refuse(module, query.shape[2], attention_mask, call)
            output = compiled.attention(query, key, value, attention_mask, options)
            return output.transpose(1, 2).contiguous(), None
    elif isinstance(key, Carrier):
        key.loan.give_back()
        _refuse(module, query.shape[2], attention_mask, call)
        output = _carried_attention(module, query, key, attention_mask, options, (own, call))
        return output.transpose(1, 2).contiguous(), None
    elif isinstance(config := getattr(module, "config", None), PreTrainedConfig):
        loan.heal(config)
    return _own_attention(module, query, (key, value), attention_mask, own, call)


def _refuse(module: torch.nn.Module, num_queries: int, mask: object, kwargs: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for what a cached step cannot do."""
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError("output_attentions=True: mikv never computes the matrix of attention weights")
    if dropout := kwargs["dropout"]:
        raise UnsupportedModelError(f"attention dropout of {dropout} while using a MiKV cache; call model.eval() first")
    _refuse_unknown(module, kwargs)
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
    if mask is None and num_queries > 1 and causal is False:
        raise UnsupportedModelError(f"{type(module).__name__} lets tokens attend to later ones, which mikv cannot")
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            f"an attention mask of type {type(mask).__name__} cannot be read; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )


def _refuse_unknown(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for tensors that change attention in a way mikv knows nothing of."""
    for name, value in kwargs.items():
        if name not in _KNOWN_TENSORS and _holds_tensor(value):
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name} to its attention, which mikv does not know and cannot honour; "
                "use transformers' DynamicCache and attention"
            )


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_tensor, value))


@torch.compiler.disable
def _carried_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Carrier,
    mask: Tensor | None,
    options: AttentionOptions,
    own_call: tuple[str | None, dict[str, Any]],
) -> Tensor:
    """The step of the layer that the key carries (B, H, Tq, D)."""
    layer, seen = key.layer, _of_queries(mask, query.shape[2])

    def exact(keys: Tensor, values: Tensor) -> Tensor:
        output = _own_attention(module, query, (keys, values), mask, *own_call)[0].transpose(1, 2)
        if layer.wants_proof:
            _require_softmax_attention(module, (query, keys, values, output), seen, options)
            layer.wants_proof = False
        return output

    return layer.attend(query, seen, options, exact)


def _of_queries(mask: Tensor | None, num_queries: int) -> Tensor | None:
    """A mask of tokens (B, T), as flash attention takes it, as one of queries (B, 1, Tq, T); any other as it is."""
    if mask is None or mask.dim() != 2:
        return mask
    columns = torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device)
    causal = columns <= columns[mask.shape[1] - num_queries :, None]
    return causal & mask.bool()[:, None, None, :]


def _own_attention(
    module: torch.nn.Module,
    query: Tensor,
    key_value: tuple[Tensor, Tensor],
    mask: Tensor | None,
    own: str | None,
    call: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the model computes over unpacked keys and values (B, Tq, H, D), and weights if it gives any."""
    if own is None:
        _refuse_unknown(module, call)
    # transformers' sdpa refuses softcaps, before 5.23 it ignored them; it ignores sinks
    if own not in (None, "sdpa") or (call["softcap"] is None and call["s_aux"] is None):
        given = {name: value for name, value in call.items() if value is not None or name == "scaling"}
        return loan.own_function(own or "sdpa", module)(module, query, *key_value, mask, **given)
    scale = call["scaling"] or query.shape[-1] ** -0.5
    options = AttentionOptions(scale, call["softcap"], call["s_aux"], dropout=call["dropout"])
    seen = None if mask is None else visible(mask)
    causal = getattr(module, "is_causal", True)
    return attend_unpacked(query, *key_value, seen, options, causal=causal).transpose(1, 2).contiguous(), None


def _require_softmax_attention(
    module: torch.nn.Module, step: tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor | None, options: AttentionOptions
) -> None:
    """Raise UnsupportedModelError if the model's own output of a step is not what the tiers will compute.

    `step` is queries, all keys and values, and the output, all (B, heads, any, D); the last queries are looked at.
    """
    queries, keys, values, output = step
    last = slice(max(0, queries.shape[2] - _PROBED_QUERIES), None)
    seen = None if mask is None else visible(mask)[:, :, last]
    expected = attend_unpacked(queries[:, :, last], keys, values, seen, options, causal=True)
    error = (output[:, :, last] - expected).float()
    if seen is not None:  # padding sees nothing, and what it gets does not matter
        counted = seen.diagonal(keys.shape[2] - seen.shape[2], dim1=-2, dim2=-1)[..., None]
        error, expected = error * counted, expected * counted
    if error.norm() > _PROBE_TOLERANCE * expected.float().norm():
        raise UnsupportedModelError(
            f"{type(module).__name__} computes something else than softmax(q.k * scale).v (its own output is "
            f"{float(error.norm() / expected.float().norm()):.2g} from that), which packed tokens cannot reproduce; "
            "use transformers' DynamicCache"
        )


loan.register(mikv_attention, "sdpa")  # for models that are loaded with attn_implementation="mikv"
