"""What a layer equals: the full cache, H2O, uniform rounding; and what its scores are."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from layers import (
    Tokens,
    config_for_positions,
    decoded,
    feed,
    feed_in_steps,
    filled,
    full_attention,
    high_positions,
    packed,
    random_tokens,
    stored_tensors,
)
from mikv import reference
from mikv.cache.config import MiKVConfig
from mikv.cache.layer import TwoTierLayer
from mikv.cache.warm_up import WarmUp
from mikv.ops import AttentionOptions
from mikv.reference import causal_mask
from numerics import MAKERS, assert_close

FULL_CACHE = MiKVConfig(importance_ratio=1.0, high="exact")
STEPS = [(100,), (1, 2, 100), (64, 100), (63, 64, 65, 100)]  # where the prompt of a test may be cut


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
    keys, values = decoded(low_tier, 160)
    for name, stored, original in (("keys", keys, tokens.keys), ("values", values, tokens.values)):
        assert_close(stored, round_to_nearest(original, bits, head_dim // 2), "float32", op=name, form=f"{low} group")


def test_attention_over_a_low_tier_is_attention_over_its_rounded_tokens() -> None:
    tokens = random_tokens(129)
    config = config_for_positions(importance_ratio=0.0, min_recent=0, sinks=0, warmup_tokens=1, group_size=16)
    layer = filled(config, tokens[:128])
    output = feed(layer, tokens[128:], float_arithmetic=True)
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
    assert_close(layer.tokens.statistics.attention, reference_scores(tokens, 100), "attention", op="prompt scores")


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
    count = packed(layer).high.counts[0]
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
