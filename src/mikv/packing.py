"""Codes to bytes and back: the single description of the bit layout, which csrc/layout.h repeats in C++.

Codes are uint8 in [0, 2**bits) for blocks of 32 tokens, shape (..., 32, D). A block is packed in units of 16 channels,
bytes (..., U, 64 * bits) with U = D / 16 rounded up; the channels that are missing have code 0. A unit is cut into 8
quads q of 64 bytes, byte 4 * lane + i of a quad belongs to lane 0..15:

    lanes "tokens" (keys)        token = 16 * (quad / 4) + lane    channel = 4 * (quad % 4) + i
    lanes "channels" (values)    token = 4 * quad + i              channel = lane

and the quads are packed into raw vectors of 64 bytes, byte by byte:

    int8   raw[j] = q[j]
    int4   raw[j] = q[2j] | q[2j+1] << 4
    int3   raw[j] = q[2j] | q[2j+1] << 4 | bit j of q[6] << 3 | bit j of q[7] << 7        (j = 0, 1, 2)
    int2   raw[j] = q[4j] | q[4j+1] << 2 | q[4j+2] << 4 | q[4j+3] << 6

Knows nothing about scales or tiers.
"""

from typing import Literal

import torch
from torch import Tensor

from mikv.arithmetic import constant

BLOCK_TOKENS = 32
UNIT_CHANNELS = 16
_VECTOR_BYTES = 64
_QUADS = 8

Lanes = Literal["tokens", "channels"]


def packed_shape(head_dim: int, bits: int) -> tuple[int, int]:
    """The bytes (U, 64 * bits) that a block's codes take."""
    return -(-head_dim // UNIT_CHANNELS), _VECTOR_BYTES * bits


def pack(codes: Tensor, bits: int, lanes: Lanes) -> Tensor:
    """Pack uint8 codes (..., 32, D) into uint8 bytes (..., U, 64 * bits)."""
    quads = _to_quads(codes, lanes)  # (..., U, 8, 64)
    fields = quads.unflatten(-2, (-1, _fields(bits)))  # (..., U, raw vectors, fields, 64)
    raw = fields[..., 0, :]
    for i in range(1, _fields(bits)):
        raw = raw | (fields[..., i, :] << (8 // _fields(bits) * i))
    if bits == 3:  # the fourth vector's bits go to the free ones of the other three
        last = raw[..., 3:, :]
        spread = torch.cat([(last >> j & 0x11) << 3 for j in range(3)], dim=-2)
        raw = raw[..., :3, :] | spread
    return raw.flatten(-2)


def unpack(packed: Tensor, bits: int, lanes: Lanes) -> Tensor:
    """Unpack uint8 bytes (..., U, 64 * bits) into uint8 codes (..., 32, 16 * U)."""
    raw = _raw_vectors(packed, bits)[..., None]  # (..., U, raw vectors, 64, 1)
    width = 8 // _fields(bits)
    if width == 8:
        return _from_fields(raw, lanes)
    mask = (1 << width) - 1
    fields = torch.cat([raw >> shift & mask for shift in range(0, 8, width)], dim=-1)
    return _from_fields(fields, lanes)


def unpack_levels(packed: Tensor, bits: int, lanes: Lanes, levels: tuple[float, ...]) -> Tensor:
    """Decode bytes (..., U, 64 * bits) straight to float32 `levels[code]`, shape (..., 32, 16 * U)."""
    if bits == 8:  # levels of step 1, always; a table is slower than a sum
        return unpack(packed, bits, lanes).float().add_(levels[0])
    table = _level_table(_fields(bits), levels, packed.device)  # one row per byte
    return _from_fields(torch.nn.functional.embedding(_raw_vectors(packed, bits).int(), table), lanes)


def _fields(bits: int) -> int:
    """Codes per byte, the stray bits of int3 left out."""
    return {8: 1, 4: 2, 3: 2, 2: 4}[bits]


def _to_quads(codes: Tensor, lanes: Lanes) -> Tensor:
    """(..., 32, D) -> (..., U, 8, 64)."""
    padding = -codes.shape[-1] % UNIT_CHANNELS
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    *leading, _, channels = codes.shape
    units = channels // UNIT_CHANNELS
    if lanes == "tokens":
        axes = codes.reshape(-1, 2, 16, units, 4, 4).permute(0, 3, 1, 4, 2, 5)  # unit, quad / 4, quad % 4, lane, i
    else:
        axes = codes.reshape(-1, _QUADS, 4, units, 16).permute(0, 3, 1, 4, 2)  # unit, quad, lane, i
    return axes.reshape(*leading, units, _QUADS, _VECTOR_BYTES)


def _from_fields(fields: Tensor, lanes: Lanes) -> Tensor:
    """What the fields of every byte say, (..., U, raw vectors, 64, fields) -> (..., 32, 16 * U)."""
    *leading, units, vectors, _, per_byte = fields.shape
    if lanes == "tokens":
        axes = fields.reshape(-1, units, 2, vectors // 2, 16, 4, per_byte).permute(0, 2, 4, 1, 3, 6, 5)
    else:
        axes = fields.reshape(-1, units, vectors, 16, 4, per_byte).permute(0, 2, 5, 4, 1, 3)
    return axes.reshape(*leading, BLOCK_TOKENS, units * UNIT_CHANNELS)


def _raw_vectors(packed: Tensor, bits: int) -> Tensor:
    """(..., U, 64 * bits) -> (..., U, raw vectors, 64) with whole fields: int3 is brought into the form of int4."""
    raw = packed.unflatten(-1, (bits, _VECTOR_BYTES))
    if bits != 3:
        return raw
    first, second, third = (raw[..., j, :] & 0x88 for j in range(3))
    last = first >> 3 | second >> 2 | third >> 1
    return torch.cat((raw & 0x77, last[..., None, :]), dim=-2)


@constant
def _level_table(fields: int, levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Row i: the levels of the codes packed in byte i."""
    width = 8 // fields
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    codes = torch.stack([byte >> shift & ((1 << width) - 1) for shift in range(0, 8, width)], dim=-1)
    known = codes.clamp_max(len(levels) - 1)  # no other codes are ever packed
    return torch.tensor(levels, dtype=torch.float32, device="cpu")[known].to(device)
