"""The first tokens of a layer, exact, until there are enough to fit transforms on; and a full cache, exact for ever.

B batch, H query heads, G KV heads, Tq new tokens, D head dim.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mikv.arithmetic import own_arithmetic
from mikv.cache.columns import StepMask
from mikv.cache.config import MiKVConfig
from mikv.cache.policies.base import ImportancePolicy
from mikv.cache.tiers import RawTokens
from mikv.ops import AttentionOptions, score_prompt, visible

ExactAttention = Callable[[Tensor, Tensor], Tensor]


class WarmUp:
    """Raw tokens, and what the partition will need to know of the queries seen so far."""

    def __init__(self, config: MiKVConfig, policy: ImportancePolicy, keys: Tensor) -> None:
        """Empty, for tokens like keys (B, G, any, D)."""
        self.config, self.policy = config, policy
        self.tokens = RawTokens(keys[:, :, :0], keys[:, :, :0])
        self.attention = torch.zeros(*keys.shape[:2], 0, dtype=torch.float32, device=keys.device)  # (B, G, columns)
        self.query_max = torch.zeros(
            *keys.shape[:2], keys.shape[3], dtype=torch.float32, device=keys.device
        )  # (B, G, D)
        self.query_moment: Tensor | None = None  # sum q q^T (B, G, D, D)
        if config.has_feedback:
            self.query_moment = torch.zeros(
                *keys.shape[:2], keys.shape[3], keys.shape[3], dtype=torch.float32, device=keys.device
            )

    def attend(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        mask: Tensor | None,
        step: StepMask,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        """Append `new` keys and values, attend exactly, and take note of the queries."""
        self.tokens.append(*new)
        if not self.config.keeps_everything_exact:
            self._observe(queries, mask, step, options)
        return exact(self.tokens.keys, self.tokens.values)

    @own_arithmetic
    def _observe(self, queries: Tensor, mask: Tensor | None, step: StepMask, options: AttentionOptions) -> None:
        num_kv_heads, num_queries = self.query_max.shape[1], queries.shape[2]
        tokens = queries if step.valid is None else queries * step.valid[:, None, :, None]
        largest = tokens.abs().amax(2).unflatten(1, (num_kv_heads, -1)).amax(2).float()  # (B, G, D)
        self.query_max = torch.maximum(self.query_max, largest)
        if self.query_moment is not None:
            of_group = tokens.float().unflatten(1, (num_kv_heads, -1)).flatten(2, 3)  # (B, G, R * Tq, D)
            self.query_moment += of_group.mT @ of_group
        self.attention = torch.nn.functional.pad(self.attention, (0, num_queries))
        if not self.policy.uses_attention:
            return
        counted = self.policy.counted_queries(num_queries)
        seen_by = None if mask is None else visible(mask)[:, :, counted]
        weight = None if step.valid is None else step.valid[:, counted]
        chosen = queries[:, :, counted]
        distance = self.policy.attention_distance  # in columns: padding among the tokens counts, too
        received = score_prompt(chosen, self.tokens.keys, seen_by, options, weight, counted.step, distance)
        self.attention = self.policy.update_scores(self.attention, received, num_queries)

    def crop(self, num_columns: int) -> None:
        """Forget the last `num_columns`."""
        self.tokens.crop(num_columns)
        self.attention = self.attention[:, :, : self.attention.shape[2] - num_columns]

    def select_rows(self, index: Tensor) -> None:
        """Rows `index` (B',) become the rows."""
        self.tokens.select_rows(index)
        index = index.to(self.query_max.device)
        self._change(lambda x: x.index_select(0, index))

    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        self.tokens.to(device)
        self._change(lambda x: x.to(device))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, tensor in self._statistics().items():
            setattr(self, name, change(tensor))

    def _statistics(self) -> dict[str, Tensor]:
        found = {"attention": self.attention, "query_max": self.query_max}
        return found if self.query_moment is None else found | {"query_moment": self.query_moment}

    def bytes_by_part(self) -> dict[str, int]:
        """All bytes allocated."""
        return {"warm_up": self.tokens.nbytes, "scores": sum(x.nbytes for x in self._statistics().values())}

    def tokens_by_tier(self, num_tokens: int) -> dict[str, int]:
        """Where the `num_tokens` tokens of all rows are."""
        return {"warm_up": num_tokens}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as JSON types."""
        tensors = {"keys": self.tokens.keys, "values": self.tokens.values}
        return tensors | self._statistics(), self._meta()

    def _meta(self) -> dict[str, Any]:
        return {"kind": "warm_up", "dtype": str(self.tokens.keys.dtype).removeprefix("torch.")}

    @classmethod
    def restore(cls, config: MiKVConfig, policy: ImportancePolicy, tensors: Mapping[str, Tensor]) -> "WarmUp":
        """The inverse of `state`."""
        warm_up = cls(config, policy, tensors["keys"])
        warm_up.tokens = RawTokens(tensors["keys"], tensors["values"])
        for name in warm_up._statistics():
            setattr(warm_up, name, tensors[name])
        return warm_up
