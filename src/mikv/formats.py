"""How the numbers of one tensor (keys or values) of one tier are stored: quantizers and their byte counts.

A format stores blocks of 32 tokens x (..., 32, D) float as named parts, D = head dim, U = D / 16 rounded up, g = group
size. `codes` are packed bytes (mikv.packing); `scale` and `zero` are float16. Leading axes are free. Per block:

    raw         data  (32, D)                                    exact: the model's dtype; fp16: 16-bit floats
    group       codes (U, 64*bits)  scale, zero (D/g, 32)        per-token asymmetric round-to-nearest, MiKV Eq. 1
    channel     codes (U, 64*bits)  scale, zero (1, D)           the same over 32 tokens of a channel, KIVI keys
    lloyd-max   codes (U, 64*bits)  scale       (1, 32)          symmetric Gaussian levels, one scale per token
    uniform     codes (U, 64*bits)  scale       (1, 32)          symmetric equidistant levels, one scale per token

Between the two lie quantized tokens, with which single tokens of a block can be replaced and moved: the same parts with
a token axis before the last, codes (..., T, D) one byte each, scale and zero (..., T, D/g or 1).

    x  -- quantize -->  tokens  -- pack -->  block        (encode is both)
    x  <-- dequantize --  tokens  <-- unpack --  block    (decode is both)

Knows nothing about tiers, attention or models.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mikv.arithmetic import constant
from mikv.errors import NumericsError
from mikv.packing import BLOCK_TOKENS as BLOCK_TOKENS
from mikv.packing import Lanes, pack, packed_shape, unpack, unpack_levels

QUANTIZED_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
GRIDS = ("lloyd-max", "uniform", "group", "channel")

Parts = dict[str, Tensor]
PartShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

# The non-negative levels near those that minimise the mean squared error on N(0, 1) (Max 1960, table I): integers times
# a step, so that kernels hold them exactly. Their error is .2 %, 1.0 % and 1.8 % more than that of the optimal levels.
_LLOYD_MAX_HALF = {
    2: (2, 7),
    3: (1, 3, 5, 8),
    4: (1, 3, 5, 7, 9, 12, 15, 20),
}
_LLOYD_MAX_STEP = {2: 0.21617, 3: 0.26696, 4: 0.13635}
# Step of the best equidistant levels on N(0, 1) (Max 1960, table II). Eight bits span the largest value instead.
_GAUSSIAN_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}
# Candidate scales; a finer search gains 5 % of the squared error at 4 bits and less below.
_SCALE_SEARCH = (0.75, 0.85, 0.95, 1.05)
_BINS_PER_UNIT, _NUM_BINS = 64, 256
_SMALLEST_SCALED = 2.0**-16
# What is rounded with feedback is a little larger than the token itself.
_FEEDBACK_ROOM = 1.05


class Format(Protocol):
    """Storage of blocks of 32 tokens as named parts."""

    @property
    def name(self) -> str: ...

    @property
    def grid(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    def part_shapes(self) -> PartShapes:
        """Shape and dtype of every part of a block."""

    def quantize(self, x: Tensor) -> Parts:
        """Tokens of x (..., T, D). Raises NumericsError for NaN, Inf and scales beyond 16-bit floats."""

    def dequantize(self, tokens: Parts) -> Tensor:
        """The float32 numbers (..., T, D) that quantized tokens stand for."""

    def pack(self, tokens: Parts) -> Parts:
        """The blocks of quantized tokens (..., 32, D)."""

    def unpack(self, blocks: Parts) -> Parts:
        """The inverse of `pack`."""

    def encode(self, x: Tensor) -> Parts:
        """Store x (..., 32, D) in blocks. Raises what `quantize` raises."""

    def decode(self, blocks: Parts) -> Tensor:
        """Return the stored tokens as float32 (..., 32, D)."""


@dataclass(frozen=True)
class RawFormat:
    """Floats as they are, in `dtype`."""

    name: str
    dtype: torch.dtype
    head_dim: int
    grid: str = "raw"

    @property
    def bits(self) -> int:
        """Of a number."""
        return self.dtype.itemsize * 8

    def part_shapes(self) -> PartShapes:
        return {"data": ((BLOCK_TOKENS, self.head_dim), self.dtype)}

    def quantize(self, x: Tensor) -> Parts:
        data = x.to(self.dtype)
        _require_finite(data, x, f"{self.name} values")
        return {"data": data}

    def dequantize(self, tokens: Parts) -> Tensor:
        return tokens["data"].float()

    def pack(self, tokens: Parts) -> Parts:
        return tokens

    def unpack(self, blocks: Parts) -> Parts:
        return blocks

    def encode(self, x: Tensor) -> Parts:
        return self.quantize(x)

    def decode(self, blocks: Parts) -> Tensor:
        return self.dequantize(blocks)


@dataclass(frozen=True)
class QuantizedFormat(ABC):
    """Codes of `bits` bits, packed for `lanes` (mikv.packing), and what turns levels[code] into numbers."""

    name: str
    grid: str
    bits: int
    levels: tuple[float, ...]  # what the codes stand for before scale and zero
    head_dim: int
    lanes: Lanes

    @abstractmethod
    def scale_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes per block of the parts besides the codes."""

    @abstractmethod
    def quantize(self, x: Tensor) -> Parts: ...

    @abstractmethod
    def apply_scale(self, levels: Tensor, tokens: Parts) -> Tensor:
        """Turn levels[code] (..., T, D) into numbers; may change `levels`."""

    def turned(self, part: Tensor) -> Tensor:
        """A scale or zero of tokens as it lies in a block, and back: there the token axis is the last."""
        return part.mT

    def part_shapes(self) -> PartShapes:
        scales: PartShapes = {name: (shape, torch.float16) for name, shape in self.scale_shapes().items()}
        return {"codes": (packed_shape(self.head_dim, self.bits), torch.uint8)} | scales

    def dequantize(self, tokens: Parts) -> Tensor:
        levels = torch.tensor(self.levels, dtype=torch.float32, device=tokens["codes"].device)[tokens["codes"].int()]
        return self.apply_scale(levels, tokens)

    def pack(self, tokens: Parts) -> Parts:
        scales = {name: self.turned(part) for name, part in tokens.items() if name != "codes"}
        return {"codes": pack(tokens["codes"], self.bits, self.lanes)} | scales

    def unpack(self, blocks: Parts) -> Parts:
        codes = unpack(blocks["codes"], self.bits, self.lanes)[..., : self.head_dim]
        return {"codes": codes} | self._unpack_scales(blocks)

    def encode(self, x: Tensor) -> Parts:
        return self.pack(self.quantize(x))

    def decode(self, blocks: Parts) -> Tensor:
        levels = unpack_levels(blocks["codes"], self.bits, self.lanes, self.levels)[..., : self.head_dim]
        return self.apply_scale(levels, self._unpack_scales(blocks))

    def _unpack_scales(self, blocks: Parts) -> Parts:
        return {name: self.turned(part) for name, part in blocks.items() if name != "codes"}


@dataclass(frozen=True)
class AsymmetricFormat(QuantizedFormat):
    """Per-token groups: x ~ scale * code + zero over `group_size` adjacent channels (MiKV Eq. 1)."""

    group_size: int

    def scale_shapes(self) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(("scale", "zero"), (self.head_dim // self.group_size, BLOCK_TOKENS))

    def quantize(self, x: Tensor) -> Parts:
        groups = x.float().unflatten(-1, (-1, self.group_size))  # (..., T, D/g, g)
        codes, scale, zero = _round_to_nearest(groups, self.bits, dim=-1)
        return {"codes": codes.flatten(-2), "scale": scale.squeeze(-1), "zero": zero.squeeze(-1)}

    def apply_scale(self, levels: Tensor, tokens: Parts) -> Tensor:
        groups = levels.unflatten(-1, (-1, self.group_size))  # (..., T, D/g, g)
        scale, zero = tokens["scale"].float()[..., None], tokens["zero"].float()[..., None]
        return groups.mul_(scale).add_(zero).flatten(-2)


@dataclass(frozen=True)
class ChannelFormat(QuantizedFormat):
    """Per-channel blocks: x ~ scale * code + zero over the 32 tokens of a block (KIVI, keys). Whole blocks only."""

    def scale_shapes(self) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(("scale", "zero"), (1, self.head_dim))

    def quantize(self, x: Tensor) -> Parts:
        assert x.shape[-2] == BLOCK_TOKENS, x.shape
        codes, scale, zero = _round_to_nearest(x.float(), self.bits, dim=-2)
        return {"codes": codes, "scale": scale, "zero": zero}

    def apply_scale(self, levels: Tensor, tokens: Parts) -> Tensor:
        return levels.mul_(tokens["scale"].float()).add_(tokens["zero"].float())

    def turned(self, part: Tensor) -> Tensor:
        return part


@dataclass(frozen=True)
class SymmetricFormat(QuantizedFormat):
    """One scale per token, no zero-point: x ~ scale * levels[code], for keys and values made Gaussian by a rotation."""

    initial_scale: float | None  # in units of the token's root mean square; None: the largest value is a level

    def scale_shapes(self) -> dict[str, tuple[int, int]]:
        return {"scale": (1, BLOCK_TOKENS)}

    def quantize(self, x: Tensor) -> Parts:
        x = x.float()
        scale = _to_half(self._fit_scale(x.abs()), x, "scale")
        return {"codes": self._nearest(x, scale), "scale": scale}

    def quantize_with_feedback(self, x: Tensor, feedback: Tensor) -> Parts:
        """Round the channels of x (G, ..., D) one after the other, each knowing the errors of those before it.

        feedback (G, D, D), strictly upper triangular: what an error of channel i adds to the target of channel j. The
        scale leaves some room for what is added. Not for 8 bits, whose largest value is a level.
        """
        assert self.initial_scale is not None, self.name
        x = x.float()
        scale = _to_half(_FEEDBACK_ROOM * self._fit_scale(x.abs()), x, "scale")
        target, codes = x.clone(), torch.empty_like(x, dtype=torch.uint8)
        passed_on = feedback.reshape(-1, *(1,) * (x.ndim - 2), *feedback.shape[1:])  # (G, 1 ..., D, D)
        for channel in range(self.head_dim):
            one = slice(channel, channel + 1)
            codes[..., one] = self._nearest(target[..., one], scale)
            error = x[..., one] - self.dequantize({"codes": codes[..., one], "scale": scale})
            target += error * passed_on[..., channel, :]
        return {"codes": codes, "scale": scale}

    def _nearest(self, x: Tensor, scale: Tensor) -> Tensor:
        """Codes of the levels next to x (..., T, any) in units of the stored scale (..., T, 1)."""
        magnitude = x.abs() / _nonzero(scale.float())
        half = len(self.levels) // 2
        index = torch.zeros_like(x, dtype=torch.uint8)  # of the level's magnitude
        if self.initial_scale is None:
            index = magnitude.floor_().clamp_max_(half - 1).to(torch.uint8)
        else:
            for boundary in self._boundaries:
                index += magnitude > boundary
        return torch.where(x < 0, half - 1 - index, half + index)

    def apply_scale(self, levels: Tensor, tokens: Parts) -> Tensor:
        return levels.mul_(tokens["scale"].float())

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
        candidate = torch.tensor(_SCALE_SEARCH, dtype=torch.float32, device=magnitude.device)[best[..., 0]]
        return root_mean_square * self.initial_scale * candidate * refinement

    @property
    def _boundaries(self) -> list[float]:
        """Between the non-negative levels."""
        half = self.levels[len(self.levels) // 2 :]
        return [(lower + upper) / 2 for lower, upper in pairwise(half)]


def quantized_format(name: str, grid: str, group_size: int, head_dim: int, lanes: Lanes) -> Format:
    """The format `name` ("int8" ... "int2") on `grid`; `group_size` matters for grid "group" only."""
    bits = QUANTIZED_BITS[name]
    if grid == "group":
        return AsymmetricFormat(name, grid, bits, integer_levels(bits), head_dim, lanes, group_size)
    if grid == "channel":
        return ChannelFormat(name, grid, bits, integer_levels(bits), head_dim, lanes)
    if bits == 8:
        return SymmetricFormat(name, grid, bits, equidistant_levels(bits), head_dim, lanes, None)
    if grid == "uniform":
        return SymmetricFormat(name, grid, bits, equidistant_levels(bits), head_dim, lanes, _GAUSSIAN_STEP[bits])
    assert grid == "lloyd-max", grid
    return SymmetricFormat(name, grid, bits, lloyd_max_levels(bits), head_dim, lanes, 1.0)


def raw_format(name: str, model_dtype: torch.dtype, head_dim: int) -> RawFormat:
    """`exact` in the model's dtype, `fp16` in 16-bit floats (bfloat16 for bfloat16 models)."""
    if name == "exact":
        return RawFormat(name, model_dtype, head_dim)
    return RawFormat(name, torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16, head_dim)


def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits levels of nearly the least mean squared error on N(0, 1), ascending; integers times a step."""
    half = tuple(_LLOYD_MAX_STEP[bits] * level for level in _LLOYD_MAX_HALF[bits])
    return tuple(-level for level in reversed(half)) + half


def equidistant_levels(bits: int) -> tuple[float, ...]:
    """2**bits levels with step 1 around 0, ascending."""
    return tuple(code - (2**bits - 1) / 2 for code in range(2**bits))


def integer_levels(bits: int) -> tuple[float, ...]:
    """The codes themselves."""
    return tuple(float(code) for code in range(2**bits))


@constant
def _rounding_table(levels: tuple[float, ...], initial_scale: float, device: torch.device) -> Tensor:
    """(bins, candidates): what a magnitude in a bin, in units of the root mean square, becomes under each scale."""
    middles = (torch.arange(_NUM_BINS, dtype=torch.float32, device="cpu") + 0.5) / _BINS_PER_UNIT
    scales = torch.tensor(_SCALE_SEARCH, dtype=torch.float32, device="cpu") * initial_scale
    half = torch.tensor(levels[len(levels) // 2 :], dtype=torch.float32, device="cpu")
    distance = (middles[:, None, None] - scales[:, None] * half).abs()  # (bins, candidates, levels)
    return (half[distance.argmin(-1)] * scales).to(device)


def _round_to_nearest(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes, scale and zero over `dim`, with the codes chosen for the scale and zero as stored."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = _to_half((high - low) / (2**bits - 1), x, "scale")
    zero = _to_half(low, x, "zero-point")
    codes = ((x - zero.float()) / _nonzero(scale.float())).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def too_small(x: Tensor) -> float | None:
    """The largest number of that head of x (B, G, T, D), not zero, whose 16-bit scales keep hardly a digit, if any.

    Below 2**-16 the scales of 8 bits are less than eight steps of the smallest 16-bit floats.
    """
    largest = x.abs().amax((-2, -1))  # (B, G)
    small = largest[(largest > 0) & (largest < _SMALLEST_SCALED)]
    return float(small.max()) if small.numel() else None


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
    require_finite(x)
    raise NumericsError(
        f"a {what} of {x.abs().amax():.3g} is beyond the range of 16-bit floats (65504); "
        "use high='exact' with importance_ratio=1 for this layer (skip_layers)"
    )


def require_finite(*tensors: Tensor) -> None:
    """Raise NumericsError if there are NaN or Inf among keys or values."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NumericsError("there are NaN or Inf values among the keys or values; check the model's dtype and inputs")
