"""Random weights in binary coding, for tests of their arrangement and of the products with them.

M output rows, K inputs, q planes, g inputs per group, N groups.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mikv.ops import MatmulShape, arrange
from mikv.weights.weight import BCQWeight, num_groups, pack_signs
from numerics import gaussian


@dataclass(frozen=True)
class Coded:
    """Weights as they are stored, and arranged."""

    weight: BCQWeight
    codes: Tensor
    scales: Tensor
    shape: MatmulShape

    @classmethod
    def of(cls, weight: BCQWeight) -> "Coded":
        parts = weight.planes, weight.scales, weight.offset
        codes, scales = arrange(*parts, weight.in_features, weight.group_size)
        sizes = weight.out_features, weight.in_features, weight.group_size, weight.bits, weight.bits
        return cls(weight, codes, scales, MatmulShape(*sizes, weight.is_uniform, weight.offset is not None))

    def first(self, bits: int) -> "Coded":
        """The same codes read at fewer bits, with scales of that precision."""
        weight = replace(self.weight, planes=self.weight.planes[:bits], scales=self.weight.scales[:bits] * 1.25)
        own = Coded.of(weight)
        return Coded(weight, self.codes, own.scales, replace(own.shape, planes=self.weight.bits))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the kernels compute, float64 (rows, M)."""
        product = x.double() @ self.weight.dequantize().double().T
        return product if bias is None else product + bias.double()

    def product_size(self, x: Tensor) -> float:
        """The norm that products (rows, M) of independent numbers would have: |x| |w| / sqrt(K)."""
        return float(x.double().norm() * self.weight.dequantize().double().norm()) / x.shape[-1] ** 0.5


def random_coded(
    out_features: int = 65,
    in_features: int = 576,
    bits: int = 3,
    group_size: int | None = 64,
    *,
    uniform: bool = False,
    offset: bool = False,
) -> Coded:
    """Random signs, the scales of a plane being half of those of the one before, more or less."""
    size = min(group_size or in_features, in_features)
    groups = out_features, num_groups(in_features, size)
    torch.manual_seed(bits)
    planes = pack_signs(torch.rand(bits, out_features, in_features) > 0.5)
    spread = torch.rand(bits, *groups) * 0.4 + 0.8
    scales = 0.05 * spread * 0.5 ** torch.arange(bits)[:, None, None]
    own = scales[:1] if uniform else scales.sort(0, descending=True).values
    shift = gaussian((1, *groups), 7).half() * 0.02 if offset else None
    return Coded.of(BCQWeight(planes, own.half(), shift, in_features, size))
