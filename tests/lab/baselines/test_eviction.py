"""H2O, SnapKV and StreamingLLM keep the tokens that their papers keep, in no more bytes than their names allow."""

from itertools import pairwise

import pytest
import torch
from layer_steps import HEAD_DIM, NUM_KV_HEADS, Steps, kept_positions

from mikv.cache.policies import make_policy
from mikv.cache.policies.snapkv import SnapKV
from mikv.cache_names import parse_cache
from mikv.errors import ConfigError
from numerics import assert_close
from tiny import tiny_model

NUM_TOKENS = 400


def filled_layer(name: str, steps: Steps, num_prompt: int = NUM_TOKENS):
    cache = parse_cache(name).make(tiny_model(num_hidden_layers=1), NUM_TOKENS)
    steps.feed(cache.layers[0], 0, num_prompt)
    return cache.config, cache.layers[0]


def highest(scores: torch.Tensor, count: int) -> set[int]:
    """The positions of the highest scores; of equal ones the newest."""
    order = sorted(range(len(scores)), key=lambda position: (float(scores[position]), position))
    return set(order[len(order) - count :])


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_h2o_keeps_the_newest_and_those_with_most_attention_so_far(share: float) -> None:
    steps = Steps.random(NUM_TOKENS)
    config, layer = filled_layer(f"h2o@{share}", steps)
    budget = config.high_budget(NUM_TOKENS)
    received = steps.attention(NUM_TOKENS, torch.arange(NUM_TOKENS)).sum(1)  # (G, T)
    for head, kept in enumerate(kept_positions(layer)):
        assert budget <= len(kept) < budget + 32
        recent = set(range(NUM_TOKENS - budget // 2, NUM_TOKENS))
        assert kept == recent | highest(received[head, : NUM_TOKENS - budget // 2], len(kept) - budget // 2)


def test_h2o_goes_on_adding_up_while_it_decodes() -> None:
    steps = Steps.random(NUM_TOKENS)
    _, layer = filled_layer("h2o@0.3", steps, NUM_TOKENS - 1)
    high = layer.tokens.tokens.high
    count = high.counts[0]
    before, kept = high.scores[0, :, :count].clone(), high.positions[0, :, :count].long()
    steps.feed(layer, NUM_TOKENS - 1, NUM_TOKENS)
    keys = steps.keys[0].half().float()
    held = torch.stack([torch.cat((keys[g, kept[g]], steps.keys[0, g, -1:])) for g in range(NUM_KV_HEADS)])
    queries = steps.queries[0, :, -1].unflatten(0, (NUM_KV_HEADS, -1))
    received = (queries @ held.mT * HEAD_DIM**-0.5).softmax(-1).sum(1)
    assert_close(high.scores[0, :, :count], before + received[:, :-1], "native high", op="scores")
    assert_close(high.scores[0, :, count], received[:, -1], "native high", op="score of the new token")


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_snapkv_keeps_its_window_and_what_the_window_looked_at(share: float) -> None:
    steps, window, pool = Steps.random(NUM_TOKENS), 32, 7
    _, layer = filled_layer(f"snapkv@{share}", steps)
    before = NUM_TOKENS - window
    received = steps.attention(NUM_TOKENS, torch.arange(before, NUM_TOKENS)).sum(1)[:, :before]
    for head, kept in enumerate(kept_positions(layer)):
        pooled = torch.stack([received[head, max(0, t - pool // 2) : t + pool // 2 + 1].max() for t in range(before)])
        assert set(range(before, NUM_TOKENS)) <= kept
        assert kept == set(range(before, NUM_TOKENS)) | highest(pooled, len(kept) - window)


def test_snapkv_does_not_pool_its_window_into_what_precedes_it() -> None:
    attention = torch.zeros(1, 1, 40)
    attention[0, 0, 3], attention[0, 0, 8] = 1.0, 9.0  # before a window of 32, and its first token
    scores = make_policy(SnapKV.name, {}).initial_scores(torch.zeros(1, 1, 40, 8), attention)
    assert scores[0, 0, :8].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]


def test_streaming_keeps_four_sinks_and_the_newest() -> None:
    steps = Steps.random(NUM_TOKENS)
    _, layer = filled_layer("streaming@0.3", steps, 250)
    steps.feed_one_by_one(layer, 250, NUM_TOKENS)
    for kept in kept_positions(layer):
        assert kept == set(range(4)) | set(range(NUM_TOKENS - len(kept) + 4, NUM_TOKENS))


@pytest.mark.parametrize("name", ["h2o", "snapkv", "streaming"])
@pytest.mark.parametrize(
    ("num_tokens", "share"), [(300, 0.25), (300, 0.5), (1024, 0.2), (1024, 0.5), (3000, 0.1), (3000, 0.25), (3000, 0.5)]
)
def test_all_bytes_stay_within_the_share_and_use_it(name: str, num_tokens: int, share: float) -> None:
    named = parse_cache(f"{name}@{share}")
    cache = named.make(tiny_model(), num_tokens)
    steps = Steps.random(num_tokens)
    stops = (0, num_tokens - 46, *range(num_tokens - 5, num_tokens + 1))
    for start, stop in pairwise(stops):
        for layer in cache.layers:
            steps.feed(layer, start, stop)
    slot, fp16_token = 2 * HEAD_DIM * 2 + 4 + 4, 2 * HEAD_DIM * 2
    heads = len(cache.layers) * NUM_KV_HEADS
    allowed = share * heads * num_tokens * fp16_token
    assert named.bytes(cache) <= allowed
    assert named.bytes(cache) > allowed - heads * 32 * slot
    high = cache.layers[0].tokens.tokens.high
    assert named.bytes(cache) == heads * high.capacity * slot
    assert high.capacity - 64 < high.counts[0] <= high.capacity


@pytest.mark.parametrize("name", ["h2o@0.2", "snapkv@0.2", "streaming@0.2"])
def test_a_share_in_which_nothing_fits_is_refused(name: str) -> None:
    """One block of tokens and one of slack are 22 % of 300 tokens."""
    message = r"is not possible with 300 tokens on this model: the smallest such cache takes 0\.2200.*a larger share"
    with pytest.raises(ConfigError, match=message):
        parse_cache(name).make(tiny_model(), 300)
