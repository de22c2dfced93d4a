"""PyTorch's products as peers of `mikv bench matmul`: linear layers in its dtypes, and its packed 4-bit weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from mikv.bench.matmul_weight import Grid
from mikv.errors import ConfigError

_INT4_GROUPS = (32, 64, 128, 256)


@dataclass
class TorchLinear:
    """A plain matrix."""

    weights: Tensor

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.weights.dtype

    @classmethod
    def build(cls, weights: Tensor, dtype: torch.dtype) -> Self:
        """A copy of the weights in `dtype`."""
        return cls(weights.to(dtype, copy=True))

    def product(self, activations: Tensor) -> Callable[[], Tensor]:
        """linear."""
        return partial(linear, activations, self.weights)

    def exact(self) -> Tensor:
        """In float64."""
        return self.weights.double()

    def copy(self) -> Self:
        """Other weights."""
        return replace(self, weights=self.weights.clone())


@dataclass
class TorchInt4:
    """`_weight_int4pack_mm_for_cpu`, which torchao calls: 4-bit codes, a bfloat16 scale and zero per group."""

    packed: Tensor
    scales_and_zeros: Tensor  # (N, M, 2)
    grid: Grid
    dtype = torch.bfloat16

    @property
    def bytes(self) -> int:
        """Codes, scales and zeros."""
        return self.packed.nbytes + self.scales_and_zeros.nbytes

    @classmethod
    def build(cls, weights: Tensor, group_size: int) -> Self:
        """Raises ConfigError for shapes that the operation does not take."""
        m, k = weights.shape
        if group_size not in _INT4_GROUPS or k % group_size or m % 16:
            raise ConfigError(
                f"takes groups of {', '.join(map(str, _INT4_GROUPS))} that divide --k and --m in multiples of 16"
            )
        grid = Grid.of(weights, 4, group_size)
        zeros = (8 - grid.zeros.float()) * grid.scales
        packed = torch._convert_weight_to_int4pack_for_cpu(grid.codes.flatten(1).int(), 1)
        return cls(packed, torch.stack((grid.scales, zeros), 2).transpose(0, 1).contiguous().bfloat16(), grid)

    def product(self, activations: Tensor) -> Callable[[], Tensor]:
        """The operation."""
        group_size = self.grid.codes.shape[2]
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return partial(multiply, activations, self.packed, group_size, self.scales_and_zeros)

    def exact(self) -> Tensor:
        """With the scales and zeros as they are stored."""
        scales, zeros = self.scales_and_zeros.double().transpose(0, 1).unbind(2)  # (M, N)
        return ((self.grid.codes.double() - 8) * scales[..., None] + zeros[..., None]).flatten(1)

    def copy(self) -> Self:
        """Other codes and scales."""
        return replace(self, packed=self.packed.clone(), scales_and_zeros=self.scales_and_zeros.clone())
