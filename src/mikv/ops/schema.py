"""The operations as `torch.library` knows them: flat arguments, schemas, and fake kernels that say only shapes.

This is what `torch.compile` traces. A tier is flattened to its parts, pages, counts and seven integers; the kernels of
a device (cpu.py) are registered against these schemas. Shapes are those of `mikv.ops`; nothing is computed here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from mikv.formats import BLOCK_TOKENS
from mikv.ops.matmul import MatmulShape, dequantize
from mikv.transforms import KeyTransform, ValueTransform

FlatTransforms = tuple[Tensor | None, Tensor | None, Tensor | None, int, int]


def flat_transforms(transforms: tuple[KeyTransform, ValueTransform] | None) -> FlatTransforms:
    """Centers and balancer, and the sizes of the rotations; no transform is no center and rotations of 1."""
    if transforms is None:
        return None, None, None, 1, 1
    keys, values = transforms
    return keys.center, keys.balancer, values.center, keys.hadamard_size, values.hadamard_size


def _tier(name: str, changed: str = "") -> str:
    """The arguments of a tier; `changed` is the letter of what an operation writes."""
    return (
        f"Tensor{changed and f'({changed}!)'}[] {name}, Tensor {name}_pages, Tensor {name}_counts, int[] {name}_format"
    )


_TRANSFORMS = "Tensor? key_center, Tensor? key_balancer, Tensor? value_center, int key_rotation, int value_rotation"
_OPTIONS = "float scale, float softcap, Tensor? sinks, Tensor? query_weight"

# A low tier that does not exist has no parts, and its pages and counts are those of the high tier.
_SCHEMAS = (
    f"attend(Tensor queries, Tensor keys, Tensor values, Tensor? mask, {_tier('high')}, {_tier('low')}, {_TRANSFORMS}, "
    f"{_OPTIONS}, bool exact, bool scored) -> (Tensor, Tensor, Tensor)",
    f"pack({_tier('tier', 'a')}, SymInt row, SymInt first_slot, Tensor keys, Tensor values, {_TRANSFORMS}, "
    "Tensor? key_feedback) -> ()",
    f"append({_tier('high', 'a')}, Tensor(b!) score, Tensor(c!) position, Tensor keys, Tensor values, Tensor scores, "
    f"SymInt[] first_positions, {_TRANSFORMS}) -> ()",
    f"unpack({_tier('tier')}, SymInt row, Tensor slots, SymInt head_dim) -> (Tensor, Tensor)",
    f"demote({_tier('high', 'a')}, Tensor(b!) score, Tensor(c!) position, {_tier('low', 'd')}, SymInt row, "
    f"Tensor slots, SymInt head_dim, {_TRANSFORMS}, Tensor? key_feedback) -> ()",
    f"score_prompt(Tensor queries, Tensor keys, Tensor? mask, {_OPTIONS}, SymInt stride, SymInt distance) -> Tensor",
    "lut_matmul(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int[] sizes) -> Tensor",
)

LIBRARY = Library("mikv", "DEF")
for _schema in _SCHEMAS:
    # kernels need contiguous channels, so strides stay as they are when the compiler lays out tensors
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def attend_results(
    queries: Tensor, keys: Tensor, high: list[Tensor], high_pages: Tensor, scored: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for the results of attend; without scores the last two are empty."""
    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if not scored:
        return output, queries.new_empty(0), queries.new_empty(0)
    rows_and_heads, capacity = keys.shape[:2], high_pages.shape[1] * high[0].shape[2] * BLOCK_TOKENS
    received_high = queries.new_empty(*rows_and_heads, capacity, dtype=torch.float32)
    received_new = queries.new_empty(*rows_and_heads, keys.shape[2], dtype=torch.float32)
    return output, received_high, received_new


def unpack_results(slots: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Tensors for the results of unpack."""
    keys = slots.new_empty(*slots.shape, head_dim, dtype=torch.float32)
    return keys, torch.empty_like(keys)


def score_prompt_result(keys: Tensor) -> Tensor:
    """A tensor for the result of score_prompt."""
    return keys.new_empty(keys.shape[:3], dtype=torch.float32)


def lut_matmul_result(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """A tensor for the result of lut_matmul; `sizes` are those of `MatmulShape.flat`."""
    return x.new_empty(*x.shape[:-1], sizes[0])


def _fake_attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, high: list[Tensor], pages: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return attend_results(queries, keys, high, pages, scored=rest[-1])


def _fake_unpack(
    tier: list[Tensor], pages: Tensor, counts: Tensor, form: list[int], row: int, slots: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    return unpack_results(slots, head_dim)


def _fake_score_prompt(queries: Tensor, keys: Tensor, *_: Any) -> Tensor:
    return score_prompt_result(keys)


def _fake_lut_matmul(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    return lut_matmul_result(x, sizes)


def _keep_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, _, sizes = inputs
    ctx.save_for_backward(codes, scales)
    ctx.sizes = sizes


def _lut_matmul_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    """Of the inputs only: codes and scales are not trained, nor is the bias."""
    codes, scales = ctx.saved_tensors
    matrix = dequantize(codes, scales, MatmulShape.of(ctx.sizes)).to(gradient.dtype)
    return gradient @ matrix, None, None, None, None


def _fake_in_place(*_: Any) -> None:
    pass


register_fake("mikv::attend", _fake_attend, lib=LIBRARY)
register_fake("mikv::pack", _fake_in_place, lib=LIBRARY)
register_fake("mikv::append", _fake_in_place, lib=LIBRARY)
register_fake("mikv::unpack", _fake_unpack, lib=LIBRARY)
register_fake("mikv::demote", _fake_in_place, lib=LIBRARY)
register_fake("mikv::score_prompt", _fake_score_prompt, lib=LIBRARY)
register_fake("mikv::lut_matmul", _fake_lut_matmul, lib=LIBRARY)
register_autograd("mikv::lut_matmul", _lut_matmul_gradient, setup_context=_keep_weights, lib=LIBRARY)
