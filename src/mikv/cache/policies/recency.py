"""Age alone: with `sinks`, the partition of StreamingLLM (arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mikv.cache.policies.base import ImportancePolicy


@dataclass(frozen=True)
class Recency(ImportancePolicy):
    """The newest tokens are the important ones."""

    name: ClassVar[str] = "recency"
    uses_attention: ClassVar[bool] = False

    def priority(self, scores: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
        return positions.float()
