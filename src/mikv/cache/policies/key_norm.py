"""Small keys attract attention (Devoto et al., arXiv 2406.11430): needs no attention statistics."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mikv.cache.policies.base import ImportancePolicy


@dataclass(frozen=True)
class KeyNorm(ImportancePolicy):
    """The tokens with the smallest L2 norm of their key are the important ones."""

    name: ClassVar[str] = "key_norm"
    uses_attention: ClassVar[bool] = False

    def initial_scores(self, keys: Tensor, attention: Tensor) -> Tensor:
        return -keys.float().norm(dim=-1)

    def update_scores(self, scores: Tensor, attention: Tensor, num_queries: int) -> Tensor:
        return scores
