"""mikv's product with binary-coded weights in `mikv bench matmul`: the path that it chooses, and each one forced."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from mikv import ops
from mikv.bench.matmul_plan import DIFFERENT_ROWS, repeat_rows
from mikv.ops import matmul, native
from mikv.ops.matmul import MatmulShape
from mikv.weights.module import shape_of
from mikv.weights.solve import solve
from mikv.weights.weight import BCQWeight

PATHS = {"mikv": 0, "mikv_lut": 1, "mikv_bytes": 2}  # 0 is what the library chooses
METHOD = "offset"  # a scale per plane and an offset: the format with most numbers to read, found without calibration


@dataclass
class MikvWeight:
    """Sign planes, scales and offsets, arranged for the kernels."""

    codes: Tensor
    scales: Tensor
    shape: MatmulShape
    path: int
    dtype = torch.float32

    @property
    def bytes(self) -> int:
        """Codes, scales and offsets."""
        return self.codes.nbytes + self.scales.nbytes

    @classmethod
    def build(cls, weights: Tensor, bits: int, group_size: int, path: int) -> Self:
        """Only rows that differ are solved."""
        m, k = weights.shape
        coded = solve(weights[:DIFFERENT_ROWS], bits, group_size, METHOD)
        planes, scales = (repeat_rows(part, m, 1) for part in (coded.planes, coded.scales))
        offset = None if coded.offset is None else repeat_rows(coded.offset, m, 1)
        weight = BCQWeight(planes, scales, offset, k, coded.group_size)
        return cls(*ops.arrange(planes, scales, offset, k, coded.group_size), shape_of(weight), path)

    def product(self, activations: Tensor) -> Callable[[], Tensor]:
        """The operation, or the kernel itself on the path that is asked for."""
        if not self.path:
            return partial(ops.lut_matmul, activations, self.codes, self.scales, None, self.shape)
        assert native.module is not None
        multiply, num_threads = native.module.matmul, torch.get_num_threads()
        tensors = (activations, self.codes, self.scales)
        output = torch.empty(len(activations), self.shape.out_features)

        def forced() -> Tensor:
            capsules = [x.__dlpack__() for x in tensors]
            multiply(*capsules, None, self.shape.flat, self.path, num_threads, output.__dlpack__())
            return output

        return forced

    def exact(self) -> Tensor:
        """What planes, scales and offsets stand for."""
        return matmul.dequantize(self.codes, self.scales, self.shape).double()

    def copy(self) -> Self:
        """Other codes and scales."""
        return replace(self, codes=self.codes.clone(), scales=self.scales.clone())


def why_unavailable(path: int) -> str | None:
    """Why the path cannot be forced, or None."""
    if not path or hasattr(native.module, "matmul"):
        return None
    return f"needs mikv's native kernels: {native.reason}"
