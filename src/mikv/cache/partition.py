"""Which tokens leave the high tier: pure functions of scores, positions and the configuration."""

import torch
from torch import Tensor

from mikv.cache.config import MiKVConfig
from mikv.cache.policies.base import ImportancePolicy
from mikv.formats import BLOCK_TOKENS


def choose(
    scores: Tensor, positions: Tensor, num_tokens: int, config: MiKVConfig, policy: ImportancePolicy
) -> tuple[Tensor, Tensor]:
    """Divide the high tokens of one row, scores and positions (G, n), into slots to demote and slots to keep.

    Whole blocks of 32 are demoted, as many as the tier is over its budget at a row length of `num_tokens`; protected
    tokens never are, ties leave by age. Both results (G, m) and (G, n - m) are ordered by position.
    """
    protected = protected_tokens(positions, num_tokens, config)
    finite = policy.priority(scores, positions, num_tokens).nan_to_num()  # nothing outranks what is protected
    priority = finite.masked_fill(protected, torch.inf)
    excess = scores.shape[1] - config.high_budget(num_tokens)
    movable = int((~protected).sum(1).min())
    count = max(0, min(excess, movable)) // BLOCK_TOKENS * BLOCK_TOKENS
    oldest_first = positions.argsort(dim=1)
    order = oldest_first.gather(1, priority.gather(1, oldest_first).argsort(dim=1, stable=True))
    return _by_position(order[:, :count], positions), _by_position(order[:, count:], positions)


def protected_tokens(positions: Tensor, num_tokens: int, config: MiKVConfig) -> Tensor:
    """True for sinks, the recent window and the user's spans."""
    recent = num_tokens - config.recent_window(num_tokens)
    protected = (positions < config.sinks) | (positions >= recent)
    for start, stop in config.protected:
        protected = protected | ((positions >= start) & (positions < stop))
    return protected


def _by_position(slots: Tensor, positions: Tensor) -> Tensor:
    return slots.gather(1, positions.gather(1, slots).argsort(dim=1))
