"""One set of sign planes that serves several precisions: each reads the first planes only, with its own scales.

    planes   uint8    (4, M, ceil(K / 8))       the first 2 or 3 of them are the smaller precisions
    scales   float16  (2 + 3 + 4, M, N)         of 2 bits, then of 3, then of 4
    offsets  float16  (3, M, N)

The first two planes are those of the method "offset"; each further one has the signs of what is left, chosen in turns
with all scales and the offset. Planes stay frozen from then on, so that those of a precision need not be in descending
order of scale. Source: AnyBCQ (arXiv 2510.10467), which learns the scales by training instead.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mikv.errors import ConfigError
from mikv.weights.alternating import least_squares, with_offset
from mikv.weights.coding import Coding, rounded
from mikv.weights.grouping import code_matrix
from mikv.weights.solve import column_importance, require_sound
from mikv.weights.weight import BCQWeight, require_group_size

PRECISIONS = (2, 3, 4)
_ROUNDS = 5


@dataclass(frozen=True)
class NestedWeight:
    """See the module."""

    planes: Tensor
    scales: Tensor
    offsets: Tensor
    in_features: int
    group_size: int

    def at(self, bits: int) -> BCQWeight:
        """The matrix in 2, 3 or 4 bits. Shares memory with this one."""
        if bits not in PRECISIONS:
            raise ConfigError(f"bits={bits} is not a precision that is stored; use one of {PRECISIONS}")
        index = PRECISIONS.index(bits)
        first = sum(PRECISIONS[:index])
        scales, offset = self.scales[first : first + bits], self.offsets[index : index + 1]
        return BCQWeight(self.planes[:bits], scales, offset, self.in_features, self.group_size)

    @property
    def num_bytes(self) -> int:
        """All that is stored."""
        return self.planes.nbytes + self.scales.nbytes + self.offsets.nbytes


def nest(weight: Tensor, group_size: int | None, hessian: Tensor | None = None) -> NestedWeight:
    """The planes for float32 (M, K), whose columns weigh by the diagonal of `hessian` where one is given."""
    require_sound(weight, PRECISIONS[-1], hessian)
    columns = require_group_size(weight.shape[1], group_size)
    importance = column_importance(weight, hessian)
    parts = [code_matrix(weight, importance, bits, columns, partial(_nested, bits=bits)) for bits in PRECISIONS]
    offsets = [part.offset for part in parts if part.offset is not None]
    scales = torch.cat([part.scales for part in parts])
    return NestedWeight(parts[-1].planes, scales, torch.cat(offsets), weight.shape[1], columns)


def _nested(x: Tensor, importance: Tensor, bits: int) -> Coding:
    """The coding of groups x (R, g), whose first planes are those that fewer bits give."""
    coding = with_offset(x, importance, PRECISIONS[0])
    while coding.bits < bits:
        coding = _with_plane(x, importance, coding)
    return coding


def _with_plane(x: Tensor, importance: Tensor, coding: Coding) -> Coding:
    """The same planes and one more."""
    residual = x - coding.values()
    total = importance.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    scale = rounded((residual.abs() * importance).sum(1) / total)
    codes = _with_signs(coding.codes, residual, coding.bits)
    grown = Coding(codes, torch.cat([coding.scales, scale[None]]), coding.offset)
    for _ in range(_ROUNDS):
        scales, offset = least_squares(x, importance, grown)
        scales = scales.clamp_min(0)  # a plane that would be turned around cannot be: it is left out of its group
        frozen = Coding(coding.codes, scales[:-1], offset)
        grown = Coding(_with_signs(coding.codes, x - frozen.values(), coding.bits), scales, offset)
    return grown


def _with_signs(codes: Tensor, residual: Tensor, plane: int) -> Tensor:
    return codes | (residual >= 0).to(torch.uint8) << plane
