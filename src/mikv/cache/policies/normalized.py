"""Attention per query that could see the token (ZipCache, arXiv 2405.14256): H2O without its bias to old tokens."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mikv.cache.policies.base import ImportancePolicy


@dataclass(frozen=True)
class Normalized(ImportancePolicy):
    """A token's importance is the mean attention it has received from the queries that could see it."""

    name: ClassVar[str] = "normalized"

    def priority(self, scores: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
        return scores / (num_tokens - positions).clamp_min(1)
