"""The operations by the native kernels, registered for tensors on the CPU. Signatures are those of fallback.py.

Typed functions flatten their arguments for `torch.ops.mikv`; the kernels behind those hand tensors to C++, with as many
threads as PyTorch uses. C++ checks everything; nothing is computed here.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mikv.errors import NumericsError
from mikv.ops import native, schema
from mikv.ops.matmul import MatmulShape
from mikv.ops.schema import LIBRARY, flat_transforms
from mikv.ops.segments import AttentionOptions
from mikv.ops.views import FlatTier, TierView
from mikv.transforms import KeyTransform, ValueTransform

Transforms = tuple[KeyTransform, ValueTransform]

_MOST_AXES = 5  # of a tensor whose rows C++ counts


def attend(
    queries: Tensor,
    new: tuple[Tensor, Tensor],
    mask: Tensor | None,
    tiers: tuple[TierView, TierView | None],
    transforms: Transforms | None,
    options: AttentionOptions,
    query_weight: Tensor | None,
    scored: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Softmax attention over both tiers and the new tokens; see fallback.attend."""
    high, low = tiers
    keys, values = (_with_contiguous_channels(x) for x in new)
    output, received_high, received_new = _route(queries, _attend, torch.ops.mikv.attend)(
        _with_contiguous_channels(queries),
        keys,
        values,
        mask,
        *high.flat,
        *_flat_low(high, low),
        *flat_transforms(transforms),
        *_flat_options(options, query_weight),
        options.exact,
        scored,
    )
    return (output, received_high, received_new) if scored else (output, None, None)


def pack(
    tier: TierView,
    row: int,
    first_slot: int,
    keys: Tensor,
    values: Tensor,
    transforms: Transforms | None,
    feedback: Tensor | None = None,
) -> None:
    """Quantize tokens (G, n, D) into the slots of a row from `first_slot` on; see fallback.pack."""
    keys, values = _with_contiguous_channels(keys), _with_contiguous_channels(values)
    _route(keys, _pack, torch.ops.mikv.pack)(
        *tier.flat, row, first_slot, keys, values, *flat_transforms(transforms), feedback
    )


def append(
    high: TierView,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    first_positions: Sequence[int],
    transforms: Transforms,
) -> None:
    """Put tokens (B, G, n, D) into the next free slots of all rows; see fallback.append."""
    keys, values = _with_contiguous_channels(keys), _with_contiguous_channels(values)
    _route(keys, _append, torch.ops.mikv.append)(
        *high.flat,
        high.parts["score"],
        high.parts["position"],
        keys,
        values,
        scores.float().contiguous(),
        list(first_positions),
        *flat_transforms(transforms),
    )


def unpack(tier: TierView, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Decode slots (G, n) of a row; see fallback.unpack."""
    keys, values = _route(slots, _unpack, torch.ops.mikv.unpack)(
        *tier.flat, row, slots.contiguous(), tier.formats[0].head_dim
    )
    return keys, values


def demote(
    high: TierView,
    low: TierView | None,
    row: int,
    slots: Tensor,
    transforms: Transforms | None,
    feedback: Tensor | None = None,
) -> None:
    """Move high slots (G, n) to the row's low tier, or drop them; see fallback.demote."""
    _route(slots, _demote, torch.ops.mikv.demote)(
        *high.flat,
        high.parts["score"],
        high.parts["position"],
        *_flat_low(high, low),
        row,
        slots.contiguous(),
        high.formats[0].head_dim,
        *flat_transforms(transforms),
        feedback,
    )


def score_prompt(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
    query_weight: Tensor | None = None,
    stride: int = 1,
    distance: int = 0,
) -> Tensor:
    """The attention that the tokens of a prompt receive; see segments.score_prompt."""
    queries, keys = _with_contiguous_channels(queries), _with_contiguous_channels(keys)
    received: Tensor = _route(queries, _score_prompt, torch.ops.mikv.score_prompt)(
        queries, keys, mask, *_flat_options(options, query_weight), stride, distance
    )
    return received


def lut_matmul(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, shape: MatmulShape) -> Tensor:
    """x (..., K) times an arranged matrix; see matmul.lut_matmul."""
    inputs = x if x.is_contiguous() and x.dim() <= _MOST_AXES else x.reshape(-1, shape.in_features).contiguous()
    differentiates = x.requires_grad and torch.is_grad_enabled()
    kernel = torch.ops.mikv.lut_matmul if differentiates else _route(x, _lut_matmul, torch.ops.mikv.lut_matmul)
    output: Tensor = kernel(inputs, codes, scales, bias, shape.flat)
    return output if inputs is x else output.view(*x.shape[:-1], shape.out_features)


def _route(x: Tensor, kernel: Callable[..., Any], operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation if something traces it; else its kernel, which saves the 12 microseconds of the dispatcher."""
    return operation if torch.compiler.is_compiling() or type(x) is not Tensor or _is_watched() else kernel


def _is_watched() -> bool:
    """Whether plain tensors mean something else here: shapes without numbers (FakeTensorMode), one of many (vmap)."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None


def _with_contiguous_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _flat_low(high: TierView, low: TierView | None) -> FlatTier:
    return ([], high.pages, high.counts, []) if low is None else low.flat


def _flat_options(
    options: AttentionOptions, query_weight: Tensor | None
) -> tuple[float, float, Tensor | None, Tensor | None]:
    options.require_inference()
    sinks = options.sinks
    return (
        options.scale,
        options.softcap or 0.0,
        None if sinks is None else sinks.detach().float().contiguous(),
        None if query_weight is None else query_weight.float().contiguous(),
    )


# The kernels. `torch.ops` passes arguments by position, of which a tier takes four and the transforms five.


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    high, low, transforms = rest[0:4], rest[4:8], rest[8:13]
    scale, softcap, sinks, query_weight, exact, scored = rest[13:]
    results = schema.attend_results(queries, keys, high[0], high[1], scored)
    _module().attend(
        queries,
        keys,
        values,
        mask,
        high,
        low if low[0] else None,
        transforms,
        scale,
        softcap,
        sinks,
        query_weight,
        exact,
        torch.get_num_threads(),
        results[0],
        results[1] if scored else None,
        results[2] if scored else None,
    )
    return results


def _pack(*arguments: Any) -> None:
    tier, tokens, transforms, feedback = arguments[0:4], arguments[4:8], arguments[8:13], arguments[13]
    _require_stored(_module().pack(tier, *tokens, transforms, feedback, torch.get_num_threads()))


def _append(*arguments: Any) -> None:
    high, book, tokens, transforms = arguments[0:4], arguments[4:6], arguments[6:10], arguments[10:]
    _require_stored(_module().append(high, *book, *tokens, transforms, torch.get_num_threads()))


def _unpack(*arguments: Any) -> tuple[Tensor, Tensor]:
    tier, (row, slots, head_dim) = arguments[0:4], arguments[4:]
    keys, values = schema.unpack_results(slots, head_dim)
    _module().unpack(tier, row, slots, keys, values, torch.get_num_threads())
    return keys, values


def _demote(*arguments: Any) -> None:
    high, (score, position), low = arguments[0:4], arguments[4:6], arguments[6:10]
    moved, transforms, feedback = arguments[10:13], arguments[13:18], arguments[18]
    to = low if low[0] else None
    threads = torch.get_num_threads()
    _require_stored(_module().demote(high, to, score, position, *moved, transforms, feedback, threads))


def _score_prompt(queries: Tensor, keys: Tensor, *options: Any) -> Tensor:
    received = schema.score_prompt_result(keys)
    _module().score_prompt(queries, keys, *options, torch.get_num_threads(), received)
    return received


def _lut_matmul(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
    output = schema.lut_matmul_result(x, sizes)
    _module().matmul(x, codes, scales, bias, sizes, 0, torch.get_num_threads(), output)
    return output


def _module() -> ModuleType:
    if native.module is None:
        raise RuntimeError(f"mikv's native CPU kernels are not in use: {native.reason}")
    return native.module


def _require_stored(status: int) -> None:
    if status == 1:
        raise NumericsError("there are NaN or Inf values among the keys or values; check the model's dtype and inputs")
    if status == 2:
        raise NumericsError(
            "a number, scale or zero-point of the keys or values is beyond the range of 16-bit floats (65504); "
            "use high='exact' with importance_ratio=1 for this layer (skip_layers)"
        )


for _name, _kernel in (
    ("attend", _attend),
    ("pack", _pack),
    ("append", _append),
    ("unpack", _unpack),
    ("demote", _demote),
    ("score_prompt", _score_prompt),
    ("lut_matmul", _lut_matmul),
):
    LIBRARY.impl(_name, _kernel, "CPU")
