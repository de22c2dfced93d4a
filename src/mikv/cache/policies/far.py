"""Attention from afar, times how much the token's rounding matters (docs/results/predictors.md)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mikv.cache.policies.normalized import Normalized
from mikv.cache.settings import require_count
from mikv.choices import shown
from mikv.errors import ConfigError


@dataclass(frozen=True)
class Far(Normalized):
    """A token's importance is the mean attention from queries at least `distance` tokens after it, times |k'||v'|.

    What a token gets from its neighbours says little of what it will get once it is old. The norms of its key and value
    in the basis in which they are quantized (`norms`) are how much its rounding matters. Tokens that no query has seen
    from so far yet are the last to leave. With `distance=0` and `norms=False` this is `normalized`.
    """

    stride: int = 1
    distance: int = 32
    norms: bool = True
    name: ClassVar[str] = "far"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("policy option distance", self.distance)
        if not isinstance(self.norms, bool):
            raise ConfigError(f"policy option norms={shown(self.norms)} must be True or False")

    @property
    def attention_distance(self) -> int:
        return self.distance

    @property
    def weighs_norms(self) -> bool:
        return self.norms

    def priority(self, scores: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
        num_queries = num_tokens - self.distance - positions  # that were far enough away
        priority = scores / num_queries.clamp_min(1)
        return priority if self.distance == 0 else priority.masked_fill(num_queries <= 0, torch.inf)
