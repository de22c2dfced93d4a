"""Attention from the last queries only, pooled over neighbours (SnapKV, arXiv 2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mikv.cache.policies.base import ImportancePolicy
from mikv.cache.settings import require_count
from mikv.errors import ConfigError

_WIDEST_POOL = 65_535


@dataclass(frozen=True)
class Window(ImportancePolicy):
    """A token's importance is the attention from the last `window` queries, max-pooled over `pool` prompt tokens.

    While decoding, older queries fade with the factor 1 - 1/window per step, which keeps the effective number of
    queries at `window`.
    """

    window: int = 32
    pool: int = 7
    name: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        require_count("policy option window", self.window, least=1, unit="queries")
        require_count("policy option pool", self.pool, least=1, most=_WIDEST_POOL)
        if self.pool % 2 == 0:
            raise ConfigError(f"policy option pool={self.pool} must be an odd number of tokens")

    def counted_queries(self, num_queries: int) -> slice:
        return slice(max(0, num_queries - self.window), None, 1)

    def initial_scores(self, keys: Tensor, attention: Tensor) -> Tensor:
        return torch.nn.functional.max_pool1d(attention, self.pool, stride=1, padding=self.pool // 2)

    def update_scores(self, scores: Tensor, attention: Tensor, num_queries: int) -> Tensor:
        fading: float = (1 - 1 / self.window) ** num_queries
        return torch.add(attention, scores, alpha=fading)
