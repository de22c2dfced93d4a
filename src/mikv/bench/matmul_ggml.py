"""llama.cpp's products as peers of `mikv bench matmul`, in the formats that its users load."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from mikv.errors import ConfigError

if TYPE_CHECKING:
    from mikv.bench.ggml import Weights

TYPES = {"Q2_K": (10, 2), "Q3_K": (11, 3), "Q4_0": (2, 4), "Q4_K": (12, 4)}  # number in ggml, bits of a code
_BLOCKS = {"Q4_0": 32}
_USUAL_BLOCK = 256


@dataclass
class GgmlWeight:
    """Blocks of one of ggml's types; activations are rounded to 8 bits by the product itself."""

    codes: Tensor
    kind: int
    in_features: int
    weights: "Weights" = field(repr=False)
    dtype = torch.float32

    @property
    def bytes(self) -> int:
        """All blocks."""
        return self.codes.nbytes

    @classmethod
    def build(cls, weights: Tensor, name: str) -> Self:
        """Quantized by ggml. Raises ConfigError if rows are not whole blocks."""
        from mikv.bench import ggml

        (kind, _), block, k = TYPES[name], _BLOCKS.get(name, _USUAL_BLOCK), weights.shape[1]
        if k % block:
            raise ConfigError(f"takes rows in blocks of {block}, and --k {k} is no multiple of that")
        codes = ggml.quantize(weights, kind)
        return cls(codes, kind, k, ggml.Weights(codes, kind, k))

    def product(self, activations: Tensor) -> Callable[[], Tensor]:
        """A graph of one product."""
        return self.weights.product(activations)

    def exact(self) -> Tensor:
        """As ggml itself dequantizes."""
        from mikv.bench import ggml

        return ggml.dequantize(self.codes, self.kind, self.in_features).double()

    def copy(self) -> Self:
        """The blocks once more in ggml's memory."""
        from mikv.bench import ggml

        again = ggml.Weights(self.codes, self.kind, self.in_features)
        return type(self)(self.codes, self.kind, self.in_features, again)
