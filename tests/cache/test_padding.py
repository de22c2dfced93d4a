"""Batches of rows of different lengths: padding is stored nowhere and changes nothing."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from layers import (
    Tokens,
    config_for_positions,
    feed,
    feed_in_steps,
    filled,
    full_attention,
    high_positions,
    left_padding_mask,
    low_positions,
    random_tokens,
    stored_tensors,
    tokens_that_tell_their_position,
)
from mikv.cache.config import MiKVConfig
from mikv.cache.layer import TwoTierLayer
from mikv.errors import UnsupportedModelError
from mikv.ops import AttentionOptions
from mikv.reference import causal_mask
from numerics import assert_close


@pytest.mark.parametrize("policy", ["h2o", "normalized", "window", "random"])
@pytest.mark.parametrize("high", ["exact", "int8"])
def test_left_padded_rows_equal_the_same_rows_alone(high: str, policy: str) -> None:
    """Two rows of 120 and 160 tokens in one batch: the same partition, scores and outputs as each on its own."""
    config = MiKVConfig(high=high, policy=policy, protected=((10, 14),))
    tokens = random_tokens(200, batch=2)
    lengths, padding = (120, 160), [40, 0]
    batch = TwoTierLayer(config, 0)
    outputs = []
    for start, stop in [(0, 160), (160, 167), *pairwise(range(167, 201))]:
        mask = left_padding_mask(padding, stop, stop - start)
        outputs.append(feed(batch, tokens[start:stop], mask))
    together = torch.cat(outputs, dim=2)
    for row, (length, skipped) in enumerate(zip(lengths, padding, strict=True)):
        alone = TwoTierLayer(config, 0)
        own = tokens.row(row)[skipped:]
        expected = feed_in_steps(alone, own, [length, length + 7, *range(length + 8, length + 41)])
        assert_close(together[row : row + 1, :, skipped:], expected, "chained", op=f"row {row}")
        assert high_positions(batch, row) == high_positions(alone)
        assert batch.columns.num_tokens[row] == alone.columns.num_tokens[0] == length + 40


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
