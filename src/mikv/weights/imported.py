"""Uniform formats of others as binary codings: what they stand for, plane by plane.

    w = s (u - z) = sum over planes of s 2**(q-2-i) sign_i + s ((2**q - 1) / 2 - z)        u = 0 ... 2**q - 1

The identity of LUT-GEMM (arXiv 2206.09557) is exact in real numbers. In float16 the scale s 2**(q-2) is s
with another exponent, exact unless it overflows; the offset is rounded once, to one float16 number, and exact whenever
2 z is whole and s ((2**q - 1) / 2 - z) needs no more than 11 bits. A zero in the middle, z = 2**(q-1), gives the offset
-s / 2: GGUF's Q4_0, and symmetric GPTQ or AWQ, are imported bit for bit, if no scale is below 2**-13 = 1.2e-4. Q4_1
stores its minimum in place of the zero: the offset is min + 15 s / 2, rounded once.

Below 2**-13 float16 has steps of 2**-24 and halves of them are lost: where s is an odd number of such steps, the offset
-s / 2 is off by 2**-25 = 3e-8, and of 1 bit the scale s / 2 as well. Scales of 2 bits and more are multiples of s and
stay exact, subnormal ones too.
"""

import torch
from torch import Tensor

from mikv.errors import CheckpointError, ConfigError, NumericsError
from mikv.weights.coding import rounded
from mikv.weights.weight import MOST_BITS, BCQWeight, num_groups, pack_signs, require_group_size

_GGUF_COLUMNS = 32  # of a block: its scale, for Q4_1 its minimum, then 16 bytes of codes


def from_uniform(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int | None) -> BCQWeight:
    """The matrix scale * (codes - zero), as RTN, GPTQ and AWQ store it.

    Args:
        codes: uint8 (M, K), below 2**bits
        scale: (M, N), not negative
        zero: (M, N), whole or not
        bits: of the codes, 1 to 8
        group_size: columns that share a scale and zero, None being whole rows

    """
    columns = require_group_size(codes.shape[1], group_size)
    _require_matching(codes, scale, zero, bits, columns)
    middle = (2**bits - 1) / 2
    return _uniform(codes, scale.double(), scale.double() * (middle - zero.double()), bits, columns)


def from_q4_0(blocks: Tensor, in_features: int) -> BCQWeight:
    """GGUF Q4_0, uint8 (M, K / 32 * 18): w = d (u - 8). Bit for bit, but off by up to 2**-25 where |d| < 2**-13."""
    scale, _, codes = _read_blocks(blocks, in_features, header_bytes=2)
    negative = scale < 0  # GGUF's scales have a sign; d (u - 8) = -d ((15 - u) - 7)
    flipped = negative.repeat_interleave(_GGUF_COLUMNS, 1)
    return _uniform(torch.where(flipped, 15 - codes, codes), scale.abs(), scale * -0.5, 4, _GGUF_COLUMNS)


def from_q4_1(blocks: Tensor, in_features: int) -> BCQWeight:
    """GGUF Q4_1, uint8 (M, K / 32 * 20): w = d u + m. Exact but for the rounding of m + 15 d / 2 to float16."""
    scale, minimum, codes = _read_blocks(blocks, in_features, header_bytes=4)
    flipped = (scale < 0).repeat_interleave(_GGUF_COLUMNS, 1)
    offset = minimum + scale * 7.5
    return _uniform(torch.where(flipped, 15 - codes, codes), scale.abs(), offset, 4, _GGUF_COLUMNS)


def _uniform(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int) -> BCQWeight:
    """Levels around `offset`, in steps of `scale`, both float64 (M, N)."""
    planes = torch.stack([pack_signs((codes >> (bits - 1 - plane) & 1).bool()) for plane in range(bits)])
    largest = rounded((scale * 2.0 ** (bits - 2)).float()).half()[None]  # (1, M, N)
    return BCQWeight(planes, largest, rounded(offset.float()).half()[None], codes.shape[1], group_size)


def _read_blocks(blocks: Tensor, in_features: int, header_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """First and last float16 of each block's header as float64 (M, N), and the codes, uint8 (M, K)."""
    if in_features % _GGUF_COLUMNS:
        raise CheckpointError(f"in_features={in_features} is not a multiple of a GGUF block's {_GGUF_COLUMNS} columns")
    row_bytes = in_features // _GGUF_COLUMNS * (header_bytes + 16)
    if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] != row_bytes:
        raise CheckpointError(
            f"blocks are {blocks.dtype} {tuple(blocks.shape)}, not uint8 with {row_bytes} bytes a row"
        )
    block = blocks.unflatten(1, (-1, header_bytes + 16))  # (M, N, bytes)
    header = block[..., :header_bytes].contiguous().view(torch.float16).double()  # (M, N, 1 or 2)
    if not bool(header.isfinite().all()):
        raise NumericsError("a scale or minimum of the GGUF blocks is not finite; is the file whole?")
    quants = block[..., header_bytes:]  # low halves are columns 0 to 15, high halves 16 to 31
    codes = torch.cat([quants & 15, quants >> 4], -1).flatten(1)
    return header[..., 0], header[..., -1], codes


def _require_matching(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> None:
    if not 1 <= bits <= MOST_BITS:
        raise ConfigError(f"bits={bits} is not one of 1 to {MOST_BITS}")
    groups = (codes.shape[0], num_groups(codes.shape[1], group_size))
    if codes.dtype != torch.uint8 or tuple(scale.shape) != groups or tuple(zero.shape) != groups:
        raise CheckpointError(
            f"codes are {codes.dtype} {tuple(codes.shape)}, scale {tuple(scale.shape)}, zero {tuple(zero.shape)}; "
            f"uint8 and twice {groups} are expected"
        )
    if int(codes.max()) >= 2**bits:
        raise CheckpointError(f"codes reach {int(codes.max())}, but {bits} bits end at {2**bits - 1}")
    if not bool((scale >= 0).all() & scale.isfinite().all() & zero.isfinite().all()):
        raise NumericsError("scales are negative or not finite, or zeros are not finite")
