"""Attention per query that could see the token (ZipCache, arXiv 2405.14256): H2O without its bias to old tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mikv.cache.policies.base import ImportancePolicy
from mikv.cache.settings import require_count


@dataclass(frozen=True)
class Normalized(ImportancePolicy):
    """A token's importance is the mean attention it has received from the queries that could see it.

    Of a prompt or a long chunk every `stride`-th query is asked: the same tokens for a fraction of the work.
    """

    stride: int = 4
    name: ClassVar[str] = "normalized"

    def __post_init__(self) -> None:
        require_count("policy option stride", self.stride, least=1, unit="queries")

    def counted_queries(self, num_queries: int) -> slice:
        return slice((num_queries - 1) % self.stride, None, self.stride)

    def update_scores(self, scores: Tensor, attention: Tensor, num_queries: int) -> Tensor:
        num_counted = -(-num_queries // self.stride)
        return torch.add(scores, attention, alpha=num_queries / num_counted)

    def priority(self, scores: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
        return scores / (num_tokens - positions).clamp_min(1)
