"""Every solver: what it returns is sound, how good it is, what it refuses; shapes and values that are awkward."""

import pytest
import torch
from correlated import layer
from hypothesis import given, settings
from hypothesis import strategies as st

from mikv.errors import ConfigError, NumericsError
from mikv.weights.solve import METHODS, needs_hessian, output_error, solve

DATA_FREE = [method for method in METHODS if not needs_hessian(method)]
CALIBRATED = [method for method in METHODS if needs_hessian(method)]
UNIFORM = {"rtn", "gptq", "refined-uniform"}


@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_returns_a_sound_coding(method: str, bits: int, group_size: int | None) -> None:
    weight, hessian = layer(rows=5, columns=72)  # the last group has 8 columns
    coded = solve(weight, bits, group_size, method, hessian)
    coded.require_sound("layer")
    assert coded.bits == bits
    assert coded.is_uniform == (method in UNIFORM and bits > 1)
    assert bool((coded.plane_scales().diff(dim=0) <= 0).all()), "planes are not in descending order of scale"
    assert torch.equal(coded.planes, solve(weight, bits, group_size, method, hessian).planes), "differs from run to run"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_methods_are_in_the_order_that_the_literature_gives(bits: int) -> None:
    weight, hessian = layer()
    error = {method: output_error(weight, solve(weight, bits, 64, method, hessian), hessian) for method in METHODS}
    assert error["alternating"] < error["greedy"]
    assert error["offset"] < error["alternating"]
    assert error["gptq"] < error["rtn"]
    assert error["gptq-bcq"] < error["offset"]
    assert error["refined"] < 0.95 * error["gptq-bcq"]
    assert error["refined-uniform"] < 0.9 * error["gptq"]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "greedy"])  # plane after plane
def test_signs_are_those_of_the_nearest_levels_of_what_is_stored(method: str) -> None:
    # columns do not interact, so that no solver has a reason to choose another level
    weight, _ = layer(rows=6, columns=64)
    coded = solve(weight, 2, 32, method, torch.eye(64))
    scales, offset = coded.plane_scales(), coded.offset[0].float() if coded.offset is not None else torch.zeros(6, 2)
    levels = torch.stack([a * scales[0] + b * scales[1] + offset for a in (-1, 1) for b in (-1, 1)], -1)  # (M, N, 4)
    nearest = (levels.repeat_interleave(32, 1) - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((coded.dequantize() - weight).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_zero_weights_become_zero_and_the_sign_of_zero_is_plus(method: str) -> None:
    coded = solve(torch.zeros(3, 64), 2, 32, method, torch.eye(64))
    assert torch.equal(coded.dequantize(), torch.zeros(3, 64))
    assert int(coded.planes[0].min()) == 255


@pytest.mark.parametrize("method", METHODS)
def test_weights_on_two_levels_are_exact_at_one_bit_with_offset(method: str) -> None:
    weight = torch.where(torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) < 0.4, 0.75, -0.25)
    coded = solve(weight, 1, 32, method, torch.eye(64))
    if coded.offset is not None:
        torch.testing.assert_close(coded.dequantize(), weight, rtol=0, atol=1e-3)
    else:
        assert float((coded.dequantize() - weight).abs().max()) > 0.1


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("kind", ["rank one", "dead inputs", "nothing seen"])
def test_a_singular_hessian_still_gives_a_good_coding(method: str, kind: str) -> None:
    weight, hessian = layer(rows=8, columns=64)
    if kind == "rank one":
        hessian = torch.ones(64, 64)
    if kind == "dead inputs":
        hessian[:, 10:20] = hessian[10:20] = 0
    if kind == "nothing seen":
        hessian = torch.zeros(64, 64)
    coded = solve(weight, 3, 32, method, hessian)
    coded.require_sound("layer")
    difference = coded.dequantize() - weight
    assert float(difference.square().mean() / weight.square().mean()) < 0.3
    if kind == "dead inputs":
        dead = float(difference[:, 10:20].square().mean() / weight[:, 10:20].square().mean())
        assert dead < 0.3, "inputs that calibration never saw keep no sensible weights"


def test_one_column_that_dwarfs_the_others_is_refined_first() -> None:
    weight, _ = layer(rows=16, columns=64)
    hessian = torch.eye(64)
    hessian[7, 7] = 1e4
    plain, weighted = (solve(weight, 2, 64, "offset", h) for h in (None, hessian))
    error = [float((coded.dequantize() - weight)[:, 7].abs().mean()) for coded in (plain, weighted)]
    assert error[1] < 0.2 * error[0]


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    bits=st.integers(1, 5),
    rows=st.integers(1, 9),
    columns=st.integers(1, 130),
    group_size=st.sampled_from([32, 64, None]),
    size=st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_any_shape_and_magnitude_is_solved(
    method: str, bits: int, rows: int, columns: int, group_size: int | None, size: float
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * size
    coded = solve(weight, bits, group_size, method, torch.eye(columns))
    coded.require_sound("layer")
    assert coded.dequantize().shape == weight.shape
    assert bool(coded.dequantize().isfinite().all())


def test_rows_do_not_depend_on_each_other() -> None:
    weight, hessian = layer(rows=12, columns=64)
    whole, part = (solve(w, 3, 32, "refined", hessian).dequantize() for w in (weight, weight[4:9].contiguous()))
    torch.testing.assert_close(whole[4:9], part, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits=0 is not one of 1 to 8"),
        ({"bits": 9}, "bits=9 is not one of 1 to 8"),
        ({"method": "gptqq"}, "method='gptqq' is unknown; use one of rtn"),
        ({"group_size": 40}, "group_size=40 is not a multiple of 32"),
        ({"method": "refined", "hessian": None}, "needs calibration"),
        ({"hessian": torch.eye(32)}, r"not torch.float32 \(64, 64\)"),
        ({"weight": torch.zeros(64)}, "not a float32 matrix"),
        ({"weight": torch.zeros(2, 64).half()}, "not a float32 matrix"),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments: dict, message: str) -> None:
    usual = {
        "weight": torch.ones(2, 64),
        "bits": 3,
        "group_size": 32,
        "method": "offset",
        "hessian": torch.eye(64),
    }
    with pytest.raises(ConfigError, match=message):
        solve(**(usual | arguments))


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_or_too_large_are_refused(method: str) -> None:
    weight = torch.ones(4, 64)
    weight[1, 3] = torch.nan
    with pytest.raises(NumericsError, match="in 1 of 4 rows"):
        solve(weight, 3, 32, method, torch.eye(64))
    weight[1, 3] = 1e7
    with pytest.raises(NumericsError, match="16 bits"):
        solve(weight, 3, 32, method, torch.eye(64))


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericsError, match="calibration"):
        solve(torch.ones(4, 32), 3, 32, "gptq", torch.full((32, 32), torch.inf))
