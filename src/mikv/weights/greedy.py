"""Greedy binary coding: each plane is the sign of what the planes before it left, its scale the mean magnitude of that.

Source: nuQmm / LUT-GEMM (arXiv 2206.09557), after Guo et al., "Network sketching" (2017). Worse than plain rounding at
3 and 4 bits: here for the record and as a start of other solvers.
"""

import torch
from torch import Tensor

from mikv.weights.coding import Coding, rounded


def greedy(x: Tensor, importance: Tensor, bits: int) -> Coding:
    """The coding of groups x (R, g), without offset. `importance` (R, g) weighs the mean."""
    residual, total = x.clone(), importance.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    codes, scales = torch.zeros(x.shape, dtype=torch.uint8, device=x.device), []
    for plane in range(bits):
        positive = residual >= 0
        scale = rounded((residual.abs() * importance).sum(1) / total)  # (R,)
        residual -= torch.where(positive, scale[:, None], -scale[:, None])
        codes |= positive.to(torch.uint8) << plane
        scales.append(scale)
    return Coding(codes, torch.stack(scales), None)


def greedy_with_offset(x: Tensor, importance: Tensor, bits: int) -> Coding:
    """The same around the weighted mean of each group."""
    total = importance.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    offset = rounded((x * importance).sum(1) / total)
    centred = greedy(x - offset[:, None], importance, bits)
    return Coding(centred.codes, centred.scales, offset)
