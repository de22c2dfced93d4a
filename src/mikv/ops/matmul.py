"""Weights in binary coding as kernels read them, and multiplication by them in PyTorch, the kernels' readable twin.

M output rows, K inputs, q sign planes, g inputs per group, N groups, of which the last may be shorter. Knows what
`mikv.weights` stores, planes (q, M, ceil(K / 8)), scales (q or 1, M, N) and offset (1, M, N) or None, but nothing about
how they were found.

Arranged, output rows lie in tiles of 64, missing ones having scale 0:

    codes   uint8 (tiles, bytes per tile)  groups; of a group planes; of a plane byte columns of 8 inputs, each of 64
                                           bytes: byte 2 i + h is row 32 h + i of the tile
    scales  float16 (tiles, N, n, 64)      the planes' scales, or the one that they share; then the offset
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from mikv.arithmetic import own_arithmetic

TILE_ROWS = 64
_BYTE_INPUTS = 8


@dataclass(frozen=True)
class MatmulShape:
    """The sizes of an arranged matrix.

    planes      that codes hold
    bits        planes that are read, the first ones: nested precision. `scales` are those of this precision
    uniform     whether the planes share one scale, each having half of the one before
    has_offset  whether the last scale is an offset
    """

    out_features: int
    in_features: int
    group_size: int
    planes: int
    bits: int
    uniform: bool
    has_offset: bool
    flat: tuple[int, int, int, int, int, int, int] = field(init=False, repr=False, compare=False)  # the above, in order

    def __post_init__(self) -> None:
        sizes = (self.out_features, self.in_features, self.group_size, self.planes, self.bits)
        # kept, because it is read in every call; not a cached_property, whose lock the compiler cannot trace
        object.__setattr__(self, "flat", (*sizes, int(self.uniform), int(self.has_offset)))

    @classmethod
    def of(cls, flat: Sequence[int]) -> "MatmulShape":
        """The inverse of `flat`."""
        out_features, in_features, group_size, planes, bits, uniform, has_offset = flat
        return cls(out_features, in_features, group_size, planes, bits, bool(uniform), bool(has_offset))

    @property
    def num_scales(self) -> int:
        """Numbers per row and group: n."""
        return (1 if self.uniform else self.bits) + self.has_offset


@own_arithmetic
def arrange(
    planes: Tensor, scales: Tensor, offset: Tensor | None, in_features: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Codes (tiles, bytes per tile) and scales (tiles, N, n, 64) as the kernels read them; see the module."""
    rows = pad(planes, (0, 0, 0, -planes.shape[1] % TILE_ROWS))  # (q, 64 tiles, ceil(K / 8))
    columns = rows.unflatten(1, (-1, 2, TILE_ROWS // 2)).permute(1, 0, 4, 3, 2)  # (tiles, q, ceil(K / 8), 32, 2)
    tiles = columns.shape[0]
    groups = columns.split(_group_bytes(in_features, group_size), dim=2)
    codes = torch.cat([group.reshape(tiles, -1) for group in groups], dim=1)
    numbers = scales if offset is None else torch.cat([scales, offset])  # (n, M, N)
    padded = pad(numbers, (0, 0, 0, -numbers.shape[1] % TILE_ROWS)).unflatten(1, (-1, TILE_ROWS))
    return codes, padded.permute(1, 3, 0, 2).contiguous()


def restore(codes: Tensor, scales: Tensor, shape: MatmulShape) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `arrange`: all planes, scales, and offset."""
    group_bytes = _group_bytes(shape.in_features, shape.group_size)
    sizes = [size * shape.planes * TILE_ROWS for size in group_bytes]
    groups = [
        group.view(-1, shape.planes, size, TILE_ROWS // 2, 2)
        for group, size in zip(codes.split(sizes, dim=1), group_bytes, strict=True)
    ]
    columns = torch.cat(groups, dim=2).permute(1, 0, 4, 3, 2)  # (q, tiles, 2, 32, ceil(K / 8))
    planes = columns.flatten(1, 3)[:, : shape.out_features].contiguous()
    numbers = scales.permute(2, 0, 3, 1).flatten(1, 2)[:, : shape.out_features].contiguous()  # (n, M, N)
    return (planes, numbers[:-1], numbers[-1:]) if shape.has_offset else (planes, numbers, None)


def dequantize(codes: Tensor, scales: Tensor, shape: MatmulShape) -> Tensor:
    """The matrix that the first `shape.bits` planes stand for, float32 (M, K)."""
    planes, scales, offset = restore(codes, scales, shape)
    groups = torch.arange(shape.in_features, dtype=torch.int64, device=codes.device) // shape.group_size
    bit = torch.arange(_BYTE_INPUTS, dtype=torch.uint8, device=codes.device)
    matrix = torch.zeros(shape.out_features, shape.in_features, dtype=torch.float32, device=codes.device)
    if offset is not None:
        matrix += offset[0].float()[:, groups]
    for plane in range(shape.bits):
        ones = (planes[plane, :, :, None] >> bit & 1).flatten(1)[:, : shape.in_features]  # (M, K)
        scale = scales[0].float() * 0.5**plane if shape.uniform else scales[plane].float()
        matrix += (2.0 * ones - 1.0) * scale[:, groups]
    return matrix


def lut_matmul(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, shape: MatmulShape) -> Tensor:
    """x (..., K) times the transposed matrix, plus bias (M,): (..., M) in the dtype of x. Sums are float32."""
    total = linear(x.float(), dequantize(codes, scales, shape), None if bias is None else bias.float())
    return total.to(x.dtype)


def _group_bytes(in_features: int, group_size: int) -> list[int]:
    """Byte columns of every group."""
    starts = range(0, in_features, group_size)
    return [-(-min(group_size, in_features - start) // _BYTE_INPUTS) for start in starts]
