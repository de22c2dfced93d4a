"""Which tokens leave the high tier: pure functions of scores, positions and the configuration."""

import torch
from torch import Tensor

from mikv.cache.config import MiKVConfig
from mikv.cache.policies.base import ImportancePolicy
from mikv.formats import BLOCK_TOKENS


def choose(scores: Tensor, positions: Tensor, num_tokens: int, config: MiKVConfig, policy: ImportancePolicy) -> Tensor:
    """The slots (G, m), ascending, that leave the high tier of a row with scores and positions (G, n).

    Whole blocks of 32 are demoted, as many as the tier is over its budget at a row length of `num_tokens`; protected
    tokens never are, ties leave by age.
    """
    protected = protected_tokens(positions, num_tokens, config)
    finite = policy.priority(scores, positions, num_tokens).nan_to_num()  # nothing outranks what is protected
    priority = finite.masked_fill(protected, torch.inf)
    excess = scores.shape[1] - config.high_budget(num_tokens)
    movable = scores.shape[1] - int(protected.sum(1).max())
    count = max(0, min(excess, movable)) // BLOCK_TOKENS * BLOCK_TOKENS
    if count < scores.shape[1]:
        lowest = priority.topk(count + 1, dim=1, largest=False)
        if not count or bool((lowest.values[:, -1] > lowest.values[:, -2]).all()):  # no tie to be broken
            return lowest.indices[:, :count].sort(dim=1).values
    oldest_first = positions.argsort(dim=1)
    order = oldest_first.gather(1, priority.gather(1, oldest_first).argsort(dim=1, stable=True))
    return order[:, :count].sort(dim=1).values


def others(slots: Tensor, num_slots: int) -> Tensor:
    """The slots (G, num_slots - m), ascending, that are not among slots (G, m)."""
    stays = torch.ones(slots.shape[0], num_slots, dtype=torch.bool, device=slots.device).scatter_(1, slots, False)
    return stays.nonzero()[:, 1].view(slots.shape[0], num_slots - slots.shape[1])


def protected_tokens(positions: Tensor, num_tokens: int, config: MiKVConfig) -> Tensor:
    """True for sinks, the recent window and the user's spans."""
    recent = num_tokens - config.recent_window(num_tokens)
    protected = (positions < config.sinks) | (positions >= recent)
    if config.protected:  # disjoint and ascending: a position within one of them has an odd number of ends before it
        ends = torch.tensor(config.protected, dtype=positions.dtype, device=positions.device).flatten()
        protected = protected | (torch.searchsorted(ends, positions.contiguous(), right=True) % 2 == 1)
    return protected
