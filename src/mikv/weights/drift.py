"""Weights that make up for what quantized layers before theirs have changed.

A layer sees inputs x where the exact model has y. What maps x to the exact outputs W y best is

    W + W D (H + damping)^-1,    H = mean of x x^T,    D = mean of (y - x) x^T

of which a share is taken: all of it fits the calibration text. Source: GPTAQ (arXiv 2504.02692), which does the same
inside of GPTQ; here the solvers stay as they are.
"""

import torch
from torch import Tensor

from mikv.arithmetic import own_arithmetic
from mikv.weights.calibrated import DAMPING
from mikv.weights.hessian import damped, inverse_factor

_SHARE = 0.25  # with 8,000 tokens .5 takes back what .25 gains, and 1 is worse than nothing: docs/LOG.md


@own_arithmetic
def made_up(weight: Tensor, hessian: Tensor, drift: Tensor) -> Tensor:
    """The matrix (M, K) to be quantized, from float32 W (M, K), H and D (K, K)."""
    factor = inverse_factor(damped(hessian, DAMPING))  # (H + damping)^-1 is its transpose times itself
    return torch.addmm(weight, weight @ drift @ factor.T, factor, alpha=_SHARE)
