"""The first tokens of a layer, exact, until there are enough to fit transforms on; and a full cache, exact for ever.

B batch, H query heads, G KV heads, Tq new tokens, D head dim.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from mikv.arithmetic import own_arithmetic
from mikv.cache.columns import StepMask
from mikv.cache.config import MiKVConfig
from mikv.cache.policies.base import ImportancePolicy
from mikv.cache.tiers import RawTokens
from mikv.errors import NumericsError
from mikv.formats import require_finite
from mikv.ops import AttentionOptions, score_prompt, visible

ExactAttention = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class QueryStatistics:
    """What the partition will need to know of the queries seen so far.

    attention     (B, G, columns) float32, what each token received
    query_max     (B, G, D) float32, the largest absolute query per channel
    query_moment  (B, G, D, D) float32, sum q q^T, or None without feedback
    """

    attention: Tensor
    query_max: Tensor
    query_moment: Tensor | None

    @classmethod
    def none(cls, keys: Tensor, with_moment: bool) -> Self:
        """Of no queries, for tokens like keys (B, G, any, D)."""
        rows, head_dim = keys.shape[:2], keys.shape[3]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*rows, *shape, dtype=torch.float32, device=keys.device)

        return cls(zeros(0), zeros(head_dim), zeros(head_dim, head_dim) if with_moment else None)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The statistics with `change` applied to every tensor."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)


class WarmUp:
    """Raw tokens, and the statistics of their queries."""

    def __init__(self, config: MiKVConfig, policy: ImportancePolicy, keys: Tensor) -> None:
        """Empty, for tokens like keys (B, G, any, D)."""
        self.config, self.policy = config, policy
        self.tokens = RawTokens(keys[:, :, :0], keys[:, :, :0])
        self.statistics = QueryStatistics.none(keys, config.has_feedback)

    def attend(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        mask: Tensor | None,
        step: StepMask,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> tuple[Tensor, Callable[[], None]]:
        """Attend exactly to all tokens and the `new` ones. Returns the output and what makes the new ones count."""
        keys, values = self.tokens.followed_by(*new)
        statistics = self.statistics
        if not self.config.keeps_everything_exact:
            require_finite(*new)
            statistics = self._observed(queries, keys, mask, step, options)

        def commit() -> None:
            self.statistics, self.tokens.num_columns = statistics, keys.shape[2]

        return exact(keys, values), commit

    @own_arithmetic
    def _observed(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, step: StepMask, options: AttentionOptions
    ) -> QueryStatistics:
        """The statistics with those of a step's queries, whose tokens are the last of keys (B, G, T, D)."""
        before, num_kv_heads, num_queries = self.statistics, keys.shape[1], queries.shape[2]
        tokens = queries
        if step.valid is not None:
            tokens = queries.masked_fill(~step.valid[:, None, :, None], 0)
        largest = tokens.abs().amax(2).unflatten(1, (num_kv_heads, -1)).amax(2).float()  # (B, G, D)
        if not bool(largest.isfinite().all()):
            raise NumericsError("queries are NaN or Inf; the model overflows, run it in bfloat16 or float32")
        moment = before.query_moment
        if moment is not None:
            of_group = tokens.float().unflatten(1, (num_kv_heads, -1)).flatten(2, 3)  # (B, G, R * Tq, D)
            moment = moment + of_group.mT @ of_group
        attention = torch.nn.functional.pad(before.attention, (0, num_queries))
        if self.policy.uses_attention:
            counted = self.policy.counted_queries(num_queries)
            seen_by = None if mask is None else visible(mask)[:, :, counted]
            weight = None if step.valid is None else step.valid[:, counted]
            chosen = queries[:, :, counted]
            distance = self.policy.attention_distance  # in columns: padding among the tokens counts, too
            received = score_prompt(chosen, keys, seen_by, options, weight, counted.step, distance)
            attention = self.policy.update_scores(attention, received, num_queries)
        return QueryStatistics(attention, torch.maximum(before.query_max, largest), moment)

    def cropped(self, num_columns: int) -> Callable[[], None]:
        """What forgets the last `num_columns`."""
        left = self.tokens.num_columns - num_columns
        statistics = replace(self.statistics, attention=self.statistics.attention[:, :, :left])

        def commit() -> None:
            self.statistics, self.tokens.num_columns = statistics, left

        return commit

    def of_rows(self, index: Tensor) -> "WarmUp":
        """The same of rows `index` (B',)."""
        other = copy.copy(self)
        other.tokens = self.tokens.of_rows(index)
        index = index.to(self.statistics.query_max.device)
        other.statistics = self.statistics.map(lambda x: x.index_select(0, index))
        return other

    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        self.tokens.to(device)
        self.statistics = self.statistics.map(lambda x: x.to(device))

    def bytes_by_part(self) -> dict[str, int]:
        """All bytes allocated."""
        attention = self.statistics.attention.nbytes
        others = sum(x.nbytes for x in self.statistics.tensors().values()) - attention
        return {"warm_up": self.tokens.nbytes, "scores": attention, "statistics": others}

    def tokens_by_tier(self, num_tokens: int) -> dict[str, int]:
        """Where the `num_tokens` tokens of all rows are."""
        return {"warm_up": num_tokens}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as JSON types."""
        tensors = {"keys": self.tokens.keys, "values": self.tokens.values}
        return tensors | self.statistics.tensors(), self._meta()

    def _meta(self) -> dict[str, Any]:
        return {"kind": "warm_up", "dtype": str(self.tokens.keys.dtype).removeprefix("torch.")}

    @classmethod
    def restore(cls, config: MiKVConfig, policy: ImportancePolicy, tensors: Mapping[str, Tensor]) -> "WarmUp":
        """The inverse of `state`."""
        warm_up = cls(config, policy, tensors["keys"])
        warm_up.tokens = RawTokens(tensors["keys"], tensors["values"])
        saved: dict[str, Any] = {name: tensors[name] for name in warm_up.statistics.tensors()}
        warm_up.statistics = replace(warm_up.statistics, **saved)
        return warm_up
