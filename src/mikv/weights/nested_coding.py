"""One coding that serves several precisions: each reads the first planes of the same codes, with its own scales.

    P precisions of R groups each under each other, in ascending order of bits; q planes, those of the last precision

    codes   uint8    (P R, g)   P times the same
    scales  float32  (q, P R)   not negative; 0 in planes that a precision does not read
    offset  float32  (P R,)

What a coding is compared with may differ from precision to precision, as it does when each takes up its own errors.
Knows nothing about matrices and where groups lie in them.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mikv.weights.coding import Coding, signs_of

_AT_ONCE = 1024  # numbers of a precision whose nearest levels are found at once: 16 times as many errors fit a cache

Costs = tuple[tuple[int, float], ...]  # bits of every precision, ascending, and what a squared error of it costs


@dataclass(frozen=True)
class NestedLevels:
    """What the codes of each group stand for, float32 (2**q, P, R), and the roots of the precisions' costs, (P, 1)."""

    values: Tensor
    roots: Tensor
    weighted: Tensor  # values times roots

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes whose squared errors against float32 (P R, n) cost least, all precisions together; their values."""
        parts = [self._nearest(part) for part in x.split(max(1, _AT_ONCE // self.values.shape[2]), 1)]
        codes, values = (torch.cat(found, 1) for found in zip(*parts, strict=True))
        return codes, values

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, precisions, groups = self.values.shape
        weighted = x.reshape(precisions, groups, -1) * self.roots[..., None]
        costs = (self.weighted[..., None] - weighted).square_().sum(1)  # (2**q, R, n)
        code = costs.min(0).indices  # (R, n); several times as fast as argmin
        values = self.values.gather(0, code.T[:, None].expand(-1, precisions, -1))  # (n, P, R)
        return code.to(torch.uint8).repeat(precisions, 1), values.flatten(1).T


@dataclass(frozen=True)
class NestedCoding(Coding):
    """See the module."""

    costs: Costs

    @classmethod
    def of(cls, coding: Coding, costs: Costs) -> Self:
        """All precisions with the codes, scales and offsets of one coding of the most bits."""
        assert coding.offset is not None
        copies = len(costs)
        nested = cls(
            coding.codes.repeat(copies, 1), coding.scales.repeat(1, copies), coding.offset.repeat(copies), costs
        )
        return nested.with_scales(nested.scales * nested._reads(), nested.offset)

    def signs(self, plane: int) -> Tensor:
        """The signs of one plane, 0 where it is not read: so that no least squares give it a scale."""
        return signs_of(self.codes, plane) * self._reads()[plane][:, None]

    def with_scales(self, scales: Tensor, offset: Tensor | None) -> Self:
        """The same signs. A plane that one precision would turn around is left out of its group: signs are shared."""
        return replace(self, scales=scales.clamp_min(0), offset=offset)

    def levels(self) -> NestedLevels:
        """The levels of every group, by code."""
        assert self.offset is not None
        codes = torch.arange(2**self.bits, dtype=torch.uint8, device=self.scales.device)
        values = self.offset.repeat(len(codes), 1)
        for plane, scale in enumerate(self.scales):
            values += signs_of(codes, plane)[:, None] * scale
        values = values.unflatten(1, (len(self.costs), -1))
        roots = torch.tensor([cost**0.5 for _, cost in self.costs], dtype=torch.float32, device=values.device)[:, None]
        return NestedLevels(values, roots, values * roots)

    def parts(self) -> list[Coding]:
        """The coding of every precision."""
        assert self.offset is not None
        copies = len(self.costs)
        each = zip(self.codes.chunk(copies), self.scales.chunk(copies, 1), self.offset.chunk(copies), strict=True)
        return [
            Coding(codes, scales[:bits], offset)
            for (bits, _), (codes, scales, offset) in zip(self.costs, each, strict=True)
        ]

    def _reads(self) -> Tensor:
        """1 where a precision reads a plane and else 0, float32 (q, P R)."""
        bits = torch.tensor([bits for bits, _ in self.costs], dtype=torch.int64, device=self.scales.device)
        planes = torch.arange(self.bits, dtype=torch.int64, device=self.scales.device)
        return (planes[:, None] < bits).float().repeat_interleave(self.codes.shape[0] // len(self.costs), 1)
