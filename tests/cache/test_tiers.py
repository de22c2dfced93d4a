"""Tables, tiers and the partition: where every token is, and what never moves."""

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
from mikv.cache.formats import layer_formats
from mikv.cache.layer import TwoTierLayer
from mikv.cache.partition import choose, protected_tokens
from mikv.cache.policies.h2o import H2O
from mikv.cache.tiers import HighTier, LowTier, RawTokens, Table, take
from mikv.formats import BLOCK_TOKENS
from numerics import assert_close, gaussian

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
        policy=draw(st.sampled_from(["h2o", "normalized", "window", "random", "key_norm"])),
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
    demoted, kept = choose(scores, positions, num_tokens, config, H2O())
    expected = max(0, num_held - config.high_budget(num_tokens)) // BLOCK_TOKENS * BLOCK_TOKENS
    assert demoted.shape == (2, expected)
    for head in range(2):
        assert sorted(demoted[head].tolist() + kept[head].tolist()) == list(range(num_held))
        for slots in (demoted[head], kept[head]):
            ordered = positions[head][slots]
            assert torch.equal(ordered, ordered.sort().values)


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
    seen: dict[str, Tensor] = {name: tensor[:, :, :0].clone() for name, tensor in low.table.tensors.items()}
    capacities = set()
    for start, stop in [(300, 400), *((position, position + 1) for position in range(400, 700))]:
        feed(layer, tokens[start:stop])
        count = low.table.counts[0]
        capacities.add(low.table.capacity)
        for name, tensor in low.table.tensors.items():
            before = seen[name]
            assert torch.equal(tensor[:, :, : before.shape[2]], before)
            seen[name] = tensor[:, :, :count].clone()
    assert low.table.counts[0] > 12
    assert len(capacities) > 3


def test_a_block_in_the_low_tier_is_in_order_of_position() -> None:
    config = config_for_positions(importance_ratio=0.1, min_recent=4)
    layer = filled(config, tokens_that_tell_their_position(300), 100, *range(101, 300))
    for positions in low_positions(layer):
        for start in range(0, len(positions), BLOCK_TOKENS):
            block = positions[start : start + BLOCK_TOKENS]
            assert block == sorted(block)


# --- tables -----------------------------------------------------------------------------------------------------------


def table_of(batch: int = 2, num_heads: int = 3) -> Table:
    return Table({"codes": ((4,), torch.uint8), "score": ((), torch.float32)}, batch, num_heads, CPU)


def entries_of(count: int, first: int, num_heads: int = 3) -> dict[str, Tensor]:
    """Entries that tell their number and head."""
    numbers = torch.arange(first, first + count) + 100 * torch.arange(num_heads)[:, None]  # (G, N)
    return {"codes": (numbers % 256).to(torch.uint8)[..., None].expand(-1, -1, 4), "score": numbers.float()}


def test_an_empty_table_takes_no_bytes() -> None:
    table = table_of()
    assert (table.nbytes, table.used, table.capacity, table.counts) == (0, 0, 0, [0, 0])


def test_rows_fill_independently_and_survive_growth_and_shrinking() -> None:
    table = table_of()
    table.resize(5)
    table.write(0, entries_of(2, 0))
    table.write(1, entries_of(5, 0))
    table.write(0, entries_of(3, 2))
    for capacity in (9, 5, 64):
        table.resize(capacity)
        assert table.capacity == capacity
        assert table.nbytes == 2 * 3 * capacity * (4 + 4)
        for row in range(2):
            assert torch.equal(table.tensors["score"][row, :, :5], entries_of(5, 0)["score"])
            assert torch.equal(table.tensors["codes"][row, :, :5], entries_of(5, 0)["codes"])


def test_a_table_never_shrinks_below_what_it_holds() -> None:
    table = table_of()
    table.resize(5)
    table.write(1, entries_of(5, 0))
    with pytest.raises(AssertionError):
        table.resize(4)


def test_keep_takes_entries_in_the_order_given() -> None:
    table = table_of()
    table.resize(4)
    table.write(0, entries_of(4, 0))
    table.write(1, entries_of(4, 0))
    chosen = torch.tensor([[3, 0], [1, 2], [2, 0]])
    table.keep(1, chosen)
    assert table.counts == [4, 2]
    assert table.tensors["score"][1, :, :2].tolist() == [[3.0, 0.0], [101.0, 102.0], [202.0, 200.0]]
    assert torch.equal(table.tensors["score"][0], entries_of(4, 0)["score"])


def test_select_rows_copies() -> None:
    table = table_of()
    table.resize(3)
    table.write(1, entries_of(3, 0))
    table.select_rows(torch.tensor([1, 1, 0]))
    assert table.counts == [3, 3, 0]
    table.tensors["score"][0] = -1.0
    assert torch.equal(table.tensors["score"][1], entries_of(3, 0)["score"])


def test_restore_takes_over_what_fits() -> None:
    table = table_of()
    table.resize(3)
    table.write(1, entries_of(3, 0))
    copy = table_of()
    copy.restore(table.tensors, [0, 3])
    assert (copy.counts, copy.capacity, copy.nbytes) == ([0, 3], 3, table.nbytes)


@pytest.mark.parametrize(
    ("tensors", "counts", "message"),
    [
        ({"codes": (2, 3, 5, 4), "score": (2, 3, 5)}, [0, 6], "6] entries do not fit tables of [5]"),
        ({"codes": (2, 3, 5, 4), "score": (2, 3, 5)}, [-1, 3], "do not fit"),
        ({"codes": (2, 3, 5, 4), "score": (2, 3, 6)}, [1, 1], "do not fit tables of [5, 6]"),
        ({"codes": (2, 3, 5, 8), "score": (2, 3, 5)}, [1, 1], "codes has shape (2, 3, 5, 8)"),
        ({"codes": (1, 3, 5, 4), "score": (1, 3, 5)}, [1, 1], "codes has shape (1, 3, 5, 4)"),
    ],
)
def test_restore_refuses_what_does_not_fit(
    tensors: dict[str, tuple[int, ...]], counts: list[int], message: str
) -> None:
    dtypes = {"codes": torch.uint8, "score": torch.float32}
    made = {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in tensors.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        table_of().restore(made, counts)


def test_restore_refuses_another_dtype() -> None:
    tensors = {"codes": torch.zeros(2, 3, 5, 4), "score": torch.zeros(2, 3, 5)}
    with pytest.raises(ValueError, match=r"codes has shape .* and dtype torch\.float32"):
        table_of().restore(tensors, [1, 1])


def test_take_gathers_per_head() -> None:
    tensor = torch.arange(12).view(2, 3, 2)
    assert take(tensor, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


# --- tiers ------------------------------------------------------------------------------------------------------------


def test_the_high_tier_returns_tokens_scores_and_positions() -> None:
    formats = layer_formats(MiKVConfig(high="exact"), 16, torch.float32)
    high = HighTier(formats.high, (1, 2, 16), CPU)
    keys, values, scores = gaussian((2, 6, 16), 1), gaussian((2, 6, 16), 2), gaussian((2, 6), 3)
    positions = torch.arange(6).expand(2, -1)
    high.table.resize(8)
    for part in (slice(0, 2), slice(2, 6)):
        high.append(0, keys[:, part], values[:, part], scores[:, part], positions[:, part])
    assert torch.equal(high.keys(1, 5)[0], keys[:, 1:5])
    assert torch.equal(high.values(0, 6)[0], values)
    assert torch.equal(high.scores[0, :, :6], scores)
    assert high.positions.dtype == torch.int32
    slots = torch.tensor([[5, 0], [2, 3]])
    taken_keys, taken_values = high.take(0, slots)
    assert torch.equal(taken_keys, take(keys, slots))
    assert torch.equal(taken_values, take(values, slots))


@pytest.mark.parametrize("grid", ["lloyd-max", "uniform", "group", "channel"])
def test_the_low_tier_decodes_any_range_of_blocks(grid: str) -> None:
    formats = layer_formats(MiKVConfig(low_k="int3", low_v="int2", low_grid=grid), 80, torch.float32)
    assert formats.low is not None
    low = LowTier(formats.low, (1, 2, 80), CPU)
    keys, values = gaussian((2, 160, 80), 1), gaussian((2, 160, 80), 2)
    for start, stop in ((0, 64), (64, 96), (96, 160)):
        low.append(0, keys[:, start:stop], values[:, start:stop])
    assert (low.num_tokens, low.table.counts) == (160, [5])
    for tier, x, form in ((low.keys, keys, formats.low[0]), (low.values, values, formats.low[1])):
        expected = form.decode(form.encode(x.unflatten(1, (-1, BLOCK_TOKENS)))).flatten(1, 2)
        for start, stop in ((0, 160), (32, 64), (96, 160), (64, 64)):
            assert_close(tier(start, stop)[0], expected[:, start:stop], "bitwise", op="low tier", form=grid)


def test_the_low_tier_takes_no_more_than_its_first_blocks_need() -> None:
    formats = layer_formats(MiKVConfig(), 64, torch.float32)
    assert formats.low is not None
    low = LowTier(formats.low, (1, 2, 64), CPU)
    low.append(0, gaussian((2, 6400, 64)), gaussian((2, 6400, 64)))
    assert low.table.capacity == 200
    low.append(0, gaussian((2, 32, 64)), gaussian((2, 32, 64)))
    assert low.table.capacity == 201 + 201 // 64


def test_raw_tokens_keep_their_order_and_dtype() -> None:
    keys, values = gaussian((2, 3, 50, 16), 1).bfloat16(), gaussian((2, 3, 50, 16), 2).bfloat16()
    raw = RawTokens(keys[:, :, :0], values[:, :, :0])
    for start, stop in ((0, 20), (20, 21), (21, 50)):
        raw.append(keys[:, :, start:stop], values[:, :, start:stop])
    assert torch.equal(raw.keys, keys)
    assert torch.equal(raw.values, values)
    raw.crop(30)
    raw.append(keys[:, :, 20:22], values[:, :, 20:22])
    assert torch.equal(raw.keys, keys[:, :, :22])
    raw.select_rows(torch.tensor([1]))
    assert torch.equal(raw.values, values[1:, :, :22])


def test_the_first_raw_tokens_take_what_they_need() -> None:
    keys = gaussian((1, 2, 160, 16))
    raw = RawTokens(keys[:, :, :0], keys[:, :, :0])
    raw.append(keys, keys)
    assert raw.nbytes == 2 * keys.nbytes
    raw.append(keys[:, :, :1], keys[:, :, :1])
    assert raw.nbytes == 2 * keys.nbytes * (161 + 10) // 160
