"""The binary coding of many groups of weights at once, while it is being found, and the nearest of its levels.

R groups of g columns each, q planes. Scales and offsets are float32 tensors whose values float16 holds: a solver
rounds them as soon as it has them, and chooses signs against what will be stored.

    codes   uint8    (R, g)    bit i is the sign in plane i: 1 is +1
    scales  float32  (q, R)    of any sign and order until `canonical`
    offset  float32  (R,) or None

Knows nothing about matrices and where groups lie in them.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from mikv.errors import NumericsError

_LARGEST = torch.finfo(torch.float16).max
_FEW_LEVELS = 16  # up to here, comparing with every bound is three times as fast as a binary search


class Choice(Protocol):
    """What chooses codes."""

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes for float32 (R, n), and the values they stand for."""


@dataclass(frozen=True)
class Levels:
    """The values that the codes of each group stand for, in ascending order: float32 (R, 2**q), uint8 (R, 2**q)."""

    values: Tensor
    codes: Tensor
    bounds: Tensor  # between neighbours, (R, 2**q - 1)

    def rank(self, x: Tensor) -> Tensor:
        """Which level is nearest to each of float32 (R, n), int64; of two as near the upper: sign(0) is +1."""
        if self.values.shape[1] > _FEW_LEVELS or x.shape[1] == 1:
            return torch.searchsorted(self.bounds, x.contiguous(), right=True)
        rank = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        for bound in self.bounds.unbind(1):
            rank += x >= bound[:, None]
        return rank.long()

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and the values of the levels nearest to float32 (R, n)."""
        rank = self.rank(x)
        return self.codes.gather(1, rank), self.values.gather(1, rank)


@dataclass(frozen=True)
class Coding:
    """See the module."""

    codes: Tensor
    scales: Tensor
    offset: Tensor | None

    @property
    def bits(self) -> int:
        """Planes."""
        return self.scales.shape[0]

    def signs(self, plane: int) -> Tensor:
        """The signs of one plane, float32 (R, g)."""
        return signs_of(self.codes, plane)

    def with_scales(self, scales: Tensor, offset: Tensor | None) -> Self:
        """The same signs with other scales and offsets."""
        return replace(self, scales=scales, offset=offset)

    def levels(self) -> Choice:
        """The levels of every group."""
        return levels_of(self.scales, self.offset)

    def values(self) -> Tensor:
        """What the codes stand for, float32 (R, g)."""
        total = torch.zeros(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        for plane, scale in enumerate(self.scales):
            total += scale[:, None] * signs_of(self.codes, plane)
        return total if self.offset is None else total + self.offset[:, None]

    def error(self, x: Tensor, importance: Tensor) -> Tensor:
        """The weighted squared error of every group against x (R, g), float32 (R,)."""
        return ((self.values() - x).square_() * importance).sum(1)

    def parts(self) -> list["Coding"]:
        """All codings that this stands for, as they are stored: one, but for nested precision."""
        return [self.canonical()]

    def canonical(self) -> "Coding":
        """The same values with no negative scale, and planes in descending order of scale."""
        codes = self.codes.clone()
        for plane, scale in enumerate(self.scales):
            codes ^= (scale < 0).to(torch.uint8)[:, None] << plane
        scales, order = self.scales.abs().sort(dim=0, descending=True, stable=True)
        ordered = torch.zeros_like(codes)
        for plane, source in enumerate(order):
            ordered |= (codes >> source.to(torch.uint8)[:, None] & 1) << plane
        return Coding(ordered, scales, self.offset)


def levels_of(scales: Tensor, offset: Tensor | None) -> Levels:
    """The levels that scales (q, R) and offsets (R,) make."""
    q = scales.shape[0]
    codes = torch.arange(2**q, dtype=torch.uint8, device=scales.device)
    values = torch.zeros(scales.shape[1], 2**q, dtype=torch.float32, device=scales.device)
    for plane, scale in enumerate(scales):
        values += scale[:, None] * signs_of(codes, plane)
    if offset is not None:
        values += offset[:, None]
    values, order = values.sort(dim=1, stable=True)
    return Levels(values, codes[order], (values[:, 1:] + values[:, :-1]) / 2)


def signs_of(codes: Tensor, plane: int) -> Tensor:
    """The signs +1 and -1 of one plane of uint8 codes, float32 of the same shape."""
    return (codes >> plane & 1).float() * 2 - 1


def halving(bits: int, device: torch.device) -> Tensor:
    """1, 1/2, 1/4, ...: the scales of the planes of uniform codings as shares of the first, float32 (q,)."""
    return 0.5 ** torch.arange(bits, dtype=torch.float32, device=device)


def rounded(x: Tensor) -> Tensor:
    """Float32 rounded to what float16 holds. Raises NumericsError if it holds no number near to some."""
    if not bool((x.abs() <= _LARGEST).all()):
        raise NumericsError("a scale or offset does not fit 16 bits; scale the weights down or leave the layer out")
    return x.half().float()


def merged(first: Coding, second: Coding, choose_second: Tensor) -> Coding:
    """Of each group the first or, where bool (R,) says so, the second of two codings."""
    offset = None
    if first.offset is not None and second.offset is not None:
        offset = torch.where(choose_second, second.offset, first.offset)
    codes = torch.where(choose_second[:, None], second.codes, first.codes)
    return Coding(codes, torch.where(choose_second, second.scales, first.scales), offset)
