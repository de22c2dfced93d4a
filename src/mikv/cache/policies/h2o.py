"""Accumulated attention: the policy of H2O (arXiv 2306.14048) that the MiKV paper uses."""

from dataclasses import dataclass
from typing import ClassVar

from mikv.cache.policies.base import ImportancePolicy


@dataclass(frozen=True)
class H2O(ImportancePolicy):
    """A token's importance is all the attention it has received."""

    name: ClassVar[str] = "h2o"
