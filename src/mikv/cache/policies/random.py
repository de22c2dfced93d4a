"""A fixed pseudo-random choice: the control that any other policy has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mikv.cache.policies.base import ImportancePolicy
from mikv.cache.settings import MOST
from mikv.choices import shown
from mikv.errors import ConfigError


@dataclass(frozen=True)
class Random(ImportancePolicy):
    """A token's importance is a hash of its position and `seed`, the same in every head, layer and run."""

    seed: int = 0
    name: ClassVar[str] = "random"
    uses_attention: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or abs(self.seed) > MOST:
            raise ConfigError(f"policy option seed={shown(self.seed)} must be a whole number of 32 bits")

    def priority(self, scores: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
        # the finaliser of MurmurHash3, on 32 bits held in int64
        mixed = (positions.to(torch.int64) * 0x9E3779B1 + self.seed * 0x85EBCA77) & 0xFFFFFFFF
        for factor in (0x85EBCA6B, 0xC2B2AE35):
            mixed = ((mixed ^ (mixed >> 16)) * factor) & 0xFFFFFFFF
        return (mixed >> 8).float()
