"""Codes to bytes and back: the single description of the bit layout.

Codes are uint8 in [0, 2**bits), shape (..., N) with N a multiple of 8; bytes are uint8, shape (..., N * bits / 8).
Eight codes make one unit of `bits` bytes, a little-endian bit string with code 0 in the lowest bits:

    int4   byte 0: c1 c0        byte 1: c3 c2       ...                        (high nibble, low nibble)
    int3   24 bits: c7 c6 c5 c4 c3 c2 c1 c0 = byte 2, byte 1, byte 0           (3 bits each)
    int2   byte 0: c3 c2 c1 c0  byte 1: c7 c6 c5 c4                            (2 bits each)
    int8   byte i: ci

Knows nothing about scales, tokens or tiers.
"""

from functools import lru_cache

import torch
from torch import Tensor

UNIT = 8  # codes per unit


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes that `num_codes` codes of `bits` bits take; `num_codes` is a multiple of 8."""
    assert num_codes % UNIT == 0, num_codes
    return num_codes * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes (..., N) into uint8 bytes (..., N * bits / 8)."""
    if bits == 8:
        return codes.contiguous()
    if bits in (2, 4):
        per_byte = 8 // bits
        fields = codes.unflatten(-1, (-1, per_byte))  # (..., N / per_byte, per_byte)
        packed = fields[..., 0].clone()
        for i in range(1, per_byte):
            packed |= fields[..., i] << (bits * i)
        return packed
    fields = codes.unflatten(-1, (-1, UNIT)).int()  # (..., N / 8, 8)
    word = fields[..., 0].clone()
    for i in range(1, UNIT):
        word |= fields[..., i] << (bits * i)
    unit = torch.stack([(word >> (8 * i)) & 0xFF for i in range(bits)], dim=-1)  # (..., N / 8, bits)
    return unit.flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack uint8 bytes (..., N * bits / 8) into uint8 codes (..., N)."""
    if bits == 8:
        return packed
    if bits in (2, 4):
        mask = (1 << bits) - 1
        return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
    unit = packed.unflatten(-1, (-1, bits)).int()  # (..., N / 8, bits)
    word = unit[..., 0].clone()
    for i in range(1, bits):
        word |= unit[..., i] << (8 * i)
    mask = (1 << bits) - 1
    return torch.stack([(word >> (bits * i)) & mask for i in range(UNIT)], dim=-1).flatten(-2).to(torch.uint8)


def unpack_levels(packed: Tensor, bits: int, levels: tuple[float, ...]) -> Tensor:
    """Decode bytes straight to float32 `levels[code]`, shape (..., N): one table row per byte (int3: per 12 bits)."""
    table = _level_table(bits, levels, packed.device)
    if bits == 3:
        unit = packed.unflatten(-1, (-1, 3)).int()  # (..., N / 8, 3)
        low = unit[..., 0] | ((unit[..., 1] & 0x0F) << 8)
        high = (unit[..., 1] >> 4) | (unit[..., 2] << 4)
        index = torch.stack((low, high), dim=-1).flatten(-2)  # (..., N / 4)
    else:
        index = packed.int()
    return torch.nn.functional.embedding(index, table).flatten(-2)


@lru_cache(maxsize=64)
def _level_table(bits: int, levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Row i: the levels of the codes packed in the byte (int3: the 12-bit word) i."""
    index_bits = 12 if bits == 3 else 8
    index = torch.arange(1 << index_bits)
    codes = torch.stack([(index >> shift) & ((1 << bits) - 1) for shift in range(0, index_bits, bits)], dim=-1)
    return torch.tensor(levels, dtype=torch.float32)[codes].to(device)
