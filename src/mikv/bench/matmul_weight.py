"""What a matrix product benchmark needs of a matrix that is stored in some format, and the plain rounding of peers.

M outputs, K inputs, N groups of g inputs per output. `exact` is what the stored numbers stand for, so that the distance
to it is the kernel's own error and not that of the format.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class StoredWeight(Protocol):
    """A matrix in the format of one kernel."""

    @property
    def bytes(self) -> int:
        """What one product has to read of it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations that the kernel takes."""

    def product(self, activations: Tensor) -> Callable[[], Tensor]:
        """What computes the product with these activations (rows, K) of `dtype`: (rows, M). This call is timed."""

    def exact(self) -> Tensor:
        """The matrix, float64 (M, K)."""

    def copy(self) -> Self:
        """The same in other memory."""


@dataclass(frozen=True)
class Grid:
    """Weights rounded to 2**bits evenly spaced numbers per group, from its smallest to its largest; 0 is one of them.

    codes uint8 (M, N, g), scales float32 (M, N), zeros uint8 (M, N); a weight is (code - zero) * scale.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    in_features: int

    @classmethod
    def of(cls, weights: Tensor, bits: int, group_size: int) -> Self:
        """The plain rounding that exporters of such formats do by default; the last group is filled up with zeros."""
        k = weights.shape[1]
        groups = torch.nn.functional.pad(weights, (0, -k % group_size)).unflatten(1, (-1, group_size))  # (M, N, g)
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
        zeros = (-low / scales).round()
        codes = (groups / scales[..., None]).round().add(zeros[..., None]).clamp(0, 2**bits - 1)
        return cls(codes.to(torch.uint8), scales, zeros.to(torch.uint8), k)

    def exact(self) -> Tensor:
        """The matrix, float64 (M, K)."""
        levels = self.codes.double() - self.zeros.double()[..., None]
        return (levels * self.scales.double()[..., None]).flatten(1)[:, : self.in_features]
