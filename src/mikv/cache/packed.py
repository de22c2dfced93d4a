"""The tokens of a layer in two tiers: attention over both, appending, demotion. Knows nothing about transformers.

B batch, H query heads, G KV heads, Tq new tokens, D head dim.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mikv.cache.accounting import high_tier_capacity
from mikv.cache.columns import Columns, StepMask
from mikv.cache.config import MiKVConfig
from mikv.cache.formats import layer_formats
from mikv.cache.partition import choose
from mikv.cache.policies.base import ImportancePolicy, no_attention
from mikv.cache.tiers import HighTier, LowTier, take
from mikv.cache.warm_up import WarmUp
from mikv.errors import CacheStateError
from mikv.formats import BLOCK_TOKENS
from mikv.ops import AttentionOptions, Segment, attend
from mikv.transforms import (
    KeyTransform,
    PromptStatistics,
    ValueTransform,
    fit_key_transform,
    fit_value_transform,
    hadamard_block_size,
)

# Tokens that are transformed and quantized at once: their temporaries stay in the processor's second-level cache.
TILE_TOKENS = 4 * BLOCK_TOKENS


class Packed:
    """Both tiers and the transforms of what they hold. `low` is None if demoted tokens are dropped."""

    def __init__(
        self,
        config: MiKVConfig,
        policy: ImportancePolicy,
        like: Tensor,
        transforms: tuple[KeyTransform, ValueTransform],
    ) -> None:
        """Empty tiers for tokens like keys (B, G, any, D)."""
        batch, num_heads, _, head_dim = like.shape
        formats = layer_formats(config, head_dim, like.dtype)
        shape = (batch, num_heads, head_dim)
        self.config, self.policy = config, policy
        self.model_dtype = like.dtype
        self.key_transform, self.value_transform = transforms
        self.high = HighTier(formats.high, shape, like.device)
        self.low = None if formats.low is None else LowTier(formats.low, shape, like.device)
        self.high_is_transformed = formats.high_is_quantized

    @classmethod
    def partition(cls, warm_up: WarmUp, columns: Columns) -> "Packed":
        """End the warm-up: fit the transforms on its tokens and divide them between the tiers."""
        keys, values = warm_up.tokens.keys, warm_up.tokens.values
        num_heads, device = keys.shape[1], keys.device
        valid = columns.valid(device)
        if valid is None:
            valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=device)
        packed = cls(warm_up.config, warm_up.policy, keys, fit_transforms(warm_up, valid))
        scores = packed.policy.initial_scores(keys, warm_up.attention)

        choices = []
        for row, count in enumerate(columns.num_tokens):
            tokens = valid[row].nonzero()[:, 0].expand(num_heads, -1)  # (G, n) columns
            positions = torch.arange(count, dtype=torch.int32, device=device).expand(num_heads, -1)
            demoted, kept = choose(take(scores[row], tokens), positions, count, packed.config, packed.policy)
            choices.append((take(tokens, demoted), take(tokens, kept), take(positions, kept)))
        packed.high.table.resize(packed._high_capacity(max(kept.shape[1] for _, kept, _ in choices), columns))
        if packed.low is not None:
            packed.low.table.resize(max(demoted.shape[1] for demoted, _, _ in choices) // BLOCK_TOKENS)
        for row, (demoted, kept, positions) in enumerate(choices):
            for tokens in demoted.split(TILE_TOKENS, dim=1):
                packed._store_low(row, take(keys[row], tokens), take(values[row], tokens))
            for tokens, places in zip(kept.split(TILE_TOKENS, 1), positions.split(TILE_TOKENS, 1), strict=True):
                new = take(keys[row], tokens), take(values[row], tokens)
                packed._store_high(row, new, take(scores[row], tokens), places)
        return packed

    def attend(
        self, queries: Tensor, new: tuple[Tensor, Tensor], step: StepMask, options: AttentionOptions, columns: Columns
    ) -> Tensor:
        """Attend to both tiers and exactly to the `new` keys and values; score the high tier; append the new tokens."""
        num_queries = queries.shape[2]
        segments = [self._high_segment(), Segment.of_tensors(*new, step.fresh, causal=step.fresh is None)]
        if self.low is not None:
            segments.append(self._low_segment(self.low))
        weight = self._query_weight(step, num_queries, len(columns.num_tokens))
        transforms = (self.key_transform, self.value_transform)
        output, received = attend(queries, segments, transforms, options, weight)

        scores = self.high.scores[:, :, : self.high.table.used]
        scores.copy_(self.policy.update_scores(scores, received[0], num_queries))
        attention = no_attention(new[0])
        if self.policy.uses_attention:
            attention = self.policy.update_scores(attention, received[1], num_queries)
        self._append(new, self.policy.initial_scores(new[0], attention), step.valid, columns)
        return output

    def demote(self, columns: Columns) -> None:
        """Move the least important tokens of every row that is a block over its budget to the low tier."""
        table = self.high.table
        for row, (count, num_tokens) in enumerate(zip(table.counts, columns.num_tokens, strict=True)):
            if count - self.config.high_budget(num_tokens) < BLOCK_TOKENS:
                continue
            scores, positions = self.high.scores[row, :, :count], self.high.positions[row, :, :count]
            demoted, kept = choose(scores, positions, num_tokens, self.config, self.policy)
            if not demoted.shape[1]:
                continue  # what is over the budget is protected
            keys, values = self.high.take(row, demoted)
            self._store_low(row, keys, values, transformed=self.high_is_transformed)
            table.keep(row, kept)
        needed = self._high_capacity(table.used, columns)
        if table.capacity > needed:
            table.resize(needed)  # a chunk of several tokens has passed through

    def crop(self, num_columns: int, columns: Columns) -> None:
        """Take back the last `num_columns`. Raises CacheStateError, changing nothing, if some were demoted already."""
        for row, slots in enumerate(self.slots_without_last(num_columns, columns)):
            self.high.table.keep(row, slots)

    def slots_without_last(self, num_columns: int, columns: Columns) -> list[Tensor]:
        """Per row, the slots (G, n) of all high tokens but those of the last `num_columns`.

        Raises CacheStateError if some of those are in the low tier.
        """
        kept_slots = []
        for row, gone in enumerate(columns.tokens_in_last(num_columns)):
            positions = self.high.positions[row, :, : self.high.table.counts[row]]
            stays = positions < columns.num_tokens[row] - gone  # (G, n)
            if not bool(((~stays).sum(1) == gone).all()):
                raise CacheStateError(
                    f"cannot take back {num_columns} tokens: some are in the low tier already; only the newest "
                    f"{_newest_held(positions, columns.num_tokens[row])} are all in the high tier; raise min_recent, "
                    f"now {self.config.min_recent}"
                )
            kept_slots.append(stays.int().argsort(dim=1, descending=True, stable=True)[:, : positions.shape[1] - gone])
        return kept_slots

    def select_rows(self, index: Tensor) -> None:
        """Rows `index` (B',) become the rows."""
        self.high.table.select_rows(index)
        if self.low is not None:
            self.low.table.select_rows(index)
        self.key_transform = self.key_transform.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        self.value_transform = self.value_transform.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        self.high.table.to(device)
        if self.low is not None:
            self.low.table.to(device)
        self.key_transform = self.key_transform.map(lambda tensor: tensor.to(device, non_blocking=True))
        self.value_transform = self.value_transform.map(lambda tensor: tensor.to(device, non_blocking=True))

    def bytes_by_part(self) -> dict[str, int]:
        """All bytes allocated; `high` and `low` are codes, scales and zeros."""
        high = self.high.table
        scores, positions = high.tensors["score"].nbytes, high.tensors["position"].nbytes
        transforms = self.key_transform.tensors() | {f"v.{k}": v for k, v in self.value_transform.tensors().items()}
        return {
            "high": high.nbytes - scores - positions,
            "low": 0 if self.low is None else self.low.table.nbytes,
            "scores": scores,
            "positions": positions,
            "transforms": sum(tensor.nbytes for tensor in transforms.values()),
        }

    def tokens_by_tier(self, num_tokens: int) -> dict[str, int]:
        """Where the `num_tokens` tokens of all rows are."""
        high = sum(self.high.table.counts)
        low = 0 if self.low is None else sum(self.low.table.counts) * BLOCK_TOKENS
        return {"high": high, "low": low, "dropped": num_tokens - high - low}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as JSON types."""
        tables = {"high": self.high.table} | ({} if self.low is None else {"low": self.low.table})
        tensors = {f"{tier}.{name}": x for tier, table in tables.items() for name, x in table.tensors.items()}
        tensors |= {f"key_transform.{name}": x for name, x in self.key_transform.tensors().items()}
        tensors |= {f"value_transform.{name}": x for name, x in self.value_transform.tensors().items()}
        counts = {tier: table.counts for tier, table in tables.items()}
        return tensors, {"kind": "packed", "dtype": str(self.model_dtype).removeprefix("torch."), "counts": counts}

    @classmethod
    def restore(
        cls,
        config: MiKVConfig,
        policy: ImportancePolicy,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        shape: tuple[int, int, int],
    ) -> "Packed":
        """The inverse of `state` for tiers of `shape` (B, G, D). Raises KeyError or ValueError if they do not fit."""
        batch, num_heads, head_dim = shape
        like = torch.empty(batch, num_heads, 0, head_dim, dtype=getattr(torch, meta["dtype"]))
        size = hadamard_block_size(head_dim)
        key_transform = KeyTransform(
            center=tensors["key_transform.center"] if config.center_keys else None,
            hadamard_size=size if config.hadamard_keys else 1,
            balancer=tensors["key_transform.balancer"] if config.balance_keys else None,
        )
        value_center = tensors["value_transform.center"] if config.center_values else None
        value_transform = ValueTransform(value_center, size if config.hadamard_values else 1)
        packed = cls(config, policy, like, (key_transform, value_transform))
        tables = {"high": packed.high.table} | ({} if packed.low is None else {"low": packed.low.table})
        for tier, table in tables.items():
            table.restore({name: tensors[f"{tier}.{name}"] for name in table.tensors}, meta["counts"][tier])
        return packed

    def _high_segment(self) -> Segment:
        table = self.high.table
        mask = _in_use(table.counts, table.used, self.high.scores.device)
        return Segment(table.used, self.high.keys, self.high.values, mask, self.high_is_transformed)

    def _low_segment(self, low: LowTier) -> Segment:
        tokens = [count * BLOCK_TOKENS for count in low.table.counts]
        mask = _in_use(tokens, low.num_tokens, self.high.scores.device)
        return Segment(low.num_tokens, low.keys, low.values, mask, transformed=True)

    def _query_weight(self, step: StepMask, num_queries: int, batch: int) -> Tensor | None:
        """Which queries (B, Tq) the policy counts: of tokens only, and only those that it asks."""
        counted = self.policy.counted_queries(num_queries)
        if len(range(num_queries)[counted]) == num_queries:
            return step.valid
        weight = torch.zeros(batch, num_queries, dtype=torch.bool, device=self.high.scores.device)
        weight[:, counted] = True
        return weight if step.valid is None else weight & step.valid

    def _append(self, new: tuple[Tensor, Tensor], scores: Tensor, valid: Tensor | None, columns: Columns) -> None:
        """Put new tokens into the high tier."""
        keys, values = new
        table = self.high.table
        needed = table.used + keys.shape[2]
        if needed > table.capacity:
            table.resize(self._high_capacity(needed, columns))
        for row, first in enumerate(columns.num_tokens):
            chosen = slice(None) if valid is None else valid[row]
            row_scores = scores[row][:, chosen]
            positions = torch.arange(first, first + row_scores.shape[1], device=scores.device).expand_as(row_scores)
            self._store_high(row, (keys[row][:, chosen], values[row][:, chosen]), row_scores, positions)

    def _store_high(self, row: int, new: tuple[Tensor, Tensor], scores: Tensor, positions: Tensor) -> None:
        """Append keys and values (G, n, D) as the model made them to a row of the high tier."""
        keys, values = self._transformed(row, *new) if self.high_is_transformed else new
        self.high.append(row, keys, values, scores, positions)

    def _store_low(self, row: int, keys: Tensor, values: Tensor, transformed: bool = False) -> None:
        """Append keys and values (G, 32 * n, D) to a row of the low tier, or drop them."""
        if self.low is None:
            return
        if not transformed:
            keys, values = self._transformed(row, keys, values)
        self.low.append(row, keys, values)

    def _transformed(self, row: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.key_transform.of_row(row).encode(keys), self.value_transform.of_row(row).encode(values)

    def _high_capacity(self, num_slots: int, columns: Columns) -> int:
        longest = max(columns.num_tokens, default=0)
        return high_tier_capacity(self.config, longest, num_slots)


def fit_transforms(warm_up: WarmUp, valid: Tensor) -> tuple[KeyTransform, ValueTransform]:
    """The transforms of the warm-up's tokens, marked in `valid` (B, T); its sinks do not count."""
    config, keys = warm_up.config, warm_up.tokens.keys
    body = valid & (valid.cumsum(1) > config.sinks)
    counted = torch.where(body.any(1, keepdim=True), body, valid)
    stats = PromptStatistics.measure(keys, warm_up.tokens.values, warm_up.query_max, counted, config.center_keys)
    size = hadamard_block_size(keys.shape[3])
    key_transform = fit_key_transform(
        stats,
        config.center_keys,
        config.balance_keys,
        config.balancer_exponents,
        size if config.hadamard_keys else 1,
    )
    return key_transform, fit_value_transform(stats, config.center_values, size if config.hadamard_values else 1)


def _in_use(counts: list[int], num_tokens: int, device: torch.device) -> Tensor | None:
    """(B, 1, 1, T) bool: the first counts[b] of T tokens; None if that is all of them in every row."""
    if all(count == num_tokens for count in counts):
        return None
    used = torch.arange(num_tokens) < torch.tensor(counts)[:, None]
    return used[:, None, None].to(device)


def _newest_held(positions: Tensor, num_tokens: int) -> int:
    """How many of a row's newest tokens are among positions (G, n) in every head."""
    held = torch.zeros(positions.shape[0], num_tokens, dtype=torch.bool, device=positions.device)
    held.scatter_(1, positions.long(), True)
    missing = (~held.all(0)).nonzero()
    return num_tokens - int(missing.max()) - 1 if len(missing) else num_tokens
