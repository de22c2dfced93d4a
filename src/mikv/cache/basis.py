"""The basis of a layer's tokens: transforms fitted on a warm-up, and whether there is enough in it to fit them on.

A row rests on enough if its tokens are many and not all alike. Eighty blank lines say nothing of how keys vary: what
was fitted on them cost every later token most of its bits.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mikv.cache.columns import Columns
from mikv.cache.config import MiKVConfig
from mikv.cache.warm_up import WarmUp
from mikv.transforms import (
    KeyTransform,
    PromptStatistics,
    ValueTransform,
    fit_key_transform,
    fit_value_transform,
    hadamard_block_size,
    with_feedback,
)

# 64 tokens of prose have 32 to 45 different values in the first layer and more in all others, of a list 14, of a table
# 5, of blank lines 1 in all layers.
LEAST_DIFFERENT = 16
# By then a warm-up ends, whatever is in it: what it holds is exact, and takes the memory that is to be saved.
LONGEST_WARM_UP = 512
_SAMPLED = 128  # tokens of a row that are compared with each other
_ALIKE = 0.01  # squared distance of two values, as a share of their mean square; biases may be most of that


def is_ready(warm_up: WarmUp, columns: Columns) -> bool:
    """Whether a row has enough to fit transforms on, or one is so long that it has to do."""
    longest = max(columns.num_tokens, default=0)
    if longest < max(1, warm_up.config.warmup_tokens):
        return False
    return longest >= LONGEST_WARM_UP or any(rests_on_enough(warm_up, columns))


def rests_on_enough(warm_up: WarmUp, columns: Columns) -> list[bool]:
    """Which rows have as many tokens as the configuration asks for, and enough that differ."""
    values, wanted = warm_up.tokens.values, warm_up.config.warmup_tokens
    valid, least = columns.valid(values.device), min(LEAST_DIFFERENT, wanted // 2)
    found = []
    for row, count in enumerate(columns.num_tokens):
        if count < wanted or least <= 1:
            found.append(count >= wanted)
            continue
        if valid is None:
            tokens = torch.arange(count, dtype=torch.int64, device=values.device)
        else:
            tokens = valid[row].nonzero()[:, 0]
        chosen = tokens[:: max(1, count // _SAMPLED)]
        found.append(_num_different(values[row][:, chosen]) >= least)
    return found


def _num_different(values: Tensor) -> int:
    """How many of the tokens of values (G, n, D) are like none before them."""
    vectors = values.float().transpose(0, 1).flatten(1)
    products = vectors @ vectors.T
    squares = products.diagonal()
    mean = (squares[:, None] + squares) / 2
    is_like = mean - products <= _ALIKE / 2 * mean  # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b
    return int((~is_like.tril(-1).any(1)).sum())


def fit_basis(warm_up: WarmUp, columns: Columns, valid: Tensor) -> tuple[KeyTransform, ValueTransform]:
    """The transforms of the warm-up's tokens, marked in `valid` (B, T); its sinks do not count.

    Rows that do not rest on enough take what the others have in common.
    """
    config, keys, queries = warm_up.config, warm_up.tokens.keys, warm_up.statistics
    body = valid & (valid.cumsum(1) > config.sinks)
    counted = torch.where(body.any(1, keepdim=True), body, valid)
    attention = queries.attention if warm_up.policy.uses_attention else None
    both = keys, warm_up.tokens.values
    stats = PromptStatistics.measure(both, queries.query_max, counted, config.center_keys, attention)
    moment = queries.query_moment
    enough = rests_on_enough(warm_up, columns)
    if not all(enough) and len(enough) > 1:
        good = torch.tensor(enough, dtype=torch.bool, device=keys.device)
        if not any(enough):
            longest = max(columns.num_tokens)
            good = torch.tensor([2 * n >= longest for n in columns.num_tokens], dtype=torch.bool, device=keys.device)
        share = counted.sum(1) * good / (counted.sum(1) * good).sum()  # of the tokens that the others rest on
        stats = stats.shared_by(good, share)
        if moment is not None:
            moment = torch.where(good[:, None, None, None], moment, (moment * good[:, None, None, None]).sum(0))
    return _fit_keys(stats, config, moment), _fit_values(stats, config)


def _fit_keys(stats: PromptStatistics, config: MiKVConfig, moment: Tensor | None) -> KeyTransform:
    size = hadamard_block_size(stats.key_mean.shape[3]) if config.hadamard_keys else 1
    if config.center_keys:
        stats = replace(stats, key_max=stats.floored_key_max)
    transform = fit_key_transform(stats, config.center_keys, config.balance_keys, config.balancer_exponents, size)
    return transform if moment is None else with_feedback(transform, moment)


def _fit_values(stats: PromptStatistics, config: MiKVConfig) -> ValueTransform:
    size = hadamard_block_size(stats.value_mean.shape[3]) if config.hadamard_values else 1
    return fit_value_transform(stats, config.center_values, size)
