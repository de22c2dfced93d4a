"""Native products with coded weights against float64, by tables and by bytes, on every instruction set of this machine.

M output rows, K inputs. Errors are relative to |x| |w| / sqrt(K): the size of products of independent numbers.
"""

import math

import pytest
import torch
from torch import Tensor

from coded_weights import Coded, random_coded
from mikv.ops import cpu, native
from numerics import BUDGETS, gaussian

pytestmark = pytest.mark.usefixtures("isa")

FASTER, TABLES, BYTES = range(3)
PATHS = pytest.mark.parametrize("path", [TABLES, BYTES], ids=["tables", "bytes"])
HALF = 2**-9  # of a unit in the last place of bfloat16, the coarser of the 16-bit floats


def multiply(coded: Coded, x: Tensor, path: int, bias: Tensor | None = None, num_threads: int = 1) -> Tensor:
    output = x.new_full((*x.shape[:-1], coded.shape.out_features), math.nan)
    sizes = coded.shape.flat
    cpu._module().matmul(x, coded.codes, coded.scales, bias, sizes, path, num_threads, output)
    return output


def budget_of(path: int) -> str:
    if path == TABLES:
        return "product by tables"
    return "product by bytes" if cpu._module().isa() in ("avx512", "scalar") else "product by 7 bits"


def check(
    coded: Coded,
    x: Tensor,
    path: int,
    bias: Tensor | None = None,
    *,
    rounding: float = 0.0,
    within: str | None = None,
) -> None:
    actual, expected = multiply(coded, x, path, bias), coded.product(x, bias)
    assert actual.shape == expected.shape
    assert actual.dtype == x.dtype
    assert torch.isfinite(actual).all(), "NaN or Inf"
    error = float((actual.double() - expected).norm())
    budget = BUDGETS[within or budget_of(path)]
    allowed = budget.relative * coded.product_size(x) + rounding * float(expected.norm())
    assert error <= allowed, (
        f"matmul {tuple(x.shape)} {coded.shape} {x.dtype}: error {error:.3g}, relative "
        f"{error / coded.product_size(x):.3g}; budget {budget.relative:.3g} ({budget.reason})"
    )


@PATHS
@pytest.mark.parametrize("group", [32, 64, 96, 128, 192, None])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_every_number_of_bits_and_group_size(bits: int, group: int | None, path: int) -> None:
    check(random_coded(65, 576, bits, group), gaussian((3, 576), 1), path)


@PATHS
@pytest.mark.parametrize("in_features", [1, 7, 32, 40, 96, 127, 576, 1000])
@pytest.mark.parametrize("out_features", [1, 7, 63, 64, 65, 576])
def test_awkward_sizes(out_features: int, in_features: int, path: int) -> None:
    check(
        random_coded(out_features, in_features, 3, 64),
        gaussian((17, in_features), 1),
        path,
        gaussian((out_features,), 2),
    )


@PATHS
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 17, 33, 128, 257])
def test_any_number_of_rows(rows: int, path: int) -> None:
    check(random_coded(66, 200, 3, 96, offset=True), gaussian((rows, 200), 1), path)


@PATHS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_uniform_scales_offsets_and_bias(bits: int, uniform: bool, offset: bool, bias: bool, path: int) -> None:
    coded = random_coded(70, 200, bits, 128, uniform=uniform, offset=offset)
    check(coded, gaussian((5, 200), 1), path, gaussian((70,), 2) if bias else None)


@PATHS
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype(dtype: torch.dtype, bias_dtype: torch.dtype, path: int) -> None:
    bias = gaussian((65,), 2).to(bias_dtype)
    rounding = 0.0 if dtype == torch.float32 else HALF
    check(random_coded(offset=True), gaussian((3, 576), 1).to(dtype), path, bias, rounding=rounding)


@PATHS
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_fewer_bits_than_planes(bits: int, path: int) -> None:
    check(random_coded(70, 200, 4, 96, offset=True).first(bits), gaussian((3, 200), 1), path)


@PATHS
def test_an_offset_costs_no_error(path: int) -> None:
    """Inputs with a large mean: their sum meets the offset unrounded."""
    coded = random_coded(offset=True)
    x = torch.full((2, 576), 100.0)  # whose rounding is exact, too
    assert (multiply(coded, x, path) - coded.product(x)).norm() <= BUDGETS[budget_of(path)].relative * coded.product(
        x
    ).norm()


# --- extreme inputs -------------------------------------------------------------------------------------------------


@PATHS
def test_zeros_give_the_bias(path: int) -> None:
    bias = gaussian((65,), 2)
    assert torch.equal(multiply(random_coded(), torch.zeros(3, 576), path, bias), bias.expand(3, -1))


@PATHS
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_inputs_of_any_size(size: float, path: int) -> None:
    check(random_coded(), gaussian((3, 576), 1) * size, path)


@PATHS
def test_inputs_below_the_range_count_as_zeros(path: int) -> None:
    assert not multiply(random_coded(), torch.full((3, 576), 1e-40), path).any()


@PATHS
@pytest.mark.parametrize("size", [1e2, 1e4, 1e20])
def test_one_huge_input(size: float, path: int) -> None:
    x = gaussian((3, 576), 1)
    x[1, 77] = size
    check(random_coded(group_size=None), x, path, within="product with an outlier")


@PATHS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_bad_number_is_nan_and_no_other_row_is(bad: float, path: int) -> None:
    coded, x = random_coded(), gaussian((7, 576), 1)
    expected = multiply(coded, x, path)
    x[3, 100] = bad
    product = multiply(coded, x, path)
    assert product[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(product[others], expected[others])


# --- how it is divided ----------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_threads_do_not_change_a_bit(rows: int, path: int) -> None:
    coded, x = random_coded(200, 1000, 4, 128), gaussian((rows, 1000), 1)
    assert torch.equal(multiply(coded, x, path, num_threads=5), multiply(coded, x, path))


@PATHS
def test_rows_do_not_depend_on_each_other(path: int) -> None:
    coded, x = random_coded(offset=True), gaussian((23, 576), 1)
    alone = torch.cat([multiply(coded, row[None], path) for row in x])
    assert torch.equal(multiply(coded, x, path), alone)


def test_few_rows_are_looked_up_and_many_are_multiplied() -> None:
    coded, x = random_coded(), gaussian((64, 576), 1)
    assert torch.equal(multiply(coded, x[:1], FASTER), multiply(coded, x[:1], TABLES))
    assert torch.equal(multiply(coded, x, FASTER), multiply(coded, x, BYTES))


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(coded: Coded, message: str, **changes: object) -> None:
    parts = {
        "inputs": torch.zeros(2, coded.shape.in_features),
        "codes": coded.codes,
        "scales": coded.scales,
        "bias": None,
        "sizes": coded.shape.flat,
        "path": FASTER,
        "num_threads": 1,
        "output": torch.zeros(2, coded.shape.out_features),
    }
    assert native.module is not None
    with pytest.raises(ValueError, match=message):
        native.module.matmul(**{**parts, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": torch.zeros(2, 575)}, r"inputs has shape \(2, 575\); its last axis must be 576"),
        (
            {"inputs": torch.zeros(2, 576, dtype=torch.float64)},
            "inputs has dtype float64; it must be float32, float16 or",
        ),
        ({"inputs": torch.zeros(576, 2).T}, r"inputs is not contiguous from axis 0 on; pass \.contiguous\(\)"),
        ({"inputs": torch.zeros(3, 576)}, "output has 2 rows; inputs have 3"),
        ({"output": torch.zeros(2, 65).half()}, "output has dtype float16; inputs have float32"),
        ({"codes": torch.zeros(2, 9, dtype=torch.uint8)}, r"codes has shape \(2, 9\); it must be \(2, 13824\)"),
        ({"scales": torch.zeros(2, 9, 4, 64).half()}, r"scales has shape \(2, 9, 4, 64\); it must be \(2, 9, 3, 64\)"),
        ({"bias": torch.zeros(64)}, r"bias has shape \(64,\); its last axis must be 65"),
        ({"bias": torch.zeros(2, 65)}, "bias has 2 rows; it must have one"),
        ({"sizes": (65, 576, 48, 3, 3, 0, 0)}, "group_size=48 is neither a multiple of 32 nor in_features=576"),
        ({"sizes": (65, 576, 64, 3, 4, 0, 0)}, r"bits=4 is not in 1\.\.3"),
        ({"sizes": (65, 576, 64, 9, 4, 0, 0)}, r"planes=9 is not in 1\.\.8"),
        ({"sizes": (0, 576, 64, 3, 3, 0, 0)}, r"out_features=0 is not in 1\.\."),
        ({"path": 3}, r"path=3 is not in 0\.\.2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    refused(random_coded(), message, **changes)
