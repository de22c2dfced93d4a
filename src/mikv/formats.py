"""How the numbers of one tensor (keys or values) of one tier are stored: quantizers and their byte counts.

A format turns tokens x (..., T, D) float into named parts and back. `codes` are packed bytes; `scale` and `zero` are
float16. Leading axes are free. Four layouts exist, D = head dim, g = group size:

    raw         data  (T, D)                                        exact: the model's dtype; fp16: 16-bit floats
    group       codes (T, D*bits/8)  scale, zero (T, D/g)           per-token asymmetric round-to-nearest, MiKV Eq. 1
    channel     codes (T, D*bits/8)  scale, zero (1, D)             the same over 32 tokens of a channel, KIVI keys
    lloyd-max   codes (T, D*bits/8)  scale       (T, 1)             symmetric Gaussian levels, one scale per token
    uniform     codes (T, D*bits/8)  scale       (T, 1)             symmetric equidistant levels, one scale per token

Knows nothing about tiers, attention or models.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mikv.errors import NumericsError
from mikv.packing import pack, packed_bytes, unpack_levels

BLOCK_TOKENS = 32  # tokens of one low-tier block, and of one per-channel group

QUANTIZED_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
GRIDS = ("lloyd-max", "uniform", "group", "channel")

Parts = dict[str, Tensor]
PartShapes = dict[str, tuple[tuple[int, int], torch.dtype]]

# Levels that minimise the mean squared error on N(0, 1) (Max 1960, table I), the non-negative half.
_LLOYD_MAX_HALF = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
# Step of the best equidistant levels on N(0, 1) (Max 1960, table II). Eight bits span the largest value instead.
_GAUSSIAN_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}
# Candidate scales; a finer search gains 5 % of the squared error at 4 bits and less below.
_SCALE_SEARCH = (0.75, 0.85, 0.95, 1.05)
_BINS_PER_UNIT, _NUM_BINS = 64, 256


class Format(Protocol):
    """Storage of tokens (..., T, D) as named parts."""

    @property
    def name(self) -> str: ...

    def part_shapes(self, num_tokens: int, head_dim: int) -> PartShapes:
        """Shape and dtype of every part for `num_tokens` tokens of `head_dim` channels."""

    def encode(self, x: Tensor) -> Parts:
        """Store x (..., T, D). Raises NumericsError for NaN, Inf and scales beyond 16-bit floats."""

    def decode(self, parts: Parts) -> Tensor:
        """Return the stored tokens as float32 (..., T, D)."""


@dataclass(frozen=True)
class RawFormat:
    """Floats as they are, in `dtype`."""

    name: str
    dtype: torch.dtype

    def part_shapes(self, num_tokens: int, head_dim: int) -> PartShapes:
        return {"data": ((num_tokens, head_dim), self.dtype)}

    def encode(self, x: Tensor) -> Parts:
        data = x.to(self.dtype)
        _require_finite(data, x, f"{self.name} values")
        return {"data": data}

    def decode(self, parts: Parts) -> Tensor:
        return parts["data"].float()


@dataclass(frozen=True)
class AsymmetricFormat:
    """Per-token groups: x ~ scale * code + zero over `group_size` adjacent channels (MiKV Eq. 1)."""

    name: str
    bits: int
    group_size: int

    def part_shapes(self, num_tokens: int, head_dim: int) -> PartShapes:
        num_groups = head_dim // self.group_size
        return {
            "codes": ((num_tokens, packed_bytes(head_dim, self.bits)), torch.uint8),
            "scale": ((num_tokens, num_groups), torch.float16),
            "zero": ((num_tokens, num_groups), torch.float16),
        }

    def encode(self, x: Tensor) -> Parts:
        groups = x.float().unflatten(-1, (-1, self.group_size))  # (..., T, D/g, g)
        codes, scale, zero = _round_to_nearest(groups, self.bits, dim=-1)
        return {"codes": pack(codes.flatten(-2), self.bits), "scale": scale.squeeze(-1), "zero": zero.squeeze(-1)}

    def decode(self, parts: Parts) -> Tensor:
        codes = unpack_levels(parts["codes"], self.bits, integer_levels(self.bits))
        groups = codes.unflatten(-1, (-1, self.group_size))  # (..., T, D/g, g)
        scale, zero = parts["scale"].float()[..., None], parts["zero"].float()[..., None]
        return groups.mul_(scale).add_(zero).flatten(-2)


@dataclass(frozen=True)
class ChannelFormat:
    """Per-channel blocks: x ~ scale * code + zero over the 32 tokens of a block (KIVI, keys)."""

    name: str
    bits: int

    def part_shapes(self, num_tokens: int, head_dim: int) -> PartShapes:
        assert num_tokens == BLOCK_TOKENS, num_tokens
        return {
            "codes": ((num_tokens, packed_bytes(head_dim, self.bits)), torch.uint8),
            "scale": ((1, head_dim), torch.float16),
            "zero": ((1, head_dim), torch.float16),
        }

    def encode(self, x: Tensor) -> Parts:
        assert x.shape[-2] == BLOCK_TOKENS, x.shape
        codes, scale, zero = _round_to_nearest(x.float(), self.bits, dim=-2)
        return {"codes": pack(codes, self.bits), "scale": scale, "zero": zero}

    def decode(self, parts: Parts) -> Tensor:
        codes = unpack_levels(parts["codes"], self.bits, integer_levels(self.bits))
        return codes.mul_(parts["scale"].float()).add_(parts["zero"].float())


@dataclass(frozen=True)
class SymmetricFormat:
    """One scale per token, no zero-point: x ~ scale * levels[code], for keys and values made Gaussian by a rotation."""

    name: str
    bits: int
    levels: tuple[float, ...]
    initial_scale: float | None  # in units of the token's root mean square; None: the largest value is a level

    def part_shapes(self, num_tokens: int, head_dim: int) -> PartShapes:
        return {
            "codes": ((num_tokens, packed_bytes(head_dim, self.bits)), torch.uint8),
            "scale": ((num_tokens, 1), torch.float16),
        }

    def encode(self, x: Tensor) -> Parts:
        x = x.float()
        scale = _to_half(self._fit_scale(x.abs()), x, "scale")
        magnitude = x.abs() / _nonzero(scale.float())
        half = len(self.levels) // 2
        index = torch.zeros_like(x, dtype=torch.uint8)  # of the level's magnitude
        if self.initial_scale is None:
            index = magnitude.floor_().clamp_max_(half - 1).to(torch.uint8)
        else:
            for boundary in self._boundaries:
                index += magnitude > boundary
        codes = torch.where(x < 0, half - 1 - index, half + index)
        return {"codes": pack(codes, self.bits), "scale": scale}

    def _fit_scale(self, magnitude: Tensor) -> Tensor:
        """The scale (..., T, 1) of least squared error for magnitudes (..., T, D): a search, then one refinement.

        The search sees magnitudes in bins of 1/64 of the root mean square; a table says what each becomes under each
        candidate scale.
        """
        if self.initial_scale is None:
            return magnitude.amax(-1, keepdim=True) / self.levels[-1]
        root_mean_square = magnitude.square().mean(-1, keepdim=True).sqrt()  # (..., T, 1)
        relative = magnitude / _nonzero(root_mean_square)
        bins = (relative * _BINS_PER_UNIT).int().clamp_(0, _NUM_BINS - 1)  # NaN too gets a bin; its scale is refused
        table = _rounding_table(self.levels, self.initial_scale, magnitude.device)
        rounded = torch.nn.functional.embedding(bins, table)  # (..., T, D, candidates)
        best = (rounded - relative[..., None]).square_().sum(-2).argmin(-1)[..., None, None]  # (..., T, 1, 1)
        nearest = rounded.gather(-1, best.expand(*rounded.shape[:-1], 1))[..., 0]  # (..., T, D)
        refinement = (relative * nearest).sum(-1, keepdim=True) / nearest.square().sum(-1, keepdim=True)
        candidate = torch.tensor(_SCALE_SEARCH, device=magnitude.device)[best[..., 0]]
        return root_mean_square * self.initial_scale * candidate * refinement

    @property
    def _boundaries(self) -> list[float]:
        """Between the non-negative levels."""
        half = self.levels[len(self.levels) // 2 :]
        return [(lower + upper) / 2 for lower, upper in pairwise(half)]

    def decode(self, parts: Parts) -> Tensor:
        return unpack_levels(parts["codes"], self.bits, self.levels).mul_(parts["scale"].float())


def quantized_format(name: str, grid: str, group_size: int) -> Format:
    """The format `name` ("int8" ... "int2") on `grid`; `group_size` matters for grid "group" only."""
    bits = QUANTIZED_BITS[name]
    if grid == "group":
        return AsymmetricFormat(name, bits, group_size)
    if grid == "channel":
        return ChannelFormat(name, bits)
    if bits == 8:
        return SymmetricFormat(name, bits, equidistant_levels(bits), None)
    if grid == "uniform":
        return SymmetricFormat(name, bits, equidistant_levels(bits), _GAUSSIAN_STEP[bits])
    assert grid == "lloyd-max", grid
    return SymmetricFormat(name, bits, lloyd_max_levels(bits), 1.0)


def raw_format(name: str, model_dtype: torch.dtype) -> RawFormat:
    """`exact` in the model's dtype, `fp16` in 16-bit floats (bfloat16 for bfloat16 models)."""
    if name == "exact":
        return RawFormat(name, model_dtype)
    return RawFormat(name, torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16)


def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits levels of least mean squared error on N(0, 1), ascending."""
    half = _LLOYD_MAX_HALF[bits]
    return tuple(-level for level in reversed(half)) + half


def equidistant_levels(bits: int) -> tuple[float, ...]:
    """2**bits levels with step 1 around 0, ascending."""
    return tuple(code - (2**bits - 1) / 2 for code in range(2**bits))


def integer_levels(bits: int) -> tuple[float, ...]:
    """The codes themselves."""
    return tuple(float(code) for code in range(2**bits))


@lru_cache(maxsize=32)
def _rounding_table(levels: tuple[float, ...], initial_scale: float, device: torch.device) -> Tensor:
    """(bins, candidates): what a magnitude in a bin, in units of the root mean square, becomes under each scale."""
    middles = (torch.arange(_NUM_BINS) + 0.5) / _BINS_PER_UNIT
    scales = torch.tensor(_SCALE_SEARCH) * initial_scale
    half = torch.tensor(levels[len(levels) // 2 :])
    distance = (middles[:, None, None] - scales[:, None] * half).abs()  # (bins, candidates, levels)
    return (half[distance.argmin(-1)] * scales).to(device)


def _round_to_nearest(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes, scale and zero over `dim`, with the codes chosen for the scale and zero as stored."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = _to_half((high - low) / (2**bits - 1), x, "scale")
    zero = _to_half(low, x, "zero-point")
    codes = ((x - zero.float()) / _nonzero(scale.float())).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def _nonzero(scale: Tensor) -> Tensor:
    """A divisor: constant groups and all-zero tokens have scale 0 and any divisor gives them code 0."""
    return torch.where(scale == 0, 1.0, scale)


def _to_half(value: Tensor, x: Tensor, what: str) -> Tensor:
    half = value.half()
    _require_finite(half, x, what)
    return half


def _require_finite(stored: Tensor, x: Tensor, what: str) -> None:
    if torch.isfinite(stored).all():
        return
    if not torch.isfinite(x).all():
        raise NumericsError("there are NaN or Inf values among the keys or values; check the model's dtype and inputs")
    raise NumericsError(
        f"a {what} of {x.abs().amax():.3g} is beyond the range of 16-bit floats (65504); "
        "use high='exact' with importance_ratio=1 for this layer (skip_layers)"
    )
