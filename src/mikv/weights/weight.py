"""A weight matrix in binary-coding quantization: what is stored, and what it stands for. Knows no solver and no kernel.

    w[m, k] = sum over planes i of scales[i, m, k // g] * sign[i, m, k]  +  offset[m, k // g]        sign = +1 or -1

M output rows, K input columns, q planes, g columns per group, N = ceil(K / g) groups, of which the last may be shorter.

    planes  uint8    (q, M, ceil(K / 8))   bit t of byte j is the sign of column 8 j + t: 1 is +1; bits past K are 0
    scales  float16  (q, M, N)             not negative; planes in descending order of their scales
            float16  (1, M, N)             uniform levels: plane i has scale scales[0] / 2**i, plane 0 being the largest
    offset  float16  (1, M, N) or None

Source: nuQmm / LUT-GEMM (arXiv 2206.09557), equations 2 and 3: the offset is what makes uniform grids a special case,
w = s (u - z) being scales s 2**(q-2-i) and offset s ((2**q - 1) / 2 - z).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mikv.errors import CheckpointError, ConfigError

MOST_BITS = 8
GROUP_STEP = 32  # groups are multiples of so many columns, or whole rows


@dataclass(frozen=True)
class BCQWeight:
    """See the module. `group_size` is at most K; K itself is one scale per row and plane."""

    planes: Tensor
    scales: Tensor
    offset: Tensor | None
    in_features: int
    group_size: int

    @property
    def bits(self) -> int:
        """Planes."""
        return self.planes.shape[0]

    @property
    def out_features(self) -> int:
        """Output rows M."""
        return self.planes.shape[1]

    @property
    def is_uniform(self) -> bool:
        """Whether the planes share one scale, each plane having half of the one before."""
        return self.scales.shape[0] == 1 < self.bits

    @property
    def num_bytes(self) -> int:
        """All that is stored."""
        return sum(x.nbytes for x in (self.planes, self.scales, self.offset) if x is not None)

    @property
    def bits_per_weight(self) -> float:
        """All that is stored, scales and offsets included, per weight."""
        return 8 * self.num_bytes / (self.out_features * self.in_features)

    def plane_scales(self) -> Tensor:
        """The scale of every plane, float32 (q, M, N)."""
        scales = self.scales.float()
        if not self.is_uniform:
            return scales
        return scales * 0.5 ** torch.arange(self.bits, dtype=torch.float32, device=scales.device)[:, None, None]

    def dequantize(self) -> Tensor:
        """The matrix it stands for, float32 (M, K)."""
        columns = group_of_column(self.in_features, self.group_size, self.planes.device)
        signs, scales = unpack_signs(self.planes, self.in_features), self.plane_scales()
        total = torch.zeros(self.out_features, self.in_features, dtype=torch.float32, device=self.planes.device)
        for sign, scale in zip(signs, scales, strict=True):
            total += sign * scale[:, columns]  # (M, K)
        return total if self.offset is None else total + self.offset[0].float()[:, columns]

    def require_sound(self, name: str) -> None:
        """Raise CheckpointError, naming the layer `name`, unless dtypes, shapes and values are those of the format."""
        q, m, groups = self.bits, self.out_features, num_groups(self.in_features, self.group_size)
        _require(name, "planes", self.planes, torch.uint8, (q, m, -(-self.in_features // 8)))
        _require(name, "scales", self.scales, torch.float16, ((1 if self.is_uniform else q), m, groups))
        if self.offset is not None:
            _require(name, "offset", self.offset, torch.float16, (1, m, groups))
        if not bool((self.scales >= 0).all() & self.scales.isfinite().all()):
            raise CheckpointError(f"{name}: scales are negative or not finite; the file is damaged, quantize again")
        if self.offset is not None and not bool(self.offset.isfinite().all()):
            raise CheckpointError(f"{name}: offsets are not finite; the file is damaged, quantize again")


def num_groups(in_features: int, group_size: int) -> int:
    """Groups of a row."""
    return -(-in_features // group_size)


def require_group_size(in_features: int, group_size: int | None, name: str = "group_size") -> int:
    """The columns per group: `group_size`, or whole rows if it is None or no less than they have.

    Raises ConfigError unless it is a multiple of 32 or whole rows.
    """
    if group_size is None or group_size >= in_features:
        return in_features
    if group_size < GROUP_STEP or group_size % GROUP_STEP:
        raise ConfigError(f"{name}={group_size} is not a multiple of {GROUP_STEP}; use 32, 64, 128 or None for rows")
    return group_size


def group_of_column(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """The group of every column, int64 (K,)."""
    return torch.arange(in_features, dtype=torch.int64, device=device) // group_size


def pack_signs(positive: Tensor) -> Tensor:
    """Bits of bool (..., K), True being +1, as uint8 (..., ceil(K / 8))."""
    padded = torch.nn.functional.pad(positive.to(torch.uint8), (0, -positive.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=positive.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(planes: Tensor, in_features: int) -> Tensor:
    """The signs +1 and -1 of uint8 (..., ceil(K / 8)), float32 (..., K)."""
    bits = planes[..., None] >> torch.arange(8, dtype=torch.uint8, device=planes.device) & 1
    return bits.flatten(-2)[..., :in_features].float() * 2 - 1


def _require(name: str, part: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype or tuple(x.shape) != shape:
        raise CheckpointError(
            f"{name}.{part} is {x.dtype} {tuple(x.shape)}, but {dtype} {shape} is expected; the file is damaged or of "
            "another version, quantize again"
        )
