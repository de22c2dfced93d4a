"""Weights as kernels read them: their arrangement, the product in PyTorch, and the operation as PyTorch sees it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from coded_weights import Coded, random_coded
from mikv import ops
from mikv.ops import matmul
from numerics import assert_close, gaussian

GROUPS = (32, 96, 128, None)
OPERATION = torch.ops.mikv.lut_matmul.default


@given(
    st.integers(1, 200), st.integers(1, 300), st.integers(1, 8), st.sampled_from(GROUPS), st.booleans(), st.booleans()
)
def test_restore_is_the_inverse_of_arrange(
    m: int, k: int, bits: int, group: int | None, uniform: bool, off: bool
) -> None:
    coded = random_coded(m, k, bits, group, uniform=uniform, offset=off)
    planes, scales, offset = ops.restore(coded.codes, coded.scales, coded.shape)
    assert torch.equal(planes, coded.weight.planes)
    assert torch.equal(scales, coded.weight.scales)
    assert (offset is None) == (coded.weight.offset is None)
    assert offset is None or torch.equal(offset, coded.weight.offset)


def test_a_byte_lies_where_the_layout_says() -> None:
    coded = random_coded(130, 200, 3, 96)
    plane, row, column = 2, 64 + 32 + 5, 22  # tile 1, half 1, row 5; group 1 has columns 12 to 23 of 25
    place = 12 * 3 * 64 + plane * 12 * 64 + (column - 12) * 64 + 2 * 5 + 1
    assert coded.codes[1, place] == coded.weight.planes[plane, row, column]
    assert coded.scales[1, 1, plane, 32 + 5] == coded.weight.scales[plane, row, 1]


def test_rows_that_fill_up_a_tile_have_scale_0() -> None:
    coded = random_coded(65, 64, 2, 32, offset=True)
    assert coded.scales.shape == (2, 2, 3, 64)
    assert not coded.scales[1, :, :, 1:].any()


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_dequantized_weights_are_those_that_are_stored(group: int | None, uniform: bool) -> None:
    coded = random_coded(70, 200, 4, group, uniform=uniform, offset=True)
    dequantized = matmul.dequantize(coded.codes, coded.scales, coded.shape)
    assert_close(dequantized, coded.weight.dequantize(), "float32", op="dequantize", form=f"g={group}")


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_fewer_bits_are_the_first_planes_with_scales_of_their_own(bits: int) -> None:
    nested = random_coded(70, 200, 4, 32, offset=True).first(bits)
    dequantized = matmul.dequantize(nested.codes, nested.scales, nested.shape)
    assert_close(dequantized, nested.weight.dequantize(), "float32", op="dequantize", form=f"{bits} of 4 bits")


def test_the_product_in_pytorch_is_that_with_dequantized_weights() -> None:
    coded, x, bias = random_coded(), gaussian((2, 3, 576), 1), gaussian((65,), 2)
    expected = linear(x, coded.weight.dequantize(), bias)
    product = matmul.lut_matmul(x, coded.codes, coded.scales, bias, coded.shape)
    assert_close(product, expected, "float32", op="lut_matmul in PyTorch")
    half = matmul.lut_matmul(x.half(), coded.codes, coded.scales, None, coded.shape)
    assert half.dtype == torch.float16


def test_a_shape_is_its_integers() -> None:
    shape = random_coded(uniform=True).shape
    assert matmul.MatmulShape.of(shape.flat) == shape
    assert replace(shape, has_offset=True).num_scales == shape.num_scales + 1 == 2


# --- the operation --------------------------------------------------------------------------------------------------


def arguments(coded: Coded, x: torch.Tensor) -> tuple[object, ...]:
    return x, coded.codes, coded.scales, gaussian((coded.shape.out_features,), 3), list(coded.shape.flat)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_operation_is_what_pytorch_expects_of_one(requires_grad: bool) -> None:
    x = gaussian((2, 5, 96), 1).requires_grad_(requires_grad)
    torch.library.opcheck(OPERATION, arguments(random_coded(in_features=96), x))


def test_the_compiler_traces_it_without_a_break() -> None:
    coded, x = random_coded(), gaussian((1, 1, 576), 1)

    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.lut_matmul(x * 2, coded.codes, coded.scales, None, coded.shape) + 1

    with torch.no_grad():
        assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


def test_inputs_get_the_gradient_of_the_product() -> None:
    coded, x = random_coded(), gaussian((4, 576), 1).requires_grad_()
    direction = gaussian((4, 65), 2)
    ops.lut_matmul(x, coded.codes, coded.scales, None, coded.shape).backward(direction)
    assert x.grad is not None
    assert_close(x.grad, direction @ coded.weight.dequantize(), "float32", op="gradient of lut_matmul")


@pytest.mark.parametrize("shape", [(576,), (0, 576), (2, 3, 1, 1, 2, 1, 576)])
def test_inputs_have_any_axes(shape: tuple[int, ...]) -> None:
    coded, x = random_coded(), gaussian(shape, 1)
    product = ops.lut_matmul(x, coded.codes, coded.scales, None, coded.shape)
    assert product.shape == (*shape[:-1], 65)
    rows = ops.lut_matmul(x.reshape(-1, 576), coded.codes, coded.scales, None, coded.shape)
    assert torch.equal(product.reshape(-1, 65), rows)


def test_inputs_may_be_strided() -> None:
    coded, x = random_coded(), gaussian((576, 3), 1).T
    strided = ops.lut_matmul(x, coded.codes, coded.scales, None, coded.shape)
    assert torch.equal(strided, ops.lut_matmul(x.contiguous(), coded.codes, coded.scales, None, coded.shape))
