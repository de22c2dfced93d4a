"""Uniform coding: rounding to a grid of 2**q evenly spaced levels, clipped where that lowers the error.

The grid of a group, of step s around its centre o, is a binary coding: scales s / 2 * (2**(q-1), ..., 2, 1), offset o.
"""

import torch
from torch import Tensor

from mikv.weights.coding import Coding, halving, rounded

_SHARES = [1 - 0.02 * i for i in range(36)]  # of the range that are tried: 1 ... 0.3


def clipped_uniform(x: Tensor, importance: Tensor, bits: int) -> Coding:
    """The grid of groups x (R, g) with the least weighted squared error, of 36 that are ever narrower."""
    lowest, highest = x.amin(1), x.amax(1)
    best_share = torch.ones_like(lowest)
    least = torch.full_like(lowest, torch.inf)
    for share in _SHARES:
        _, error = _round_to_grid(x, lowest * share, highest * share, bits)
        error = (error.square_() * importance).sum(1)
        best_share = torch.where(error < least, share, best_share)
        least = torch.minimum(error, least)
    return uniform(x, lowest * best_share, highest * best_share, bits)


def uniform(x: Tensor, lowest: Tensor, highest: Tensor, bits: int) -> Coding:
    """Groups x (R, g) rounded to the grids of 2**bits levels from `lowest` to `highest`, (R,)."""
    codes, _ = _round_to_grid(x, lowest, highest, bits)
    largest, centre = _grid(lowest, highest, bits)
    scales = largest * halving(bits, x.device)[:, None]
    return Coding(_reversed_bits(codes, bits), scales, centre)


def _grid(lowest: Tensor, highest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The scale of the largest plane and the centre, as they will be stored."""
    largest = rounded((highest - lowest) * (2 ** (bits - 2) / (2**bits - 1)))
    return largest, rounded((highest + lowest) / 2)


def _round_to_grid(x: Tensor, lowest: Tensor, highest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The levels 0 ... 2**bits - 1 nearest to x, as whole float32 numbers, and the errors, both (R, g)."""
    largest, centre = _grid(lowest, highest, bits)
    step, middle = (largest / 2 ** (bits - 2))[:, None], (2**bits - 1) / 2
    scaled = (x - centre[:, None]) / step.clamp_min(torch.finfo(torch.float32).tiny)
    codes = (scaled + (middle + 0.5)).floor_().clamp_(0, 2**bits - 1)  # ties go up: sign(0) is +1
    return codes, torch.addcmul(centre[:, None], codes - middle, step).sub_(x)


def _reversed_bits(codes: Tensor, bits: int) -> Tensor:
    """The codes in the order of planes: the highest bit, of the largest scale, is in plane 0."""
    whole = codes.to(torch.uint8)
    reverse = torch.zeros_like(whole)
    for plane in range(bits):
        reverse |= (whole >> (bits - 1 - plane) & 1) << plane
    return reverse
