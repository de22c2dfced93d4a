"""Alternating binary coding: least squares for scales and offset given the signs, then the nearest levels, in turns.

    minimise over c    sum over columns of importance * (x - B c)^2        B = signs of the planes [and a row of ones]

Source: Xu et al., "Alternating multi-bit quantization" (ICLR 2018), as used by nuQmm / LUT-GEMM (arXiv 2206.09557); the
offset and the importance weights are additions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mikv.weights.coding import Coding, merged, rounded
from mikv.weights.greedy import greedy, greedy_with_offset
from mikv.weights.uniform import clipped_uniform

ROUNDS = 15  # as in the published implementation
_FEW_ROUNDS = 5  # with an offset: ten more bring 0.5 % of the error and take as long again
_RIDGE = 1e-6  # of the mean diagonal: holds what the signs do not determine at its present value


def alternating(x: Tensor, importance: Tensor, bits: int) -> Coding:
    """The coding of groups x (R, g) without offset, from greedy signs."""
    return alternate(x, importance, greedy(x, importance, bits), ROUNDS).canonical()


def with_offset(x: Tensor, importance: Tensor, bits: int, rounds: int = _FEW_ROUNDS) -> Coding:
    """The coding of groups x (R, g) with offset: for each group the better of two starts, greedy and uniform."""
    starts = [greedy_with_offset(x, importance, bits), clipped_uniform(x, importance, bits)]
    first, second = (alternate(x, importance, start, rounds) for start in starts)
    return merged(first, second, second.error(x, importance) < first.error(x, importance)).canonical()


def alternate(x: Tensor, importance: Tensor, start: Coding, rounds: int) -> Coding:
    """`start` after so many rounds."""
    coding = start
    for _ in range(rounds):
        coding = coding.with_scales(*least_squares(x, importance, coding))
        coding = replace(coding, codes=coding.levels().nearest(x)[0])
    return coding


def least_squares(x: Tensor, importance: Tensor, coding: Coding) -> tuple[Tensor, Tensor | None]:
    """The best scales and offsets for the signs of `coding`, rounded."""
    rows = [coding.signs(plane) for plane in range(coding.bits)]
    if coding.offset is not None:
        rows.append(torch.ones_like(x))
    basis = torch.stack(rows, 1)  # (R, q [+ 1], g)
    weighted = basis * importance[:, None]
    change = solve_ridge(weighted @ basis.mT, (weighted @ (x - coding.values())[..., None])[..., 0])
    scales = rounded(coding.scales + change[:, : coding.bits].T)
    return scales, None if coding.offset is None else rounded(coding.offset + change[:, -1])


def solve_ridge(matrix: Tensor, right: Tensor) -> Tensor:
    """The solutions of positive semidefinite systems (R, n, n) and (R, n), held near to 0 where they are singular."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    ridge = diagonal.mean(-1, keepdim=True) * _RIDGE + torch.finfo(torch.float32).tiny  # (R, 1)
    solution: Tensor = torch.linalg.solve_ex(matrix + torch.diag_embed(ridge.expand_as(diagonal)), right)[0]
    return solution
