"""No prompt breaks the statistics: transforms are fitted on enough, and where there is not enough, floors hold.

Errors are those of attention after the prompt, as a share of its root mean square, in heads of 64 and of 128 channels.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layers import Tokens, feed, filled, full_attention, left_padding_mask, random_tokens
from mikv.cache.basis import LEAST_DIFFERENT, LONGEST_WARM_UP
from mikv.cache.config import MiKVConfig
from mikv.cache.layer import TwoTierLayer
from mikv.cache.packed import Packed
from mikv.cache.warm_up import WarmUp
from mikv.ops import AttentionOptions

PRESETS = ["balanced", "small"]
HEAD_DIMS = [64, 128]


def repeated(tokens: Tokens, *which: int, times: int) -> Tokens:
    """The tokens `which`, one after the other, over and over; keys turn slowly in some channels, as positions do."""
    index = torch.tensor(which * times)
    chosen = Tokens(tokens.queries[:, :, index], tokens.keys[:, :, index].clone(), tokens.values[:, :, index])
    turning = 0.3 * torch.arange(len(index))[:, None] * torch.linspace(1, 0.01, 8)
    chosen.keys[..., :8] += torch.sin(turning)
    return chosen


def joined(*parts: Tokens) -> Tokens:
    return Tokens(*(torch.cat([getattr(part, name) for part in parts], 2) for name in ("queries", "keys", "values")))


def text(head_dim: int, num_tokens: int = 700, batch: int = 1) -> Tokens:
    """Tokens whose key channels have offsets, and differ in size by a hundred."""
    plain = random_tokens(num_tokens, head_dim, batch)
    size = torch.logspace(-1, 1, head_dim)
    return replace(plain, keys=plain.keys * size + 3 * size, queries=plain.queries / size)


def error_after(config: MiKVConfig, *steps: Tokens, read: int = 40) -> float:
    """The error of the last `read` tokens' attention, after `steps` were read one after the other."""
    layer, everything = TwoTierLayer(config, 0), joined(*steps)
    for step in (*steps[:-1], steps[-1][: steps[-1].num_tokens - read]):
        feed(layer, step)
    assert isinstance(layer.tokens, Packed)
    last = everything[everything.num_tokens - read :]
    expected = full_attention(last, everything.keys, everything.values, None, AttentionOptions(last.scale))
    return float((feed(layer, last) - expected).norm() / expected.norm())


def starts(head_dim: int) -> dict[str, Tokens]:
    """Prompts that say nothing of what follows."""
    tokens = text(head_dim)
    return {
        "one token": repeated(tokens, 5, times=80),
        "240 of it": repeated(tokens, 5, times=240),
        "two in turns": repeated(tokens, 5, 9, times=60),
        "longer than any warm-up": repeated(tokens, 5, times=LONGEST_WARM_UP + 40),
    }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("start", ["one token", "240 of it", "two in turns"])
def test_what_follows_a_degenerate_start_is_as_right_as_alone(start: str, head_dim: int, preset: str) -> None:
    config, tokens = MiKVConfig.preset(preset), text(head_dim)
    alone = error_after(config, tokens)
    assert error_after(config, starts(head_dim)[start], tokens) < 2 * alone


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_start_that_is_longer_than_any_warm_up_costs_a_few_times_the_error(head_dim: int, preset: str) -> None:
    """Without the floor it is more than the signal."""
    config, tokens = MiKVConfig.preset(preset), text(head_dim)
    start = starts(head_dim)["longer than any warm-up"]
    layer = filled(config, start)
    assert isinstance(layer.tokens, Packed)  # memory is saved all the same
    assert error_after(config, start, tokens) < 6 * error_after(config, tokens)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_another_domain_after_a_short_start(head_dim: int, preset: str) -> None:
    """The first 80 tokens have other offsets and sizes of channels than all that follow."""
    config, tokens = MiKVConfig.preset(preset), text(head_dim)
    other = replace(tokens, keys=tokens.keys.flip(3), values=2 * tokens.values.flip(3))[:80]
    other = replace(other, queries=other.queries.flip(3))
    assert error_after(config, other, tokens) < 12 * error_after(config, tokens)


@pytest.mark.parametrize("config", [MiKVConfig.preset(name) for name in PRESETS], ids=PRESETS)
def test_a_row_of_a_few_tokens_beside_a_long_one_takes_its_statistics(config: MiKVConfig) -> None:
    tokens = text(64, 400, batch=2)
    alone = error_after(config, tokens.row(0))
    layer = TwoTierLayer(config, 0)
    feed(layer, tokens[:360], left_padding_mask([0, 355], 360, 360))
    assert isinstance(layer.tokens, Packed)
    last = tokens[360:]
    mask = left_padding_mask([0, 355], 400, 40)
    expected = full_attention(last, tokens.keys, tokens.values, mask, AttentionOptions(last.scale))
    difference = (feed(layer, last, mask) - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert float(difference[1]) < 2 * alone


@pytest.mark.parametrize("preset", PRESETS)
def test_a_warm_up_goes_on_until_enough_tokens_differ(preset: str) -> None:
    tokens = text(64)
    layer = filled(MiKVConfig.preset(preset), repeated(tokens, 5, times=100))
    assert isinstance(layer.tokens, WarmUp)
    for at in range(100, 100 + LEAST_DIFFERENT - 2):
        feed(layer, tokens[at : at + 1])
    assert isinstance(layer.tokens, WarmUp)
    for at in range(200, 203):
        feed(layer, tokens[at : at + 1])
    assert isinstance(layer.tokens, Packed)


def test_values_that_share_a_large_bias_are_not_taken_for_the_same() -> None:
    tokens = text(64, 100)
    biased = replace(tokens, values=tokens.values + 5)
    assert isinstance(filled(MiKVConfig(), biased).tokens, Packed)


def test_what_is_read_most_is_rounded_best() -> None:
    """Values are centred where attention is, so that the errors of tokens that are alike do not add up."""
    tokens = text(64)
    start = repeated(tokens, 5, times=80)
    heavy: Tensor = start.values.mean(2)
    layer = filled(MiKVConfig(), joined(start, tokens), 80)
    assert isinstance(layer.tokens, Packed)
    center = layer.tokens.transforms[1].center
    assert center is not None
    plain = joined(start, tokens).values[:, :, 4:].mean(2)
    assert (center[:, :, 0] - heavy).norm() < (plain - heavy).norm()
