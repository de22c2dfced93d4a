"""The bit layout: bytes written by hand, and what holds for all codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from mikv.formats import equidistant_levels, integer_levels, lloyd_max_levels
from mikv.packing import UNIT, pack, packed_bytes, unpack, unpack_levels

BITS = (2, 3, 4, 8)

# Eight codes, and their bytes as the picture in mikv.packing draws them: code 0 in the lowest bits of byte 0.
BY_HAND = {
    2: ([0, 1, 2, 3, 3, 2, 1, 0], [0b11_10_01_00, 0b00_01_10_11]),
    # 24 bits, code 7 to code 0: 000 101 010 111 100 011 010 001
    3: ([1, 2, 3, 4, 7, 2, 5, 0], [0b11_010_001, 0b0_111_100_0, 0b000_101_01]),
    4: ([0, 15, 1, 14, 2, 13, 3, 12], [0xF0, 0xE1, 0xD2, 0xC3]),
    8: ([0, 255, 1, 254, 2, 128, 127, 3], [0, 255, 1, 254, 2, 128, 127, 3]),
}


@st.composite
def codes_of_any_size(draw: DrawFn) -> tuple[int, Tensor]:
    """Bits, and random codes (..., N) with up to three leading axes, N a multiple of 8."""
    bits = draw(st.sampled_from(BITS))
    leading = draw(st.lists(st.integers(0, 3), max_size=3))
    num_units = draw(st.integers(0, 33))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    shape = (*leading, num_units * UNIT)
    return bits, torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_where_the_picture_says(bits: int) -> None:
    codes, expected = BY_HAND[bits]
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


@pytest.mark.parametrize("bits", BITS)
def test_bytes_written_by_hand_are_read_back(bits: int) -> None:
    codes, by_hand = BY_HAND[bits]
    assert unpack(torch.tensor(by_hand, dtype=torch.uint8), bits).tolist() == codes


@pytest.mark.parametrize("bits", BITS)
def test_units_follow_each_other(bits: int) -> None:
    first, second = BY_HAND[bits][0], BY_HAND[bits][0][::-1]
    both = pack(torch.tensor(first + second, dtype=torch.uint8), bits)
    alone = [pack(torch.tensor(unit, dtype=torch.uint8), bits) for unit in (first, second)]
    assert both.tolist() == torch.cat(alone).tolist()


@given(codes_of_any_size())
def test_unpack_undoes_pack(drawn: tuple[int, Tensor]) -> None:
    bits, codes = drawn
    restored = unpack(pack(codes, bits), bits)
    assert restored.dtype == torch.uint8
    assert torch.equal(restored, codes)


@given(codes_of_any_size())
def test_packed_codes_take_exactly_their_bits(drawn: tuple[int, Tensor]) -> None:
    bits, codes = drawn
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.nbytes * 8 == codes.numel() * bits
    assert packed.shape[-1] == packed_bytes(codes.shape[-1], bits)


def test_int3_takes_three_bits() -> None:
    codes = torch.full((5, 4096), 7, dtype=torch.uint8)
    assert pack(codes, 3).nbytes == 5 * 4096 * 3 // 8


@given(codes_of_any_size())
def test_packing_leaves_the_codes_alone(drawn: tuple[int, Tensor]) -> None:
    bits, codes = drawn
    before = codes.clone()
    unpack(pack(codes, bits), bits)
    assert torch.equal(codes, before)


@given(codes_of_any_size(), st.sampled_from(["integer", "equidistant", "lloyd-max"]))
def test_unpack_levels_is_a_lookup_of_unpacked_codes(drawn: tuple[int, Tensor], kind: str) -> None:
    bits, codes = drawn
    levels = {
        "integer": integer_levels,
        "equidistant": equidistant_levels,
        "lloyd-max": equidistant_levels if bits == 8 else lloyd_max_levels,
    }[kind](bits)
    packed = pack(codes, bits)
    decoded = unpack_levels(packed, bits, levels)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, torch.tensor(levels)[unpack(packed, bits).long()])


def test_strided_codes_and_bytes_are_packed_like_contiguous_ones() -> None:
    for bits in BITS:
        codes = torch.randint(0, 2**bits, (16, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).mT
        packed = pack(codes, bits)
        assert torch.equal(packed, pack(codes.contiguous(), bits))
        strided = packed.repeat_interleave(2, dim=0)[::2]
        assert torch.equal(unpack(strided, bits), codes)
        assert torch.equal(unpack_levels(strided, bits, integer_levels(bits)), codes.float())


def test_a_partial_unit_is_refused() -> None:
    with pytest.raises(AssertionError, match="12"):
        packed_bytes(12, 3)
