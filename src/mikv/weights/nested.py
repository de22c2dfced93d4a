"""One set of sign planes that serves several precisions: each reads the first planes only, with its own scales.

    planes   uint8    (4, M, ceil(K / 8))       the first 2 or 3 of them are the smaller precisions
    scales   float16  (2 + 3 + 4, M, N)         of 2 bits, then of 3, then of 4
    offsets  float16  (3, M, N)

Codes are chosen for all precisions together: those whose squared errors, each precision's by its scales, cost least in
total. From uniform grids of 4 bits, scales by least squares and codes are found in turns; with a hessian, column by
column with error compensation, where later columns take up the errors of each precision apart, and then in sweeps over
the groups. Planes of one precision need not be in descending order of scale. Source of the format: AnyBCQ (arXiv
2510.10467), which freezes the planes of 2 bits and learns the scales by training instead.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mikv.arithmetic import own_arithmetic
from mikv.errors import ConfigError
from mikv.weights.alternating import alternate
from mikv.weights.calibrated import DAMPING, Layer
from mikv.weights.coding import Coding
from mikv.weights.grouping import code_matrices
from mikv.weights.nested_coding import NestedCoding
from mikv.weights.refine import refined
from mikv.weights.solve import column_importance, require_sound
from mikv.weights.uniform import clipped_uniform
from mikv.weights.weight import BCQWeight, require_group_size

PRECISIONS = (2, 3, 4)
# What squared errors of each precision cost. A bit less is four times the error: 1, 4, 16 counts all alike. With 32,
# 4 bits have 1.12 times the error of separate weights on held-out text instead of 1.23, and 3 bits 1.33 instead of 1.24
_COSTS = tuple(zip(PRECISIONS, (1.0, 4.0, 32.0), strict=True))
_ROUNDS = 5
_SWEEPS = 2


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


@own_arithmetic
def nest(weight: Tensor, group_size: int | None, hessian: Tensor | None = None) -> NestedWeight:
    """The planes for float32 (M, K), found in the metric of `hessian` (K, K) where one is given."""
    require_sound(weight, PRECISIONS[-1], hessian)
    columns = require_group_size(weight.shape[1], group_size)
    if hessian is None:
        importance = column_importance(weight, None)
        matrices = code_matrices(weight, importance, PRECISIONS[-1], columns, _without_data)
    else:
        sweep = partial(refined, sweeps=_SWEEPS, uniform=False)
        matrices = Layer(hessian, DAMPING).solve_precisions(weight, columns, _fitted, sweep, len(PRECISIONS))
    offsets = [matrix.offset for matrix in matrices if matrix.offset is not None]
    scales = torch.cat([matrix.scales for matrix in matrices])
    return NestedWeight(matrices[-1].planes, scales, torch.cat(offsets), weight.shape[1], columns)


def _without_data(x: Tensor, importance: Tensor) -> list[Coding]:
    """The codings of every precision of groups x (R, g)."""
    return _fitted(*(t.repeat(len(PRECISIONS), 1) for t in (x, importance))).parts()


def _fitted(x: Tensor, importance: Tensor) -> Coding:
    """The coding of groups x (3 R, g): what each precision is compared with, under each other."""
    of_most_bits, their_importance = (t.chunk(len(PRECISIONS))[-1] for t in (x, importance))
    grids = clipped_uniform(of_most_bits, their_importance, PRECISIONS[-1])
    return alternate(x, importance, NestedCoding.of(grids, _COSTS), _ROUNDS)
