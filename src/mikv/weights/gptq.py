"""Error compensation: columns are coded one after the other, and those still to come take up the error of each.

    for column k:   error = (w_k - nearest level) / U_kk,   columns j > k:  w_j -= error U_kj,   H^-1 = U^T U

The levels of a group of columns are fitted when its first column is reached, to the columns as they are by then.
Source: GPTQ (arXiv 2210.17323), here with any coding of the groups. Matrices are transposed, (K, M): a column of all
output rows is contiguous.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mikv.weights.coding import Coding

BLOCK = 128  # columns that are updated one by one; all later ones are updated once per block

Fit = Callable[[Tensor, Tensor], Coding]  # x (M, g), importance (M, g) -> the coding whose levels are taken


def compensated(weight: Tensor, factor: Tensor, group_size: int, fit: Fit) -> list[Coding]:
    """The codings of the groups of columns of float32 (M, K), each with R = M rows. `factor` is U.

    The importance of a column is 1 / U_kk**2: what its error costs after later columns made up for what they can.
    """
    remaining = weight.T.contiguous()  # (K, M)
    importance, codings = factor.diagonal() ** -2, []
    for start, stop in spans(0, weight.shape[1], group_size):
        x = remaining[start:stop].T.contiguous()  # (M, g)
        fitted = fit(x, importance[start:stop].expand_as(x))
        codings.append(replace(fitted, codes=_code_group(remaining, factor, start, stop, fitted)))
    return codings


def spans(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """`start` to `stop` in steps of `length`, the last as long as is left."""
    for first in range(start, stop, length):
        yield first, min(stop, first + length)


def _code_group(remaining: Tensor, factor: Tensor, start: int, stop: int, fitted: Coding) -> Tensor:
    """The codes (M, g) of a group; `remaining` (K, M) takes up their errors."""
    levels, codes = fitted.levels(), torch.empty_like(fitted.codes)
    for first, last in spans(start, stop, BLOCK):
        block, local = remaining[first:last], factor[first:last, first:last]
        errors = torch.empty_like(block)
        for k in range(last - first):
            code, value = levels.nearest(block[k, :, None])
            codes[:, first - start + k] = code[:, 0]
            errors[k] = (block[k] - value[:, 0]) / local[k, k]
            block[k + 1 :].addr_(local[k, k + 1 :], errors[k], alpha=-1)
        remaining[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return codes
