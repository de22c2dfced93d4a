"""One layer's cache as a whole: what it equals, what it never does, and what can be undone."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import (
    Tokens,
    config_for_positions,
    feed,
    feed_in_steps,
    filled,
    full_attention,
    high_positions,
    low_positions,
    packed,
    random_tokens,
    stored_tensors,
    tokens_that_tell_their_position,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from allocations import largest_allocation, total_allocation
from mikv import reference
from mikv.cache.config import MiKVConfig
from mikv.cache.layer import TwoTierLayer
from mikv.cache.warm_up import WarmUp
from mikv.errors import CacheStateError, ConfigError, NumericsError, UnsupportedModelError
from mikv.formats import BLOCK_TOKENS
from mikv.ops import AttentionOptions, causal_mask
from numerics import MAKERS, assert_close

FULL_CACHE = MiKVConfig(importance_ratio=1.0, high="exact")
STEPS = [(100,), (1, 2, 100), (64, 100), (63, 64, 65, 100)]  # where the prompt of a test may be cut
STEPWISE = range(1, 401)


def left_padding_mask(padding: list[int], num_columns: int, num_queries: int) -> Tensor:
    """(B, 1, Tq, columns): causal, and blind to the first `padding` columns of each row."""
    mask = causal_mask(num_queries, num_columns, torch.device("cpu")).repeat(len(padding), 1, 1, 1)
    for row, columns in enumerate(padding):
        mask[row, :, :, :columns] = False
    return mask


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stops", STEPS)
def test_everything_exact_is_the_full_cache_bit_for_bit(stops: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = random_tokens(150).to(dtype)
    layer = TwoTierLayer(FULL_CACHE, 0)
    edges = [0, *stops, *range(stops[-1] + 1, 151)]
    for start, stop in pairwise(edges):
        output = feed(layer, tokens[start:stop])
        expected = full_attention(
            tokens[start:stop],
            tokens.keys[:, :, :stop],
            tokens.values[:, :, :stop],
            None,
            AttentionOptions(tokens.scale),
        )
        assert torch.equal(output, expected)
    assert layer.tokens_by_tier() == {"warm_up": 150, "high": 0, "low": 0, "dropped": 0}


@pytest.mark.parametrize("settings", [{"importance_ratio": 1.0}, {"importance_ratio": 0.2, "min_recent": 500}])
def test_a_tier_that_holds_all_tokens_exact_is_the_full_cache(settings: dict[str, float]) -> None:
    """Unlike the full cache this one attends with mikv's own kernels: equal up to float32 sums."""
    tokens = random_tokens(150)
    config = config_for_positions(**({"high": "fp16", "importance_ratio": 0.0, "min_recent": 0} | settings))
    halves = Tokens(tokens.queries, tokens.keys.half().float(), tokens.values.half().float())
    output = feed_in_steps(TwoTierLayer(config, 0), halves, [100, *range(101, 151)])
    expected = full_attention(halves, halves.keys, halves.values, None, AttentionOptions(tokens.scale))
    assert_close(output, expected, "attention", op="two-tier attend", form="fp16")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_sinks_reach_both_tiers(softcap: float | None, with_sinks: bool) -> None:
    """Over a low tier of 8 bits the output stays near that of the full cache; without softcap or sinks it would not."""
    tokens = random_tokens(150)
    sinks = torch.linspace(0.0, 4.0, 4) if with_sinks else None
    layer = TwoTierLayer(MiKVConfig(low="int8", high="int8"), 0)
    feed(layer, tokens[:149], softcap=softcap, sinks=sinks)
    output = feed(layer, tokens[149:], softcap=softcap, sinks=sinks)
    expected = full_attention(
        tokens[149:], tokens.keys, tokens.values, None, AttentionOptions(tokens.scale, softcap, sinks)
    )
    assert float((output - expected).norm() / expected.norm()) < 0.02


class H2O:
    """Heavy-hitter eviction of one head in blocks of 32, after arXiv 2306.14048: positions held and their scores."""

    def __init__(self, tokens: Tokens, head: int, ratio: float, recent_share: float) -> None:
        group = tokens.queries.shape[1] // tokens.keys.shape[1]
        self.queries = tokens.queries[0, head * group : (head + 1) * group] * tokens.scale  # (R, T, D)
        self.keys, self.values = tokens.keys[0, head], tokens.values[0, head]
        self.ratio, self.recent_share = ratio, recent_share
        self.scores = torch.zeros(tokens.num_tokens)
        self.held: list[int] = []

    def prompt(self, num_tokens: int) -> None:
        logits = self.queries[:, :num_tokens] @ self.keys[:num_tokens].mT
        logits.masked_fill_(~torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril(), -torch.inf)
        self.scores[:num_tokens] += logits.softmax(-1).sum((0, 1))
        self.held = list(range(num_tokens))
        self.evict(num_tokens)

    def step(self, position: int) -> Tensor:
        self.held.append(position)
        probabilities = (self.queries[:, position] @ self.keys[self.held].mT).softmax(-1)  # (R, held)
        self.scores[self.held] += probabilities.sum(0)
        output = probabilities @ self.values[self.held]
        self.evict(position + 1)
        return output

    def evict(self, num_tokens: int) -> None:
        budget = min(num_tokens, math.ceil(self.ratio * num_tokens))
        recent = num_tokens - int(self.recent_share * budget)
        old = sorted((t for t in self.held if t < recent), key=lambda t: (float(self.scores[t]), t))
        count = max(0, min(len(self.held) - budget, len(old))) // 32 * 32
        self.held = sorted(set(self.held) - set(old[:count]))


@pytest.mark.parametrize(("ratio", "recent_share"), [(0.2, 0.5), (0.2, 0.0), (0.5, 0.9), (0.05, 0.5), (0.0, 0.5)])
def test_dropping_is_h2o(ratio: float, recent_share: float) -> None:
    """Which tokens remain, per head, and what attention over them gives, through a prompt and 150 steps."""
    tokens = random_tokens(350)
    config = MiKVConfig(
        importance_ratio=ratio,
        recent_share=recent_share,
        high="exact",
        low="drop",
        policy="h2o",
        min_recent=0,
        sinks=0,
        warmup_tokens=1,
    )
    layer = TwoTierLayer(config, 0)
    heads = [H2O(tokens, head, ratio, recent_share) for head in range(2)]
    feed(layer, tokens[:200])
    for head in heads:
        head.prompt(200)
    assert high_positions(layer) == [head.held for head in heads]
    for position in range(200, 350):
        output = feed(layer, tokens[position : position + 1])
        expected = torch.cat([head.step(position) for head in heads])[None, :, None]
        assert_close(output, expected, "attention", op=f"h2o step {position}")
        assert high_positions(layer) == [head.held for head in heads], position
    assert layer.tokens_by_tier()["low"] == 0
    assert layer.tokens_by_tier()["dropped"] == 2 * 350 // 2 - len(heads[0].held)


def round_to_nearest(x: Tensor, bits: int, group_size: int) -> Tensor:
    """MiKV Eq. 1 as the paper writes it, alpha and beta in 16 bits."""
    groups = x.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    alpha, beta = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    return (alpha * ((groups - beta) / alpha).round().clamp(0, 2**bits - 1) + beta).flatten(-2)


@pytest.mark.parametrize("head_dim", [32, 80])
@pytest.mark.parametrize(("low", "bits"), [("int8", 8), ("int4", 4), ("int3", 3), ("int2", 2)])
def test_without_a_high_tier_every_token_is_rounded_to_nearest(low: str, bits: int, head_dim: int) -> None:
    tokens = random_tokens(160, head_dim)
    config = config_for_positions(
        importance_ratio=0.0, min_recent=0, sinks=0, warmup_tokens=1, low=low, group_size=head_dim // 2
    )
    layer = filled(config, tokens, 96, *range(97, 160))
    low_tier = packed(layer).low
    assert low_tier is not None
    assert layer.tokens_by_tier() == {"warm_up": 0, "high": 0, "low": 160, "dropped": 0}
    for name, stored, original in (
        ("keys", low_tier.keys(0, 160), tokens.keys),
        ("values", low_tier.values(0, 160), tokens.values),
    ):
        assert_close(stored, round_to_nearest(original, bits, head_dim // 2), "float32", op=name, form=f"{low} group")


def test_attention_over_a_low_tier_is_attention_over_its_rounded_tokens() -> None:
    tokens = random_tokens(129)
    config = config_for_positions(importance_ratio=0.0, min_recent=0, sinks=0, warmup_tokens=1, group_size=16)
    layer = filled(config, tokens[:128])
    output = feed(layer, tokens[128:])
    keys, values = (
        torch.cat((round_to_nearest(x[:, :, :128], 4, 16), x[:, :, 128:]), 2) for x in (tokens.keys, tokens.values)
    )
    expected = full_attention(tokens[128:], keys, values, None, AttentionOptions(tokens.scale))
    assert_close(output, expected, "attention", op="attend", form="int4 group")


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("low_grid", ["lloyd-max", "group", "channel"])
@pytest.mark.parametrize("high", ["exact", "int8"])
def test_tokens_demoted_later_are_as_good_as_those_of_the_prompt(high: str, low_grid: str, maker: str) -> None:
    """All transforms on and 8 bits everywhere: after 100 steps the output is still near that of the full cache."""
    tokens = random_tokens(200, maker=maker)
    config = MiKVConfig(importance_ratio=0.0, min_recent=0, high=high, low="int8", low_grid=low_grid)
    output = feed_in_steps(layer := TwoTierLayer(config, 0), tokens, [100, *range(101, 201)])
    expected = full_attention(tokens, tokens.keys, tokens.values, None, AttentionOptions(tokens.scale))
    assert layer.tokens_by_tier()["low"] >= 160
    assert float((output - expected)[:, :, 100:].norm() / expected[:, :, 100:].norm()) < 0.03


# --- scores -----------------------------------------------------------------------------------------------------------


def reference_scores(tokens: Tokens, num_queries: int) -> Tensor:
    """What the tokens received from the last `num_queries` of them, summed over the heads of a group: (B, G, T)."""
    mask = causal_mask(num_queries, tokens.num_tokens, torch.device("cpu"))
    queries = tokens.queries[:, :, tokens.num_tokens - num_queries :]
    probabilities = reference.attention_probabilities(queries, tokens.keys, mask, tokens.scale)
    return reference.attention_received(probabilities, tokens.keys.shape[1])


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1), (8, 1)])
@pytest.mark.parametrize("stops", STEPS)
def test_prompt_scores_are_the_attention_received(stops: tuple[int, ...], heads: tuple[int, int]) -> None:
    tokens = random_tokens(100, heads=heads)
    layer = filled(MiKVConfig(policy="h2o", warmup_tokens=1000), tokens, *stops[:-1])
    assert isinstance(layer.tokens, WarmUp)
    assert_close(layer.tokens.attention, reference_scores(tokens, 100), "attention", op="prompt scores")


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1)])
def test_later_queries_add_exactly_their_attention(heads: tuple[int, int], chunk: int) -> None:
    """With a high tier that keeps all tokens exact; the new tokens begin with what they give each other."""
    tokens = random_tokens(100 + chunk, heads=heads)
    layer = filled(config_for_positions(policy="h2o", importance_ratio=0.5, min_recent=1000), tokens[:100])
    before = packed(layer).high.scores[:, :, :100].clone()
    assert_close(before, reference_scores(tokens[:100], 100), "attention", op="prompt scores")
    feed(layer, tokens[100:])
    added = packed(layer).high.scores[:, :, : 100 + chunk].clone()
    added[:, :, :100] -= before
    assert_close(added, reference_scores(tokens, chunk), "attention", op="added scores")


def test_a_step_gives_one_unit_of_attention_per_query_head() -> None:
    """Both tiers together: what the high tier and the new token did not get went to the low tier."""
    tokens = random_tokens(200)
    layer = filled(MiKVConfig(policy="h2o"), tokens[:199])
    count = packed(layer).high.table.counts[0]
    before = packed(layer).high.scores[:, :, :count].sum(-1)
    feed(layer, tokens[199:])
    gained = packed(layer).high.scores[:, :, : count + 1].sum(-1) - before
    assert bool((gained > 0).all())
    assert bool((gained < 2).all())  # two query heads per KV head, and the low tier has its share


def test_sinks_do_not_count_in_the_transforms() -> None:
    """The keys of the first tokens are outliers in most models, and they are never rounded to the low tier."""
    tokens = random_tokens(100)
    loud = Tokens(tokens.queries, tokens.keys.clone(), tokens.values.clone())
    loud.keys[:, :, :4] *= 100
    loud.values[:, :, :4] *= 100
    ours, theirs, counted = (
        stored_tensors(filled(MiKVConfig(sinks=sinks, policy="random"), fed))
        for fed, sinks in ((tokens, 4), (loud, 4), (loud, 3))
    )
    for name in ("key_transform.center", "key_transform.balancer", "value_transform.center"):
        assert torch.equal(ours[name], theirs[name])
        assert not torch.equal(ours[name], counted[name])


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["h2o", "normalized", "window", "random"])
@pytest.mark.parametrize("high", ["exact", "int8"])
def test_left_padded_rows_equal_the_same_rows_alone(high: str, policy: str) -> None:
    """Two rows of 120 and 160 tokens in one batch: the same partition, scores and outputs as each on its own."""
    config = MiKVConfig(high=high, policy=policy, protected=((10, 14),))
    tokens = random_tokens(240, batch=2)
    lengths, padding = (120, 160), [40, 0]
    batch = TwoTierLayer(config, 0)
    outputs = []
    for start, stop in [(0, 160), (160, 167), *pairwise(range(167, 241))]:
        mask = left_padding_mask(padding, stop, stop - start)
        outputs.append(feed(batch, tokens[start:stop], mask))
    together = torch.cat(outputs, dim=2)
    for row, (length, skipped) in enumerate(zip(lengths, padding, strict=True)):
        alone = TwoTierLayer(config, 0)
        own = tokens.row(row)[skipped:]
        expected = feed_in_steps(alone, own, [length, length + 7, *range(length + 8, length + 81)])
        assert_close(together[row : row + 1, :, skipped:], expected, "chained", op=f"row {row}")
        assert high_positions(batch, row) == high_positions(alone)
        assert batch.columns.num_tokens[row] == alone.columns.num_tokens[0] == length + 80


def test_padding_may_hold_anything() -> None:
    config = MiKVConfig()
    tokens = random_tokens(160, batch=2)
    other = Tokens(tokens.queries.clone(), tokens.keys.clone(), tokens.values.clone())
    for x in (other.queries, other.keys, other.values):
        x[0, :, :40] = 1e4
    layers = [TwoTierLayer(config, 0), TwoTierLayer(config, 0)]
    for layer, batch in zip(layers, (tokens, other), strict=True):
        feed(layer, batch, left_padding_mask([40, 0], 160, 160))
    ours, theirs = (stored_tensors(layer) for layer in layers)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("padding_sees", [False, True])
def test_padding_amid_the_tokens_is_skipped(padding_sees: bool) -> None:
    """A second turn that pads its rows: the padding is stored nowhere, and what it looks at does not matter."""
    config = config_for_positions(min_recent=8, sinks=0)
    tokens = tokens_that_tell_their_position(150)
    padded = Tokens(
        *(
            torch.cat((x[:, :, :100], x[:, :, :10] * 7, x[:, :, 100:]), 2)
            for x in (tokens.queries, tokens.keys, tokens.values)
        )
    )
    layer = TwoTierLayer(config, 0)
    feed(layer, padded[:100])
    mask = causal_mask(60, 160, torch.device("cpu")).clone()
    mask[:, :, :10] = padding_sees
    mask[..., 100:110] = False
    output = feed(layer, padded[100:], mask)
    plain = filled(config, tokens[:100])
    assert_close(output[:, :, 10:], feed(plain, tokens[100:]), "chained", op="attend past padding")
    assert high_positions(layer) == high_positions(plain)
    assert low_positions(layer) == low_positions(plain)
    assert layer.columns.num_tokens == [150]
    assert layer.columns.num_columns == 160


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask.__setitem__((..., 3), False), "column 3 of row 0"),
        (lambda mask: mask.__setitem__((0, 0, 2, 50), False), "column 50 of row 0"),
    ],
)
def test_a_mask_that_hides_stored_tokens_is_refused(change: object, message: str) -> None:
    tokens = random_tokens(104)
    layer = filled(MiKVConfig(), tokens[:100])
    mask = causal_mask(4, 104, torch.device("cpu")).clone()
    change(mask)  # type: ignore[operator]
    with pytest.raises(UnsupportedModelError, match=message):
        feed(layer, tokens[100:], mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 4, 4, 104, dtype=torch.bool), "one mask for all heads"),
        (torch.ones(1, 1, 4, 90, dtype=torch.bool), "the mask of the whole sequence"),
        (torch.full((1, 1, 4, 104), -0.5), "position bias"),
    ],
)
def test_masks_of_another_kind_are_refused(mask: Tensor, message: str) -> None:
    tokens = random_tokens(104)
    layer = filled(MiKVConfig(), tokens[:100])
    with pytest.raises(UnsupportedModelError, match=message):
        feed(layer, tokens[100:], mask)


def test_additive_masks_are_read_like_boolean_ones() -> None:
    tokens = random_tokens(104, batch=2)
    boolean = [left_padding_mask([30, 0], stop, size) for stop, size in ((100, 100), (104, 4))]
    outputs = []
    for masks in (boolean, [torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min) for m in boolean]):
        layer = TwoTierLayer(MiKVConfig(), 0)
        for span, mask, shown in zip((slice(0, 100), slice(100, 104)), masks, boolean, strict=True):
            part = tokens[span]

            def exact(keys: Tensor, values: Tensor, part: Tokens = part, shown: Tensor = shown) -> Tensor:
                return full_attention(part, keys, values, shown, AttentionOptions(part.scale))

            outputs.append(
                layer.attend(part.queries, part.keys, part.values, mask, AttentionOptions(part.scale), exact)
            )
    assert torch.equal(outputs[1], outputs[3])


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "options"),
    [("h2o", {}), ("normalized", {"stride": 1}), ("random", {}), ("key_norm", {}), ("recency", {})],
)
@pytest.mark.parametrize("stops", STEPS)
def test_a_warm_up_in_chunks_equals_one_at_once(stops: tuple[int, ...], policy: str, options: dict[str, int]) -> None:
    """As long as the last chunk ends it. The scores are float32 sums in another order, everything else is the same."""
    tokens = random_tokens(100)
    config = MiKVConfig(policy=policy, policy_options=options, warmup_tokens=100)
    at_once, in_chunks = stored_tensors(filled(config, tokens)), stored_tensors(filled(config, tokens, *stops[:-1]))
    for name, expected in at_once.items():
        budget = "attention" if name == "high.score" else "bitwise"
        assert_close(in_chunks[name], expected, budget, op=name)


@pytest.mark.parametrize(("policy", "options"), [("window", {"window": 8}), ("normalized", {"stride": 4})])
def test_policies_that_ask_some_queries_see_other_ones_in_chunks(policy: str, options: dict[str, int]) -> None:
    """Each chunk ends with a query that counts, so the scores depend on where chunks end."""
    tokens = random_tokens(100)
    config = MiKVConfig(policy=policy, policy_options=options, warmup_tokens=100)
    at_once, in_chunks = (stored_tensors(filled(config, tokens, *stops)) for stops in ((), (51,)))
    assert not torch.equal(at_once["high.score"], in_chunks["high.score"])


@given(st.data())
def test_tiers_have_the_same_sizes_however_the_tokens_came(data: st.DataObject) -> None:
    """Later chunks attend to the packed cache, so the choice of tokens may differ; how many are where may not."""
    num_tokens = data.draw(st.integers(1, 300))
    stops = sorted(data.draw(st.sets(st.integers(1, num_tokens), max_size=12)) | {num_tokens})
    config = config_for_positions(
        importance_ratio=data.draw(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9])),
        recent_share=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        min_recent=data.draw(st.integers(0, 40)),
        sinks=data.draw(st.integers(0, 6)),
        warmup_tokens=data.draw(st.integers(0, 100)),
        protected=data.draw(st.sampled_from([(), ((5, 30),), ((0, 3), (40, 200))])),
        low=data.draw(st.sampled_from(["int4", "drop"])),
    )
    tokens = random_tokens(num_tokens, heads=(2, 1))
    at_once, in_chunks = filled(config, tokens), filled(config, tokens, *stops[:-1])
    assert in_chunks.tokens_by_tier() == at_once.tokens_by_tier()


# --- taking back ------------------------------------------------------------------------------------------------------


def test_crop_and_continue_equals_never_having_fed_the_tokens() -> None:
    """Policies without attention statistics leave no trace of the tokens that were taken back."""
    config = config_for_positions(policy="key_norm", min_recent=16)
    tokens = random_tokens(200)
    straight = filled(config, tokens[:190])
    layer = filled(config, tokens[:190])
    feed(layer, tokens[190:200])
    layer.crop(10)
    assert (layer.columns.num_columns, layer.columns.num_tokens) == (190, [190])
    assert high_positions(layer) == high_positions(straight)
    ours, theirs = feed(layer, tokens[190:]), feed(straight, tokens[190:])
    assert_close(ours, theirs, "attention", op="attend after crop")
    assert high_positions(layer) == high_positions(straight)


def test_crop_during_warm_up_takes_back_everything_asked() -> None:
    tokens = random_tokens(60)
    config = MiKVConfig(warmup_tokens=50, policy="random", balance_keys=False)
    layer = filled(config, tokens[:40])
    layer.crop(25)
    feed(layer, tokens[15:60])
    expected = stored_tensors(filled(config, tokens))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored_tensors(layer).items())


@pytest.mark.parametrize("config", [FULL_CACHE, MiKVConfig(warmup_tokens=500)])
def test_a_cache_cropped_to_nothing_can_be_filled_again(config: MiKVConfig) -> None:
    tokens = random_tokens(60)
    layer = filled(config, tokens)
    layer.crop(60)
    assert layer.columns.num_columns == 0
    output = feed(layer, tokens)
    expected = full_attention(tokens, tokens.keys, tokens.values, None, AttentionOptions(tokens.scale))
    assert torch.equal(output, expected)


def test_tiers_cropped_to_nothing_can_be_filled_again() -> None:
    config = config_for_positions(importance_ratio=1.0, high="fp16")
    tokens = random_tokens(100)
    layer = filled(config, tokens)
    layer.crop(100)
    assert layer.tokens_by_tier() == {"warm_up": 0, "high": 0, "low": 0, "dropped": 0}
    output = feed(layer, tokens)
    expected = full_attention(tokens, tokens.keys, tokens.values, None, AttentionOptions(tokens.scale))
    assert_close(output, expected, "attention", op="attend after cropping all")


@pytest.mark.parametrize("low", ["int4", "drop"])
def test_crop_of_demoted_tokens_is_refused_and_changes_nothing(low: str) -> None:
    layer = filled(config_for_positions(min_recent=16, low=low), random_tokens(200, batch=2), 100, 170)
    before, meta = stored_tensors(layer), str(layer.state()[1])
    with pytest.raises(CacheStateError, match=r"cannot take back 150 tokens.*raise min_recent, now 16"):
        layer.crop(150)
    after = stored_tensors(layer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert str(layer.state()[1]) == meta


def test_the_refusal_names_how_many_tokens_can_be_taken_back() -> None:
    layer = filled(config_for_positions(min_recent=16, recent_share=0.0, importance_ratio=0.0), random_tokens(200), 170)
    with pytest.raises(CacheStateError) as refusal:
        layer.crop(150)
    named = int(str(refusal.value).split("only the newest ")[1].split()[0])
    assert named >= 16
    with pytest.raises(CacheStateError):
        layer.crop(named + 1)
    layer.crop(named)
    assert layer.columns.num_columns == 200 - named


@pytest.mark.parametrize("num_tokens", [10, 100])
def test_more_tokens_than_there_are_cannot_be_taken_back(num_tokens: int) -> None:
    layer = filled(MiKVConfig(), random_tokens(num_tokens))
    with pytest.raises(CacheStateError, match=f"cannot take back {num_tokens + 1} tokens of {num_tokens}"):
        layer.crop(num_tokens + 1)


@pytest.mark.parametrize("steps", [1, 20, 100])
def test_whatever_came_since_demotion_was_held_can_be_taken_back(steps: int) -> None:
    config = config_for_positions(min_recent=0, recent_share=0.0, importance_ratio=0.0, sinks=0)
    tokens = tokens_that_tell_their_position(100 + steps)
    layer = filled(config, tokens[:100])
    held = high_positions(layer)
    layer.hold_demotion()
    for position in range(100, 100 + steps):
        feed(layer, tokens[position : position + 1])
    assert layer.holds_demotion
    layer.crop(steps)
    assert high_positions(layer) == held
    assert layer.columns.num_tokens == [100]


def test_crop_demotes_what_was_held_back_and_goes_on_holding() -> None:
    config = config_for_positions(importance_ratio=0.1, min_recent=0, sinks=0)
    tokens = tokens_that_tell_their_position(200)
    layer = filled(config, tokens[:100])
    layer.hold_demotion()
    feed(layer, tokens[100:200])
    assert layer.tokens_by_tier()["low"] == 64
    layer.crop(0)
    assert layer.holds_demotion
    assert layer.tokens_by_tier() == filled(config, tokens).tokens_by_tier()
    assert [sorted(high + low) for high, low in zip(high_positions(layer), low_positions(layer), strict=True)] == [
        list(range(200))
    ] * 2


@pytest.mark.parametrize("config", [MiKVConfig(), MiKVConfig(warmup_tokens=500), FULL_CACHE, MiKVConfig(low="drop")])
def test_selected_rows_go_on_as_if_they_had_been_alone(config: MiKVConfig) -> None:
    """Beam search: rows are dropped, swapped and repeated."""
    tokens = random_tokens(160, batch=3)
    layer = filled(config, tokens[:120])
    order = [2, 0, 0, 2]
    layer.select_rows(torch.tensor(order))
    chosen = Tokens(tokens.queries[order], tokens.keys[order], tokens.values[order])
    for start in range(120, 160):
        output = feed(layer, chosen[start : start + 1])
    for row, source in enumerate(order):
        alone = filled(config, tokens.row(source)[:120])
        for start in range(120, 160):
            expected = feed(alone, tokens.row(source)[start : start + 1])
        assert_close(output[row : row + 1], expected, "chained", op=f"row {row}")


def test_rows_of_different_lengths_are_selected_with_their_padding() -> None:
    config = MiKVConfig()
    tokens = random_tokens(200, batch=2)
    layer = TwoTierLayer(config, 0)
    feed(layer, tokens[:160], left_padding_mask([40, 0], 160, 160))
    layer.select_rows(torch.tensor([0]))
    alone = filled(config, tokens.row(0)[40:160])
    output = feed(layer, tokens.row(0)[160:], left_padding_mask([40], 200, 40))
    assert_close(output, feed(alone, tokens.row(0)[160:]), "chained", op="selected row")
    assert high_positions(layer) == high_positions(alone)


@pytest.mark.parametrize(
    "config",
    [
        MiKVConfig(),
        MiKVConfig.preset("paper-int2"),
        MiKVConfig(warmup_tokens=500),
        FULL_CACHE,
        MiKVConfig(low="drop"),
        MiKVConfig(low_grid="channel", policy="window"),
    ],
)
def test_a_restored_layer_goes_on_like_the_original(config: MiKVConfig) -> None:
    tokens = random_tokens(250, batch=2)
    layer = TwoTierLayer(config, 0)
    feed(layer, tokens[:160], left_padding_mask([30, 0], 160, 160))
    tensors, meta = layer.state()
    copy = TwoTierLayer(config, 0)
    copy.restore({name: tensor.clone() for name, tensor in tensors.items()}, meta)
    copy.to("cpu")
    for start, stop in [(160, 210), *pairwise(range(210, 251))]:
        mask = left_padding_mask([30, 0], stop, stop - start)
        assert torch.equal(feed(copy, tokens[start:stop], mask), feed(layer, tokens[start:stop], mask))
    ours, theirs = stored_tensors(layer), stored_tensors(copy)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert copy.tokens_by_tier() == layer.tokens_by_tier()


def test_an_empty_layer_is_saved_and_restored() -> None:
    layer = TwoTierLayer(MiKVConfig(), 0)
    layer.restore(*TwoTierLayer(MiKVConfig(), 0).state())
    assert layer.bytes_by_part() == dict.fromkeys(layer.bytes_by_part(), 0)
    tokens = random_tokens(70)
    assert torch.equal(feed(layer, tokens), feed(TwoTierLayer(MiKVConfig(), 0), tokens))


def test_reset_forgets_everything() -> None:
    tokens = random_tokens(200)
    layer = filled(MiKVConfig(), tokens)
    layer.hold_demotion()
    layer.reset()
    assert sum(layer.bytes_by_part().values()) == 0
    assert torch.equal(feed(layer, tokens), feed(TwoTierLayer(MiKVConfig(), 0), tokens))
    fresh = stored_tensors(filled(MiKVConfig(), tokens))
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in stored_tensors(layer).items())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("position", [30, 95])
@pytest.mark.parametrize("config", [MiKVConfig(), MiKVConfig.preset("paper-int2")])
def test_nan_and_inf_in_a_prompt_name_the_layer(config: MiKVConfig, position: int, which: str, bad: float) -> None:
    tokens = random_tokens(100)
    getattr(tokens, which)[0, 1, position, 5] = bad
    with pytest.raises(NumericsError, match=r"layer 17: .*NaN or Inf"):
        feed(TwoTierLayer(config, 17), tokens)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize(
    "config", [MiKVConfig(), MiKVConfig.preset("paper-int2"), MiKVConfig(low="drop", high="exact")]
)
def test_nan_and_inf_in_a_step_name_the_layer(config: MiKVConfig, which: str, bad: float) -> None:
    tokens = random_tokens(101)
    getattr(tokens, which)[0, 1, 100, 5] = bad
    layer = TwoTierLayer(config, 17)
    feed(layer, tokens[:100])
    with pytest.raises(NumericsError, match=r"layer 17: .*NaN or Inf"):
        feed(layer, tokens[100:])


def test_a_head_dim_that_cannot_be_packed_is_refused_before_any_work() -> None:
    layer = TwoTierLayer(MiKVConfig(), 0)
    with pytest.raises(ConfigError, match="head_dim=36 is not a multiple of 8"):
        feed(layer, random_tokens(10, head_dim=36))
    assert layer.tokens is None


def test_steps_may_be_taken_with_gradients_on_but_not_back() -> None:
    """Scripts that forget torch.no_grad() work, and the cache holds on to no graph; training through it is stopped."""
    tokens = random_tokens(150)
    tracked = Tokens(*(x.clone().requires_grad_() for x in (tokens.queries, tokens.keys, tokens.values)))
    stops = [100, 110, *range(111, 151)]
    output = feed_in_steps(layer := TwoTierLayer(MiKVConfig(), 0), tracked, stops)
    assert torch.equal(output, feed_in_steps(TwoTierLayer(MiKVConfig(), 0), tokens, stops))
    assert not any(tensor.requires_grad for tensor in layer.state()[0].values())
    with pytest.raises(CacheStateError, match="no gradients; train with use_cache=False"):
        output.sum().backward()


@pytest.mark.parametrize("config", [MiKVConfig(), MiKVConfig(warmup_tokens=500), FULL_CACHE])
@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_a_layer_filled_in_one_mode_goes_on_in_another(
    modes: tuple[type[torch.inference_mode], type[torch.no_grad]], config: MiKVConfig
) -> None:
    """PyTorch forbids writing to tensors of inference mode outside of it; a cache is written to all the time."""
    first, second = modes
    tokens = random_tokens(190, batch=2)
    layer = TwoTierLayer(config, 0)
    with first():
        feed(layer, Tokens(tokens.queries.clone(), tokens.keys.clone(), tokens.values.clone())[:150])
        layer.select_rows(torch.tensor([1, 0]))
        tensors, meta = layer.state()
        layer.restore({name: tensor.clone() for name, tensor in tensors.items()}, meta)
        layer.select_rows(torch.tensor([1, 0]))
        layer.to("cpu")
    with second():
        for position in range(150, 190):
            output = feed(layer, tokens[position : position + 1])
        layer.crop(2)
    straight = feed_in_steps(TwoTierLayer(config, 0), tokens, [150, *range(151, 191)])
    assert_close(output, straight[:, :, -1:], "attention", op="last step")
    assert layer.columns.num_tokens == [188, 188]


# --- memory and time --------------------------------------------------------------------------------------------------

LONG = 4096


def long_layer(config: MiKVConfig, num_tokens: int = LONG, head_dim: int = 64) -> tuple[TwoTierLayer, Tokens]:
    """A layer with `num_tokens` tokens, and the token that comes next. The prompt's own attention is left out."""
    tokens = random_tokens(num_tokens + 1, head_dim, heads=(2, 1))
    layer = TwoTierLayer(config, 0)
    prompt = tokens[:num_tokens]
    layer.attend(
        prompt.queries, prompt.keys, prompt.values, None, AttentionOptions(prompt.scale), lambda k, v: prompt.queries
    )
    return layer, tokens[num_tokens:]


@pytest.mark.parametrize("preset", ["paper-int2", "lossless", "balanced", "small"])
def test_no_step_ever_holds_an_unpacked_copy_of_the_cache(preset: str) -> None:
    """Not of the keys of one layer in 16 bits: 33 steps, one of which demotes a block and moves the low tier."""
    layer, token = long_layer(MiKVConfig.preset(preset))
    unpacked_keys = LONG * 64 * 2
    blocks = layer.tokens_by_tier()["low"]
    largest = max(largest_allocation(lambda: feed(layer, token)) for _ in range(BLOCK_TOKENS + 8))
    assert layer.tokens_by_tier()["low"] > blocks
    assert 0 < largest < unpacked_keys


def test_a_high_tier_that_is_all_protected_is_not_moved_at_every_step() -> None:
    layer, token = long_layer(MiKVConfig(protected=((0, LONG),)))
    feed(layer, token)
    one_part = LONG * 64
    assert layer.tokens_by_tier()["high"] == LONG + 1
    assert 0 < largest_allocation(lambda: feed(layer, token)) < one_part


def test_a_prompt_never_holds_a_number_per_query_and_token() -> None:
    largest = largest_allocation(lambda: long_layer(MiKVConfig(), head_dim=8))
    assert 0 < largest < LONG * LONG  # not even a byte each


def test_a_long_chunk_never_holds_a_number_per_query_and_token() -> None:
    layer, _ = long_layer(MiKVConfig(), 64, head_dim=8)
    tokens = random_tokens(LONG, 8, heads=(2, 1))
    largest = largest_allocation(lambda: feed(layer, tokens))
    assert 0 < largest < LONG * LONG


def test_a_step_costs_as_much_as_there_are_tokens() -> None:
    """Twice the tokens, twice the bytes and multiply-adds: nothing grows with the square."""
    costs = []
    for num_tokens in (2048, 4096):
        layer, token = long_layer(MiKVConfig(), num_tokens)
        with FlopCounterMode(display=False) as flops:
            nbytes = total_allocation(lambda layer=layer, token=token: feed(layer, token))
        costs.append((nbytes, flops.get_total_flops()))
    (small_bytes, small_flops), (large_bytes, large_flops) = costs
    assert small_bytes > 0
    assert small_flops > 0
    assert large_bytes < 2.2 * small_bytes
    assert large_flops < 2.2 * small_flops


@pytest.mark.parametrize("config", [FULL_CACHE, MiKVConfig(), MiKVConfig(importance_ratio=1.0, high="int8")])
def test_growth_is_amortised(config: MiKVConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 2,000 steps the bytes that moving to larger tables copies are a small multiple of the final size."""
    tokens = random_tokens(64, 8, heads=(1, 1))
    layer = filled(config, tokens)
    moves, copied, sizes = 0, 0, {}
    for _ in range(2000):
        feed(layer, tokens[:1])
        now = {name: tensor.untyped_storage() for name, tensor in layer.state()[0].items()}
        for name, storage in now.items():
            if name in sizes and storage.data_ptr() != sizes[name][0]:
                moves += 1
                copied += sizes[name][1]
            sizes[name] = (storage.data_ptr(), storage.nbytes())
    final = sum(nbytes for _, nbytes in sizes.values())
    assert copied <= 40 * final, f"{moves} moves copied {copied} bytes of a cache of {final}"


def test_a_long_chunk_does_not_leave_the_high_tier_oversized() -> None:
    config = MiKVConfig()
    tokens = random_tokens(1000, 8, heads=(1, 1))
    in_chunks, at_once = filled(config, tokens, 100), filled(config, tokens)
    slots = packed(in_chunks).high.table.capacity
    assert slots <= packed(at_once).high.table.capacity + BLOCK_TOKENS
    assert sum(in_chunks.bytes_by_part().values()) <= 1.05 * sum(at_once.bytes_by_part().values())
