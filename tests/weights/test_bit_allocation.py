"""Bits per layer from a budget of bytes."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikv.errors import ConfigError
from mikv.weights.allocation import Offer, allocate

OFFERS = st.dictionaries(
    st.sampled_from([2, 3, 4]), st.builds(Offer, st.floats(0, 100), st.integers(0, 50)), min_size=1
)


@settings(max_examples=200, deadline=None)
@given(st.lists(OFFERS, min_size=1, max_size=4), st.integers(0, 200))
def test_no_other_choice_within_the_budget_has_less_error(offers: list[dict[int, Offer]], budget: int) -> None:
    layers = {f"layer {index}": widths for index, widths in enumerate(offers)}
    fitting = [
        sum(layer[bits].error for layer, bits in zip(offers, choice, strict=True))
        for choice in product(*offers)
        if sum(layer[bits].num_bytes for layer, bits in zip(offers, choice, strict=True)) <= budget
    ]
    if not fitting:
        with pytest.raises(ConfigError, match="too small"):
            allocate(layers, budget)
        return
    chosen = allocate(layers, budget)
    assert list(chosen) == list(layers)
    assert sum(layers[name][bits].num_bytes for name, bits in chosen.items()) <= budget
    assert sum(layers[name][bits].error for name, bits in chosen.items()) == pytest.approx(min(fitting))


def test_a_model_of_odd_sizes_stays_within_its_budget_and_near_to_the_best() -> None:
    layers = {
        f"layer {index}": {bits: Offer((index % 7 + 1) * 4.0**-bits, bits * 1_000_003 + index) for bits in (2, 3, 4)}
        for index in range(120)
    }
    budget = 3 * 120 * 1_000_003 + 10_000
    chosen = allocate(layers, budget)
    used = sum(layers[name][bits].num_bytes for name, bits in chosen.items())
    assert budget - 1_100_000 < used <= budget
    assert chosen["layer 6"] > chosen["layer 0"], "the sensitive layer has no more bits than the other"
