"""One set of planes in 2, 3 and 4 bits."""

import pytest
import torch
from correlated import layer
from torch import Tensor

from mikv.errors import ConfigError, NumericsError
from mikv.weights import calibrated
from mikv.weights.nested import PRECISIONS, nest
from mikv.weights.solve import output_error, solve

WEIGHT = torch.randn(24, 200, generator=torch.Generator().manual_seed(0)) * 0.02
GROUP = 64


@pytest.mark.parametrize("hessian", [None, torch.eye(200)])
def test_each_precision_reads_the_first_planes_and_is_sound(hessian: Tensor | None) -> None:
    nested = nest(WEIGHT, GROUP, hessian)
    for bits in PRECISIONS:
        coded = nested.at(bits)
        coded.require_sound("layer")
        assert coded.bits == bits
        assert coded.planes.data_ptr() == nested.planes.data_ptr()
    assert nested.planes.shape == (4, 24, 25)
    assert nested.scales.shape == (9, 24, 4)
    assert nested.offsets.shape == (3, 24, 4)


@pytest.mark.parametrize(("bits", "most"), [(2, 1.25), (3, 1.15), (4, 1.05)])
def test_without_data_all_precisions_are_near_to_planes_of_their_own(bits: int, most: float) -> None:
    ours, own = (
        output_error(WEIGHT, coded) for coded in (nest(WEIGHT, GROUP).at(bits), solve(WEIGHT, bits, GROUP, "offset"))
    )
    assert ours <= most * own, f"{bits} bits: {ours / own:.2f} times the error of planes of its own"


@pytest.mark.parametrize(("bits", "most"), [(2, 2.1), (3, 1.8), (4, 1.2)])
def test_with_a_hessian_all_precisions_are_near_to_refined_planes_of_their_own(bits: int, most: float) -> None:
    weight, hessian = layer(columns=200)
    nested, separate = nest(weight, GROUP, hessian).at(bits), solve(weight, bits, GROUP, "refined", hessian)
    ours, own = (output_error(weight, coded, hessian) for coded in (nested, separate))
    assert ours <= most * own, f"{bits} bits: {ours / own:.2f} times the error of planes of its own"


def test_a_hessian_helps_every_precision_and_more_bits_are_better() -> None:
    weight, hessian = layer(columns=200)
    with_data, without = (
        [output_error(weight, nested.at(bits), hessian) for bits in PRECISIONS]
        for nested in (nest(weight, GROUP, hessian), nest(weight, GROUP))
    )
    for bits, ours, theirs in zip(PRECISIONS, with_data, without, strict=True):
        assert ours < 0.85 * theirs, f"{bits} bits: {ours / theirs:.2f} of the error without data"
    assert with_data[2] < 0.4 * with_data[1] < 0.4**2 * with_data[0]


@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("hessian", [None, torch.zeros(72, 72), torch.ones(72, 72)])
def test_short_groups_whole_rows_and_singular_hessians_are_coded_well(
    group_size: int | None, hessian: Tensor | None
) -> None:
    weight = WEIGHT[:5, :72].contiguous()
    for bits, most in zip(PRECISIONS, (0.25, 0.08, 0.03), strict=True):
        assert output_error(weight, nest(weight, group_size, hessian).at(bits)) < most


def test_slices_of_rows_are_put_together_for_each_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(rows=12, columns=64)
    whole = nest(weight, 32, hessian)
    monkeypatch.setattr(calibrated, "_SLICE", 3 * 5 * 64)  # 5 rows
    sliced = nest(weight, 32, hessian)
    for bits in PRECISIONS:
        torch.testing.assert_close(sliced.at(bits).dequantize(), whole.at(bits).dequantize(), rtol=1e-3, atol=1e-4)


def test_zero_weights_become_zero() -> None:
    for bits in PRECISIONS:
        assert torch.equal(nest(torch.zeros(3, 64), 32, torch.eye(64)).at(bits).dequantize(), torch.zeros(3, 64))


def test_one_file_is_smaller_than_three() -> None:
    separate = sum(solve(WEIGHT, bits, GROUP, "offset").num_bytes for bits in PRECISIONS)
    assert nest(WEIGHT, GROUP).num_bytes < 0.65 * separate


def test_a_precision_that_is_not_stored_is_refused() -> None:
    with pytest.raises(ConfigError, match="bits=5"):
        nest(WEIGHT, GROUP).at(5)


def test_weights_too_large_for_scales_are_refused() -> None:
    with pytest.raises(NumericsError, match="16 bits"):
        nest(torch.full((4, 64), 1e7), 32)
