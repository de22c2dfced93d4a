"""Token embeddings with binary-coded weights, V rows of K, and the output head that reads the same rows.

The weights exist once: the embedding holds them, a tied head refers to it.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mikv import ops
from mikv.errors import UnsupportedModelError
from mikv.ops import MatmulShape
from mikv.ops.matmul import TILE_ROWS
from mikv.weights.module import BCQModule
from mikv.weights.weight import BCQWeight


class NoWeightError(UnsupportedModelError, AttributeError):
    """A quantized embedding was asked for its weights, as `resize_token_embeddings` does. `hasattr` answers no."""

    def __init__(self) -> None:
        super().__init__(
            "the token embedding is quantized, so it has no `weight` that could be resized, tied or copied; do that "
            "before quantizing, or call model.dequantize() first"
        )


class BCQEmbedding(BCQModule):
    """Takes the place of `torch.nn.Embedding`; answers in `output_dtype`, which follows the model's."""

    def __init__(
        self, shape: MatmulShape, *, bias: nn.Parameter | None = None, precisions: tuple[int, ...] = ()
    ) -> None:
        super().__init__(shape, bias=bias, precisions=precisions)
        self.num_embeddings, self.embedding_dim = shape.out_features, shape.in_features
        self.output_dtype = torch.get_default_dtype()

    def forward(self, tokens: Tensor) -> Tensor:
        """The rows of tokens (...): (..., K). Raises IndexError for tokens beyond the vocabulary, as torch does."""
        if not torch.compiler.is_compiling() and tokens.device.type == "cpu" and tokens.numel():
            least, most = (int(token) for token in tokens.aminmax())
            if least < 0 or most >= self.num_embeddings:
                wrong = least if least < 0 else most
                raise IndexError(f"token {wrong} is not in the vocabulary of {self.num_embeddings}")
        return self._rows(self.arrange(), tokens.flatten()).view(*tokens.shape, self.embedding_dim)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise NoWeightError
        return super().__getattr__(name)

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., K) times every row, as an output head does: (..., V)."""
        return ops.lut_matmul(x, self.arrange(), getattr(self, self._scales), bias, self.shape)

    def _rows(self, codes: Tensor, rows: Tensor) -> Tensor:
        """Some rows (n,) of the matrix, (n, K)."""
        tiles, places = rows // TILE_ROWS, rows % TILE_ROWS
        half = TILE_ROWS // 2
        bytes_of_row = codes.unflatten(1, (-1, TILE_ROWS))[tiles, :, 2 * (places % half) + places // half]
        numbers = getattr(self, self._scales)[tiles, :, :, places].permute(2, 0, 1)  # (scales, n, N)
        return _dequantize(bytes_of_row, numbers, self.shape).to(self.output_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = self.planes.device if self.codes is None and self.planes is not None else "cpu"
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype, device=device)).dtype
        return super()._apply(fn, recurse)


class TiedHead(nn.Module):
    """An output head without weights of its own: x (..., K) -> (..., V)."""

    bias: nn.Parameter | None

    def __init__(self, embedding: BCQEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple it is no submodule: its weights are counted and saved once
        self.in_features, self.out_features = embedding.in_features, embedding.out_features
        self.register_parameter("bias", bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise NoWeightError
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., V)."""
        return self._embedding[0].project(x, self.bias)


def _dequantize(codes: Tensor, numbers: Tensor, shape: MatmulShape) -> Tensor:
    """Rows (n, K) from their bytes (n, bytes), groups of planes, and their numbers (scales, n, N)."""
    whole, size = divmod(shape.in_features, shape.group_size)[0], shape.group_size // 8
    num_whole = whole * shape.planes * size
    parts = [codes[:, :num_whole].unflatten(1, (whole, shape.planes, size))]  # (n, groups, q, bytes)
    if codes.shape[1] > num_whole:
        parts.append(codes[:, num_whole:].unflatten(1, (1, shape.planes, -1)))
    planes = torch.cat([part.permute(2, 0, 1, 3).flatten(2) for part in parts], dim=2)  # (q, n, ceil(K / 8))
    scales, offset = (numbers[:-1], numbers[-1:]) if shape.has_offset else (numbers, None)
    return BCQWeight(planes[: shape.bits], scales, offset, shape.in_features, shape.group_size).dequantize()
