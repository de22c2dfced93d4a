"""The solvers that know what the layer's inputs are like: GPTQ, the same on binary codings, and its refinement.

Rows are independent of each other, so that large matrices are solved some rows at a time.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mikv.weights.alternating import with_offset
from mikv.weights.coding import Coding
from mikv.weights.gptq import Fit, compensated
from mikv.weights.grouping import as_uniform, concatenated, join_groups
from mikv.weights.hessian import damped, inverse_factor
from mikv.weights.refine import refined
from mikv.weights.uniform import clipped_uniform
from mikv.weights.weight import BCQWeight

Sweep = Callable[[Tensor, Tensor, list[Coding]], list[Coding]]  # weight, metric, codings -> better codings

SWEEPS = 4  # two more bring .2 to .5 % of the error
_GPTQ_DAMPING = 0.01  # as published
DAMPING = 0.1  # finer methods fit calibration noise with less: measured on held-out text, 2,000 to 16,000 tokens
_SLICE = 2**23  # weights of the rows that are solved together


def gptq(weight: Tensor, bits: int, group_size: int, hessian: Tensor) -> BCQWeight:
    """Uniform grids, clipped where that lowers the squared error of the weights, with error compensation."""
    return as_uniform(Layer(hessian, _GPTQ_DAMPING).solve(weight, group_size, partial(_unweighted_grid, bits=bits)))


def gptq_bcq(weight: Tensor, bits: int, group_size: int, hessian: Tensor) -> BCQWeight:
    """Binary codings with offset, columns weighted by importance, with error compensation."""
    return Layer(hessian, DAMPING).solve(weight, group_size, partial(with_offset, bits=bits))


def refined_bcq(weight: Tensor, bits: int, group_size: int, hessian: Tensor) -> BCQWeight:
    """The same, then sweeps that refit scales, offsets and signs in the metric of H."""
    sweep = partial(refined, sweeps=SWEEPS, uniform=False)
    return Layer(hessian, DAMPING).solve(weight, group_size, partial(with_offset, bits=bits), sweep)


def refined_uniform(weight: Tensor, bits: int, group_size: int, hessian: Tensor) -> BCQWeight:
    """Uniform grids with error compensation, then sweeps that refit steps, offsets and codes in the metric of H."""
    sweep = partial(refined, sweeps=SWEEPS, uniform=True)
    return as_uniform(Layer(hessian, DAMPING).solve(weight, group_size, partial(clipped_uniform, bits=bits), sweep))


class Layer:
    """The metric in which a layer's weights are coded."""

    def __init__(self, hessian: Tensor, damping: float) -> None:
        self.metric = damped(hessian, damping)
        self.factor = inverse_factor(self.metric)

    def solve(self, weight: Tensor, group_size: int, fit: Fit, sweep: Sweep | None = None) -> BCQWeight:
        """The coding of float32 (M, K), from the codings of groups that `fit` finds."""
        return self.solve_precisions(weight, group_size, fit, sweep, 1)[0]

    def solve_precisions(
        self, weight: Tensor, group_size: int, fit: Fit, sweep: Sweep | None, precisions: int
    ) -> list[BCQWeight]:
        """The same where `fit` finds so many codings at once: it is given every row so often, under each other."""
        slices = []
        for rows in weight.split(max(1, _SLICE // (precisions * weight.shape[1]))):
            repeated = rows.repeat(precisions, 1)
            codings = compensated(repeated, self.factor, group_size, fit)
            if sweep is not None:
                codings = sweep(repeated, self.metric, codings)
            parts = zip(*(coding.parts() for coding in codings), strict=True)
            slices.append([join_groups(list(of_one), group_size) for of_one in parts])
        return [concatenated(list(matrices)) for matrices in zip(*slices, strict=True)]


def _unweighted_grid(x: Tensor, importance: Tensor, bits: int) -> Coding:
    return clipped_uniform(x, torch.ones_like(importance), bits)
