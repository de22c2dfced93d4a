"""Tiers and the partition: where every token is, and what never moves."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from layers import (
    config_for_positions,
    feed,
    filled,
    high_positions,
    low_positions,
    packed,
    random_tokens,
    tokens_that_tell_their_position,
)
from mikv.cache.config import MiKVConfig
from mikv.cache.layer import TwoTierLayer
from mikv.cache.partition import choose, others, protected_tokens
from mikv.cache.policies.h2o import H2O
from mikv.cache.tiers import RawTokens, Tier, take
from mikv.formats import BLOCK_TOKENS, raw_format
from numerics import gaussian

CPU = torch.device("cpu")


@st.composite
def partitions(draw: DrawFn, low: str = "int4") -> tuple[MiKVConfig, int, list[int]]:
    """A configuration, a number of tokens, and where the steps that bring them end."""
    num_tokens = draw(st.integers(1, 260))
    stops = draw(st.sets(st.integers(1, num_tokens), max_size=40))
    spans = st.tuples(st.integers(0, 200), st.integers(1, 40)).map(lambda span: (span[0], span[0] + span[1]))
    config = config_for_positions(
        importance_ratio=draw(st.sampled_from([0.0, 0.1, 0.3, 0.8, 1.0])),
        recent_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        min_recent=draw(st.integers(0, 40)),
        sinks=draw(st.integers(0, 8)),
        protected=tuple(draw(st.lists(spans, max_size=2))),
        warmup_tokens=draw(st.integers(0, 80)),
        policy=draw(st.sampled_from(["h2o", "normalized", "far", "window", "random", "key_norm"])),
        high=draw(st.sampled_from(["exact", "int8", "int4"])),
        low_grid=draw(st.sampled_from(["group", "channel"])),
        low=low,
    )
    return config, num_tokens, sorted(stops | {num_tokens})


# --- the partition ----------------------------------------------------------------------------------------------------


@given(partitions())
def test_every_head_has_every_token_exactly_once(drawn: tuple[MiKVConfig, int, list[int]]) -> None:
    config, num_tokens, stops = drawn
    layer = filled(config, tokens_that_tell_their_position(num_tokens), *stops[:-1])
    if layer.tokens_by_tier()["warm_up"]:
        return
    for high, low in zip(high_positions(layer), low_positions(layer), strict=True):
        assert sorted(high + low) == list(range(num_tokens))
    assert layer.tokens_by_tier() == {
        "warm_up": 0,
        "high": len(high_positions(layer)[0]),
        "low": len(low_positions(layer)[0]),
        "dropped": 0,
    }


@given(partitions() | partitions(low="drop"))
def test_protected_tokens_are_never_demoted(drawn: tuple[MiKVConfig, int, list[int]]) -> None:
    """After every step: sinks, the recent window and the user's spans are all in the high tier of every head."""
    config, num_tokens, stops = drawn
    tokens = tokens_that_tell_their_position(num_tokens)
    layer = TwoTierLayer(config, 0)
    start = 0
    for stop in stops:
        feed(layer, tokens[start:stop])
        start = stop
        if layer.tokens_by_tier()["warm_up"]:
            continue
        spans = [(0, config.sinks), (stop - config.recent_window(stop), stop), *config.protected]
        expected = {position for first, last in spans for position in range(max(0, first), min(last, stop))}
        for held in high_positions(layer):
            assert expected <= set(held)


@given(partitions())
def test_the_high_tier_is_less_than_a_block_over_its_budget(drawn: tuple[MiKVConfig, int, list[int]]) -> None:
    """Unless what is protected is more than that."""
    config, num_tokens, stops = drawn
    layer = filled(config, tokens_that_tell_their_position(num_tokens), *stops[:-1])
    if layer.tokens_by_tier()["warm_up"]:
        return
    count = layer.tokens_by_tier()["high"]
    positions = torch.arange(num_tokens)[None]
    protected = int(protected_tokens(positions, num_tokens, config).sum())
    budget = config.high_budget(num_tokens)
    assert min(num_tokens, budget) <= count < max(budget, protected) + BLOCK_TOKENS


@given(
    st.integers(1, 200),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.2, 0.7]),
    st.sampled_from([0.0, torch.inf, -torch.inf, torch.nan]),
)
def test_choose_divides_whatever_the_scores_are(num_held: int, seed: int, ratio: float, extreme: float) -> None:
    """Slots in any order, gaps between positions, scores that are equal, infinite or not numbers."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_held + 50
    positions = torch.stack([torch.randperm(num_tokens, generator=generator)[:num_held] for _ in range(2)])
    config = MiKVConfig(importance_ratio=ratio, min_recent=0, recent_share=0.0, sinks=0)
    scores = torch.randint(0, 3, (2, num_held), generator=generator).float()
    scores[:, ::3] += extreme
    demoted = choose(scores, positions, num_tokens, config, H2O())
    kept = others(demoted, num_held)
    expected = max(0, num_held - config.high_budget(num_tokens)) // BLOCK_TOKENS * BLOCK_TOKENS
    assert demoted.shape == (2, expected)
    for head in range(2):
        assert sorted(demoted[head].tolist() + kept[head].tolist()) == list(range(num_held))
        for slots in (demoted[head], kept[head]):
            assert torch.equal(slots, slots.sort().values)


def test_protected_tokens_by_hand() -> None:
    config = MiKVConfig(importance_ratio=0.0, sinks=2, min_recent=3, protected=((5, 7), (18, 40)))
    protected = protected_tokens(torch.arange(20), 20, config)
    assert protected.nonzero()[:, 0].tolist() == [0, 1, 5, 6, 17, 18, 19]


# --- the low tier is written once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper-int2", "lossless", "balanced", "small"])
def test_low_blocks_are_never_rewritten(preset: str) -> None:
    """Through 300 steps in which the low tier grows, moves to larger tables, and a chunk passes through."""
    config = MiKVConfig.preset(preset)
    tokens = random_tokens(700)
    layer = filled(config, tokens[:300])
    low = packed(layer).low
    assert low is not None
    seen: dict[str, Tensor] = {name: tensor[:, :, :0].clone() for name, tensor in low.tensors.items()}
    capacities = set()
    for start, stop in [(300, 400), *((position, position + 1) for position in range(400, 700))]:
        feed(layer, tokens[start:stop])
        low = packed(layer).low
        assert low is not None
        num_blocks = low.counts[0] // BLOCK_TOKENS
        capacities.add(low.capacity)
        for name, tensor in low.tensors.items():
            before = seen[name]
            assert torch.equal(tensor[:, :, : before.shape[2]], before)
            seen[name] = tensor[:, :, :num_blocks].clone()
    assert low.counts[0] > 12 * BLOCK_TOKENS
    assert len(capacities) > 3


def test_a_prompts_blocks_in_the_low_tier_are_in_order_of_position() -> None:
    """Those of later steps are in order of their slots, which have lost the order of positions by then."""
    layer = filled(config_for_positions(importance_ratio=0.1, min_recent=4), tokens_that_tell_their_position(300))
    for positions in low_positions(layer):
        for start in range(0, len(positions), BLOCK_TOKENS):
            block = positions[start : start + BLOCK_TOKENS]
            assert block == sorted(block)


# --- tiers ------------------------------------------------------------------------------------------------------------


def tier_of(batch: int = 2, num_heads: int = 3) -> Tier:
    """16 numbers per token, exact, and a score and a position."""
    form = raw_format("exact", torch.float32, 16)
    return Tier((form, form), (batch, num_heads), CPU, transformed=False, with_scores=True)


BYTES_PER_SLOT = 2 * 16 * 4 + 4 + 4


def fill(tier: Tier, row: int, count: int) -> None:
    """Scores tell slot and head."""
    tier.scores[row, :, :count] = scores_of(count, tier.scores.shape[1])
    tier.set_count(row, count)


def scores_of(count: int, num_heads: int = 3) -> Tensor:
    return torch.arange(count) + 1000.0 * torch.arange(num_heads)[:, None]


def test_an_empty_tier_takes_no_bytes() -> None:
    tier = tier_of()
    assert (tier.nbytes, tier.used, tier.capacity, tier.counts) == (0, 0, 0, [0, 0])


def test_rows_fill_independently_and_survive_growth_and_shrinking() -> None:
    tier = tier_of()
    tier.resize(64)
    fill(tier, 0, 2)
    fill(tier, 1, 33)
    for capacity in (96, 64, 320):
        tier.resize(capacity)
        assert tier.capacity == tier.view.capacity == capacity
        assert tier.nbytes == 2 * 3 * capacity * BYTES_PER_SLOT
        for row, count in enumerate((2, 33)):
            assert torch.equal(tier.scores[row, :, :count], scores_of(count))


def test_a_tier_never_shrinks_below_what_it_holds() -> None:
    tier = tier_of()
    tier.resize(64)
    fill(tier, 1, 33)
    with pytest.raises(AssertionError):
        tier.resize(32)


def test_a_tier_is_whole_blocks() -> None:
    with pytest.raises(AssertionError, match="40"):
        tier_of().resize(40)


def test_the_view_follows_counts_and_storage() -> None:
    """One view serves until tensors or rows are replaced: what is cached for it stays right as long as it is there."""
    tier = tier_of()
    tier.resize(64)
    view = tier.view
    fill(tier, 1, 33)
    assert tier.view is view
    assert view.counts.tolist() == tier.counts == [0, 33]
    assert view.pages.tolist() == [[0], [1]]
    for change in (
        lambda: tier.resize(96),
        lambda: tier.to("cpu"),
        lambda: tier.restore(dict(tier.tensors), [33, 0]),
    ):
        before = tier.view
        change()
        assert tier.view is not before
        assert tier.view.counts.tolist() == tier.counts
        assert tier.view.pages.tolist() == [[row] for row in range(len(tier.counts))]
        assert all(tier.view.parts[name] is tensor for name, tensor in tier.tensors.items())


def test_select_rows_copies() -> None:
    tier = tier_of()
    tier.resize(32)
    fill(tier, 1, 3)
    chosen = tier.of_rows(torch.tensor([1, 1, 0]))
    assert (tier.counts, chosen.counts) == ([0, 3], [3, 3, 0])
    chosen.scores[0] = -1.0
    assert torch.equal(chosen.scores[1, :, :3], scores_of(3))
    assert torch.equal(tier.scores[1, :, :3], scores_of(3))


def test_restore_takes_over_what_fits() -> None:
    tier = tier_of()
    tier.resize(32)
    fill(tier, 1, 3)
    copy = tier_of()
    copy.restore(tier.tensors, [0, 3])
    assert (copy.counts, copy.capacity, copy.nbytes) == ([0, 3], 32, tier.nbytes)
    assert torch.equal(copy.scores[1, :, :3], scores_of(3))


def shapes_of(num_blocks: int, **changed: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    data = (2, 3, num_blocks, 32, 16)
    return {"k.data": data, "v.data": data, "score": data[:4], "position": data[:4]} | changed


@pytest.mark.parametrize(
    ("shapes", "counts", "message"),
    [
        (shapes_of(2), [0, 65], "65] tokens do not fit tiers of [64]"),
        (shapes_of(2), [-1, 3], "do not fit"),
        (shapes_of(2, score=(2, 3, 3, 32)), [1, 1], "do not fit tiers of [64, 96]"),
        (shapes_of(2, score=(2, 3, 2, 8)), [1, 1], "score has shape (2, 3, 2, 8)"),
        (shapes_of(2, score=(1, 3, 2, 32)), [1, 1], "score has shape (1, 3, 2, 32)"),
    ],
)
def test_restore_refuses_what_does_not_fit(shapes: dict[str, tuple[int, ...]], counts: list[int], message: str) -> None:
    own = tier_of().tensors
    made = {name: torch.zeros(shape, dtype=own[name].dtype) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        tier_of().restore(made, counts)


def test_restore_refuses_another_dtype() -> None:
    tier = tier_of()
    tier.resize(64)
    tensors = tier.tensors | {"score": tier.tensors["score"].double()}
    with pytest.raises(ValueError, match=r"score has shape .* and dtype torch\.float64"):
        tier_of().restore(tensors, [1, 1])


def test_reserve_takes_no_more_than_the_first_blocks_need() -> None:
    tier = tier_of()
    tier.reserve(6400)
    assert tier.capacity == 6400
    tier.reserve(6400)
    assert tier.capacity == 6400
    tier.reserve(6432)
    assert tier.capacity == 6432 + 6432 // 64 // 32 * 32


def test_take_gathers_per_head() -> None:
    tensor = torch.arange(12).view(2, 3, 2)
    assert take(tensor, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


def test_raw_tokens_keep_their_order_and_dtype() -> None:
    keys, values = gaussian((2, 3, 50, 16), 1).bfloat16(), gaussian((2, 3, 50, 16), 2).bfloat16()
    raw = RawTokens(keys[:, :, :0], values[:, :, :0])
    for start, stop in ((0, 20), (20, 21), (21, 50)):
        both = raw.followed_by(keys[:, :, start:stop], values[:, :, start:stop])
        assert raw.num_columns == start  # they do not count yet
        raw.num_columns = stop
        assert torch.equal(both[0], raw.keys)
    assert torch.equal(raw.keys, keys)
    assert torch.equal(raw.values, values)
    raw.num_columns = 20
    raw.followed_by(keys[:, :, 20:22], values[:, :, 20:22])
    raw.num_columns = 22
    assert torch.equal(raw.keys, keys[:, :, :22])
    assert torch.equal(raw.of_rows(torch.tensor([1])).values, values[1:, :, :22])


def test_the_first_raw_tokens_take_what_they_need() -> None:
    keys = gaussian((1, 2, 160, 16))
    raw = RawTokens(keys[:, :, :0], keys[:, :, :0])
    raw.followed_by(keys, keys)
    raw.num_columns = 160
    assert raw.nbytes == 2 * keys.nbytes
    raw.followed_by(keys[:, :, :1], keys[:, :, :1])
    assert raw.nbytes == 2 * keys.nbytes * (161 + 10) // 160
