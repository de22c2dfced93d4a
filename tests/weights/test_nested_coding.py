"""Codes that several precisions share."""

import pytest
import torch

from mikv.weights import nested_coding
from mikv.weights.coding import Coding
from mikv.weights.nested_coding import NestedCoding

COSTS = ((1, 1.0), (3, 5.0))
GENERATOR = torch.Generator().manual_seed(0)
CODES = torch.randint(0, 8, (6, 32), generator=GENERATOR, dtype=torch.uint8)
SCALES = torch.rand(3, 6, generator=GENERATOR) + 0.1
NESTED = NestedCoding.of(Coding(CODES, SCALES, torch.randn(6, generator=GENERATOR)), COSTS)


def test_a_precision_is_the_coding_by_its_first_planes() -> None:
    one, three = NESTED.parts()
    assert (one.bits, three.bits) == (1, 3)
    assert torch.equal(one.scales, SCALES[:1])
    assert torch.equal(NESTED.values(), torch.cat([one.values(), three.values()]))


def test_signs_of_planes_that_are_not_read_are_zero() -> None:
    assert int(NESTED.signs(0).abs().sum()) == 2 * 6 * 32
    assert int(NESTED.signs(2)[:6].abs().sum()) == 0
    assert int(NESTED.signs(2)[6:].abs().sum()) == 6 * 32


@pytest.mark.parametrize("at_once", [1, 20, 10**4])
def test_the_chosen_codes_are_the_cheapest_of_all(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested_coding, "_AT_ONCE", at_once)
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    codes, values = NESTED.levels().nearest(x)
    least = torch.full((6, 32), torch.inf)
    for code in range(8):
        one, three = NestedCoding(torch.full_like(NESTED.codes, code), NESTED.scales, NESTED.offset, COSTS).parts()
        cost = (one.values() - x[:6]).square() + 5 * (three.values() - x[6:]).square()
        least = torch.minimum(least, cost)
    chosen = (values - x).square()
    torch.testing.assert_close(chosen[:6] + 5 * chosen[6:], least)
    assert torch.equal(codes[:6], codes[6:])
    found = NestedCoding(codes, NESTED.scales, NESTED.offset, COSTS)
    torch.testing.assert_close(found.values(), values)


def test_no_precision_turns_a_plane_around() -> None:
    changed = NESTED.with_scales(NESTED.scales - 0.5, NESTED.offset)
    assert float(changed.scales.min()) == 0
    assert torch.equal(changed.codes, NESTED.codes)
