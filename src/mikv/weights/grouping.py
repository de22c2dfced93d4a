"""A matrix as groups that a solver codes, and the coded groups as a matrix. A slice of rows at a time: solvers need
some fifty bytes per weight while they work, and the largest matrices have 10**8.

M output rows, K input columns, g columns per group, N groups per row; R = M N groups, row after row. A last group that
is shorter is padded with columns of importance 0.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mikv.weights.coding import Coding
from mikv.weights.weight import BCQWeight, num_groups, pack_signs

Solver = Callable[[Tensor, Tensor], Coding]  # x (R, g), importance (R, g)

_SLICE = 2**17  # weights, or levels where these are more: what stays in a processor's cache


def code_matrix(weight: Tensor, importance: Tensor, bits: int, group_size: int, solver: Solver) -> BCQWeight:
    """The binary coding that `solver` finds for float32 (M, K) whose columns have an importance, float32 (K,)."""
    return code_matrices(weight, importance, bits, group_size, lambda x, weights: [solver(x, weights)])[0]


def code_matrices(
    weight: Tensor, importance: Tensor, bits: int, group_size: int, solver: Callable[[Tensor, Tensor], list[Coding]]
) -> list[BCQWeight]:
    """The same where `solver` finds several codings at once, of up to `bits` planes."""
    parts = []
    for rows in _row_slices(weight, bits, group_size):
        codings = solver(*_grouped(rows, importance, group_size))
        parts.append([_ungrouped(coding, rows, group_size) for coding in codings])
    return [concatenated(list(matrices)) for matrices in zip(*parts, strict=True)]


def join_groups(codings: list[Coding], group_size: int) -> BCQWeight:
    """The matrix whose groups of columns, all rows of each, are coded so."""
    scales = torch.stack([coding.scales for coding in codings], -1)  # (q, M, N)
    offsets = [coding.offset for coding in codings if coding.offset is not None]
    offset = torch.stack(offsets, -1).flatten() if offsets else None
    codes = torch.cat([coding.codes for coding in codings], 1)  # (M, K)
    return _weight(codes, Coding(codes, scales.flatten(1), offset), codes.shape[0], group_size)


def concatenated(parts: list[BCQWeight]) -> BCQWeight:
    """The rows of several matrices under each other."""
    offsets = [part.offset for part in parts if part.offset is not None]
    return BCQWeight(
        torch.cat([part.planes for part in parts], 1),
        torch.cat([part.scales for part in parts], 1),
        torch.cat(offsets, 1) if offsets else None,
        parts[0].in_features,
        group_size=parts[0].group_size,
    )


def _ungrouped(coding: Coding, rows: Tensor, group_size: int) -> BCQWeight:
    """The coding of the groups of rows (m, K) as a matrix."""
    codes = coding.codes.reshape(rows.shape[0], -1)[:, : rows.shape[1]]  # (m, K)
    return _weight(codes, coding, rows.shape[0], group_size)


def _weight(codes: Tensor, coding: Coding, out_features: int, group_size: int) -> BCQWeight:
    """Codes (M, K) and the scales and offsets of `coding`, group after group, row after row."""
    planes = torch.stack([pack_signs((codes >> plane & 1).bool()) for plane in range(coding.bits)])
    scales = coding.scales.reshape(coding.bits, out_features, -1).half()
    offset = None if coding.offset is None else coding.offset.reshape(1, out_features, -1).half()
    return BCQWeight(planes, scales, offset, codes.shape[1], group_size)


def as_uniform(weight: BCQWeight) -> BCQWeight:
    """The same matrix, whose scales halve from plane to plane, with the first plane's scales only."""
    return BCQWeight(weight.planes, weight.scales[:1], weight.offset, weight.in_features, weight.group_size)


def _grouped(rows: Tensor, importance: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The groups of rows (m, K) and their importance, both (m N, g)."""
    groups = num_groups(rows.shape[1], group_size)
    padding = (0, groups * group_size - rows.shape[1])
    x = torch.nn.functional.pad(rows, padding).reshape(-1, group_size)
    weights = torch.nn.functional.pad(importance, padding).reshape(groups, group_size)
    return x, weights.expand(rows.shape[0], groups, group_size).reshape(-1, group_size)


def _row_slices(weight: Tensor, bits: int, group_size: int) -> Iterator[Tensor]:
    levels = num_groups(weight.shape[1], group_size) * 2**bits
    return iter(weight.split(max(1, _SLICE // max(weight.shape[1], levels))))
