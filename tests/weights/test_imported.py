"""Uniform formats of others stand for the same weights afterwards: the equivalence that LUT-GEMM states, checked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mikv.errors import CheckpointError, ConfigError, NumericsError
from mikv.weights.imported import from_q4_0, from_q4_1, from_uniform
from mikv.weights.weight import unpack_signs


def drawn(seed: int, rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // 32)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3).half()
    return codes, scale, torch.randint(0, 2**bits, (rows, groups), generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 6), st.integers(1, 100), st.integers(1, 8))
def test_scale_times_code_minus_zero_is_a_binary_coding(seed: int, rows: int, columns: int, bits: int) -> None:
    codes, scale, zero = drawn(seed, rows, columns, bits)
    group_size = 32 if columns > 32 else None
    coded = from_uniform(codes, scale, zero, bits, group_size)
    coded.require_sound("layer")
    columns_of = torch.arange(columns) // 32
    wanted = (scale.double()[:, columns_of]) * (codes.double() - zero.double()[:, columns_of])

    # in float64, with the offset before it is stored, the identity is exact to the last bits
    signs = unpack_signs(coded.planes, columns).double()
    planes = sum(scale.double()[:, columns_of] * 2.0 ** (bits - 2 - i) * signs[i] for i in range(bits))
    offset = scale.double() * ((2**bits - 1) / 2 - zero.double())
    torch.testing.assert_close(planes + offset[:, columns_of], wanted, rtol=1e-14, atol=1e-14)

    # as stored: the rounding of one float16 number, and of a float32 sum
    rounding = (
        (offset.half().double() - offset).abs()[:, columns_of] + wanted.abs() * 1e-6 + scale.max() * 2.0**bits * 1e-7
    )
    assert bool(((coded.dequantize().double() - wanted).abs() <= rounding).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_in_the_middle_is_imported_bit_for_bit(bits: int) -> None:
    codes, scale, _ = drawn(bits, 7, 96, bits)
    coded = from_uniform(codes, scale, torch.full(scale.shape, 2 ** (bits - 1)), bits, 32)
    wanted = scale.float().repeat_interleave(32, 1) * (codes.float() - 2 ** (bits - 1))
    assert torch.equal(coded.dequantize(), wanted)


def blocks_of(header: list[Tensor], quants: Tensor) -> Tensor:
    """GGUF's bytes: float16 numbers (M, N) each, then 16 bytes of codes, (M, N, 16)."""
    return torch.cat([*(x.half()[..., None].view(torch.uint8) for x in header), quants], -1).flatten(1)


@pytest.mark.parametrize(("kind", "read"), [("Q4_0", from_q4_0), ("Q4_1", from_q4_1)])
def test_gguf_blocks_stand_for_what_the_gguf_package_reads(kind: str, read) -> None:
    gguf = pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(0)
    scale, minimum = torch.randn(2, 6, 3, generator=generator).half() * 0.01
    quants = torch.randint(0, 256, (6, 3, 16), generator=generator, dtype=torch.uint8)
    blocks = blocks_of([scale] if kind == "Q4_0" else [scale, minimum], quants)
    wanted = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))
    found = read(blocks, 96)
    found.require_sound("layer")
    if kind == "Q4_0":
        assert torch.equal(found.dequantize(), wanted)
        return
    centre = (minimum.double() + 7.5 * scale.double()).repeat_interleave(32, 1)
    assert bool(((found.dequantize() - wanted).abs() <= (centre.half() - centre).abs() + 1e-7).all())


def test_scales_below_the_range_of_float16_cost_an_offset_half_of_its_smallest_step() -> None:
    steps = torch.cat([torch.arange(1, 2048), torch.arange(2048, 4096, 2)])  # of 2**-24; above 2**-13 they are even
    scale = (steps * 2.0**-24).half()[:, None]
    assert torch.equal(scale.double()[:, 0], steps * 2.0**-24)
    quants = torch.randint(0, 256, (len(steps), 1, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = torch.cat([quants & 15, quants >> 4], -1).flatten(1).double()
    coded = from_q4_0(blocks_of([scale], quants), 32)
    assert torch.equal(coded.scales[0].double(), 4 * scale.double()), "scales are exact"
    off = (coded.dequantize().double() - scale.double() * (codes - 8)).abs().amax(1)
    is_odd = (steps % 2 == 1) & (steps < 2**11)
    assert torch.equal(off, is_odd * 2.0**-25)
    one = from_uniform(torch.zeros(1, 32, dtype=torch.uint8), scale[:1], torch.ones(1, 1), 1, 32)
    assert torch.equal(one.scales, torch.zeros(1, 1, 1).half()), "half of the smallest step is lost"


def test_damaged_input_is_refused() -> None:
    codes, scale, zero = drawn(0, 2, 64, 3)
    with pytest.raises(CheckpointError, match="codes reach 7, but 2 bits end at 3"):
        from_uniform(codes.fill_(7), scale, zero, 2, 32)
    with pytest.raises(CheckpointError, match="twice"):
        from_uniform(codes, scale[:, :1], zero, 3, 32)
    with pytest.raises(ConfigError, match="bits=9"):
        from_uniform(codes, scale, zero, 9, 32)
    with pytest.raises(NumericsError, match="negative"):
        from_uniform(codes, -scale, zero, 3, 32)
    with pytest.raises(CheckpointError, match="36"):
        from_q4_0(torch.zeros(2, 35, dtype=torch.uint8), 64)
    with pytest.raises(CheckpointError, match="in_features=40"):
        from_q4_1(torch.zeros(2, 35, dtype=torch.uint8), 40)
    with pytest.raises(NumericsError, match="not finite"):
        from_q4_0(torch.full((2, 36), 255, dtype=torch.uint8), 64)
