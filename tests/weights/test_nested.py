"""One set of planes in 2, 3 and 4 bits."""

import pytest
import torch

from mikv.errors import ConfigError
from mikv.weights.nested import nest
from mikv.weights.solve import solve

WEIGHT = torch.randn(24, 200, generator=torch.Generator().manual_seed(0)) * 0.02


def test_each_precision_reads_the_first_planes_and_is_sound() -> None:
    nested = nest(WEIGHT, 64)
    for bits in (2, 3, 4):
        coded = nested.at(bits)
        coded.require_sound("layer")
        assert coded.bits == bits
        assert coded.planes.data_ptr() == nested.planes.data_ptr()
    assert nested.scales.shape == (9, 24, 4)
    assert nested.offsets.shape == (3, 24, 4)


def test_two_bits_are_those_of_the_method_offset_and_more_bits_stay_near_to_it() -> None:
    nested = nest(WEIGHT, 64)
    for bits, most in ((2, 1.0), (3, 1.3), (4, 2.0)):
        ours, own = (
            float((coded.dequantize() - WEIGHT).square().mean())
            for coded in (nested.at(bits), solve(WEIGHT, bits, 64, "offset"))
        )
        assert ours <= most * own + 1e-12, f"{bits} bits: {ours / own:.2f} times the error of planes of its own"


def test_one_file_is_smaller_than_three() -> None:
    separate = sum(solve(WEIGHT, bits, 64, "offset").num_bytes for bits in (2, 3, 4))
    assert nest(WEIGHT, 64).num_bytes < 0.65 * separate


def test_a_precision_that_is_not_stored_is_refused() -> None:
    with pytest.raises(ConfigError, match="bits=5"):
        nest(WEIGHT, 64).at(5)
