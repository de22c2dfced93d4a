"""The tokens of a layer in two tiers: attention over both, appending, demotion. Knows nothing about transformers.

B batch, H query heads, G KV heads, Tq new tokens, D head dim.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mikv.cache.accounting import high_tier_capacity
from mikv.cache.afar import attend_from_afar
from mikv.cache.columns import Columns, StepMask
from mikv.cache.config import MiKVConfig
from mikv.cache.formats import layer_formats
from mikv.cache.norms import norms_of_slots, norms_of_tokens
from mikv.cache.partition import choose, others
from mikv.cache.policies.base import ImportancePolicy, no_attention
from mikv.cache.tiers import Tier, take
from mikv.cache.warm_up import WarmUp
from mikv.errors import CacheStateError
from mikv.formats import BLOCK_TOKENS
from mikv.ops import AttentionOptions, append, attend, demote, pack
from mikv.transforms import (
    KeyTransform,
    PromptStatistics,
    ValueTransform,
    fit_key_transform,
    fit_value_transform,
    hadamard_block_size,
    with_feedback,
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
        rows = (batch, num_heads)
        self.config, self.policy = config, policy
        self.model_dtype = like.dtype
        high = Tier(formats.high, rows, like.device, formats.high_is_quantized, with_scores=True)
        low = None
        if formats.low is not None:
            low = Tier(formats.low, rows, like.device, transformed=True, with_scores=False)
        self._tiers = high, low  # replaced in one assignment, so that no token is in both or in none
        self._set_transforms(*transforms)

    @property
    def high(self) -> Tier:
        """The high tier."""
        return self._tiers[0]

    @property
    def low(self) -> Tier | None:
        """The low tier."""
        return self._tiers[1]

    def _set_transforms(self, key_transform: KeyTransform, value_transform: ValueTransform) -> None:
        self.transforms = key_transform, value_transform
        rows = range(len(self.high.counts))
        self.row_transforms = [(key_transform.of_row(row), value_transform.of_row(row)) for row in rows]

    @classmethod
    def partition(cls, warm_up: WarmUp, columns: Columns) -> "Packed":
        """End the warm-up: fit the transforms on its tokens and divide them between the tiers."""
        keys, values = warm_up.tokens.keys, warm_up.tokens.values
        num_heads, device = keys.shape[1], keys.device
        valid = columns.valid(device)
        if valid is None:
            valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=device)
        packed = cls(warm_up.config, warm_up.policy, keys, fit_transforms(warm_up, valid))
        scores = packed.policy.initial_scores(keys, warm_up.statistics.attention)

        choices = []
        for row, count in enumerate(columns.num_tokens):
            tokens = valid[row].nonzero()[:, 0].expand(num_heads, -1)  # (G, n) columns
            positions = torch.arange(count, dtype=torch.int32, device=device).expand(num_heads, -1)
            weighed = take(scores[row], tokens)
            if packed.policy.weighs_norms:
                weighed = weighed * norms_of_tokens(keys[row], values[row], tokens, packed.row_transforms[row])
            demoted = choose(weighed, positions, count, packed.config, packed.policy)
            choices.append((take(tokens, demoted), others(demoted, count), tokens))
        packed.high.resize(packed._high_capacity(max(kept.shape[1] for _, kept, _ in choices), columns))
        if packed.low is not None:
            packed.low.resize(max(demoted.shape[1] for demoted, _, _ in choices))
        for row, (demoted, positions, tokens) in enumerate(choices):
            kept = take(tokens, positions)
            if packed.low is not None:
                packed._store(packed.low, row, (keys[row], values[row]), demoted, packed._feedback(row))
            packed.high.scores[row, :, : kept.shape[1]] = take(scores[row], kept)
            packed.high.positions[row, :, : kept.shape[1]] = positions
            packed._store(packed.high, row, (keys[row], values[row]), kept)
        return packed

    def _store(
        self,
        tier: Tier,
        row: int,
        of_row: tuple[Tensor, Tensor],
        tokens: Tensor,
        feedback: Tensor | None = None,
    ) -> None:
        """Append the tokens (G, n) of a row's keys and values (G, T, D) to a tier that has the room, tile by tile."""
        for tile in tokens.split(TILE_TOKENS, dim=1):
            keys, values = (take(x, tile) for x in of_row)
            first = tier.counts[row]
            pack(tier.view, row, first, keys, values, self.row_transforms[row], feedback)
            tier.set_count(row, first + tile.shape[1])

    def _feedback(self, row: int) -> Tensor | None:
        """How errors of a row's low keys are passed on (G, D, D); spread out only while tokens are rounded."""
        return self.row_transforms[row][0].dense_feedback()

    def attend(
        self, queries: Tensor, new: tuple[Tensor, Tensor], step: StepMask, options: AttentionOptions, columns: Columns
    ) -> tuple[Tensor, Callable[[], None]]:
        """Attend to both tiers and exactly to the `new` keys and values.

        Returns the output, and what makes the step count: until then the new tokens lie in slots that are not in use.
        """
        num_queries, policy = queries.shape[2], self.policy
        self._make_room(num_queries, columns)
        weight = self._query_weight(step, num_queries, len(columns.num_tokens))
        if policy.uses_attention and policy.attention_distance:
            output, received_high, received_new = attend_from_afar(
                partial(self._attend, options=options),
                queries,
                new,
                step.fresh,
                weight,
                (self.high.positions, columns.num_tokens),
                policy.attention_distance,
            )
        else:
            output, received_high, received_new = self._attend(queries, new, step.fresh, weight, options)
        scores = None
        if received_high is None or received_new is None:
            attention = no_attention(new[0])
        else:  # of slots that are not in use, too: theirs mean nothing
            scores = policy.update_scores(self.high.scores, received_high, num_queries)
            attention = policy.update_scores(torch.zeros_like(received_new), received_new, num_queries)
        return output, self._appended(new, policy.initial_scores(new[0], attention), step.valid, columns, scores)

    def _attend(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        mask: Tensor | None,
        weight: Tensor | None,
        options: AttentionOptions,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tiers = self.high.view, None if self.low is None else self.low.view
        return attend(queries, new, mask, tiers, self.transforms, options, weight, self.policy.uses_attention)

    def demote(self, columns: Columns) -> None:
        """Move the least important tokens of every row that is a block over its budget to the low tier."""
        high, moves = self.high, {}
        for row, (count, num_tokens) in enumerate(zip(high.counts, columns.num_tokens, strict=True)):
            if count - self.config.high_budget(num_tokens) < BLOCK_TOKENS:
                continue
            scores, positions = high.scores[row, :, :count], high.positions[row, :, :count]
            if self.policy.weighs_norms:
                scores = scores * norms_of_slots(high, row, self.row_transforms[row])
            slots = choose(scores, positions, num_tokens, self.config, self.policy)
            if slots.shape[1]:  # else what is over the budget is protected
                moves[row] = slots
        tiers = self._without(moves, self.low) if moves else self._tiers
        needed = self._high_capacity(tiers[0].used, columns)
        if tiers[0].capacity > needed:
            tiers[0].resize(needed)  # a chunk of several tokens has passed through
        self._tiers = tiers

    def _without(self, moves: Mapping[int, Tensor], low: Tier | None) -> tuple[Tier, Tier | None]:
        """Tiers whose rows have the high slots `moves[row]` (G, n) in the low one, or nowhere; these stay as they are.

        The high tier is a copy. Of the low tier only slots that are not in use are written.
        """
        high = self.high.copy({name: tensor.clone() for name, tensor in self.high.tensors.items()})
        low = None if low is None else low.copy()
        for row, slots in moves.items():
            count = slots.shape[1]
            if low is not None:
                low.reserve(low.counts[row] + count)
            transforms = None if high.transformed else self.row_transforms[row]
            feedback = None if low is None else self._feedback(row)
            demote(high.view, None if low is None else low.view, row, slots, transforms, feedback)
            high.set_count(row, high.counts[row] - count)
            if low is not None:
                low.set_count(row, low.counts[row] + count)
        return high, low

    def cropped(self, num_columns: int, columns: Columns) -> Callable[[], None]:
        """What takes back the last `num_columns`. Raises CacheStateError if some were demoted already."""
        gone = dict(enumerate(self.slots_of_last(num_columns, columns)))
        high, _ = self._without(gone, None)
        tiers = high, self.low

        def commit() -> None:
            self._tiers = tiers

        return commit

    def slots_of_last(self, num_columns: int, columns: Columns) -> list[Tensor]:
        """Per row, the high slots (G, n), ascending, of the tokens among the last `num_columns`.

        Raises CacheStateError if some of those are in the low tier.
        """
        slots = []
        for row, gone in enumerate(columns.tokens_in_last(num_columns)):
            positions = self.high.positions[row, :, : self.high.counts[row]]
            goes = positions >= columns.num_tokens[row] - gone  # (G, n)
            if not bool((goes.sum(1) == gone).all()):
                raise CacheStateError(
                    f"cannot take back {num_columns} tokens: some are in the low tier already; only the newest "
                    f"{_newest_held(positions, columns.num_tokens[row])} are all in the high tier; raise min_recent, "
                    f"now {self.config.min_recent}"
                )
            slots.append(goes.nonzero()[:, 1].view(len(goes), gone))
        return slots

    def of_rows(self, index: Tensor) -> "Packed":
        """The same of rows `index` (B',)."""
        other = copy.copy(self)
        other._tiers = self.high.of_rows(index), None if self.low is None else self.low.of_rows(index)
        keys, values = self.transforms
        index = index.to(self.high.scores.device)
        other._set_transforms(
            keys.map(lambda x: x.index_select(0, index)), values.map(lambda x: x.index_select(0, index))
        )
        return other

    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        self.high.to(device)
        if self.low is not None:
            self.low.to(device)
        keys, values = self.transforms
        self._set_transforms(keys.map(lambda x: x.to(device)), values.map(lambda x: x.to(device)))

    def bytes_by_part(self) -> dict[str, int]:
        """All bytes allocated; `high` and `low` are codes, scales and zeros."""
        scores, positions = self.high.scores.nbytes, self.high.positions.nbytes
        transforms = [tensor for transform in self.transforms for tensor in transform.tensors().values()]
        return {
            "high": self.high.nbytes - scores - positions,
            "low": 0 if self.low is None else self.low.nbytes,
            "scores": scores,
            "positions": positions,
            "transforms": sum(tensor.nbytes for tensor in transforms),
        }

    def tokens_by_tier(self, num_tokens: int) -> dict[str, int]:
        """Where the `num_tokens` tokens of all rows are."""
        high = sum(self.high.counts)
        low = 0 if self.low is None else sum(self.low.counts)
        return {"high": high, "low": low, "dropped": num_tokens - high - low}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as JSON types."""
        tensors = {
            f"{tier}.{name}": x for tier, table in self._named_tiers().items() for name, x in table.tensors.items()
        }
        for which, transform in zip(("key_transform", "value_transform"), self.transforms, strict=True):
            tensors |= {f"{which}.{name}": x for name, x in transform.tensors().items()}
        counts = {name: list(tier.counts) for name, tier in self._named_tiers().items()}
        return tensors, {"kind": "packed", "dtype": str(self.model_dtype).removeprefix("torch."), "counts": counts}

    def _named_tiers(self) -> dict[str, Tier]:
        return {"high": self.high} | ({} if self.low is None else {"low": self.low})

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
        like = torch.empty(batch, num_heads, 0, head_dim, dtype=getattr(torch, meta["dtype"]), device="cpu")
        size = hadamard_block_size(head_dim)
        key_transform = KeyTransform(
            center=tensors["key_transform.center"] if config.center_keys else None,
            hadamard_size=size if config.hadamard_keys else 1,
            balancer=tensors["key_transform.balancer"] if config.balance_keys else None,
            feedback=tensors["key_transform.feedback"] if config.has_feedback else None,
        )
        value_center = tensors["value_transform.center"] if config.center_values else None
        value_transform = ValueTransform(value_center, size if config.hadamard_values else 1)
        packed = cls(config, policy, like, (key_transform, value_transform))
        for name, tier in packed._named_tiers().items():
            tier.restore({part: tensors[f"{name}.{part}"] for part in tier.tensors}, meta["counts"][name])
        return packed

    def _query_weight(self, step: StepMask, num_queries: int, batch: int) -> Tensor | None:
        """Which queries (B, Tq) the policy counts: of tokens only, and only those that it asks."""
        counted = self.policy.counted_queries(num_queries)
        if len(range(num_queries)[counted]) == num_queries:
            return step.valid
        weight = torch.zeros(batch, num_queries, dtype=torch.bool, device=self.high.scores.device)
        weight[:, counted] = True
        return weight if step.valid is None else weight & step.valid

    def _make_room(self, num_new: int, columns: Columns) -> None:
        """Have slots for the next tokens of the fullest row."""
        needed = self.high.used + num_new
        if needed > self.high.capacity:
            self.high.resize(self._high_capacity(needed, columns))

    def _appended(
        self,
        new: tuple[Tensor, Tensor],
        new_scores: Tensor,
        valid: Tensor | None,
        columns: Columns,
        scores: Tensor | None,
    ) -> Callable[[], None]:
        """Put new tokens after those in use. Returns what makes them count, and `scores` those of the others."""
        high, counts = self.high, self.high.counts
        num_new = [new[0].shape[2]] * len(counts) if valid is None else valid.sum(1).tolist()
        if valid is None:
            append(high.view, *new, new_scores, columns.num_tokens, self.transforms)
        else:
            for row, first in enumerate(columns.num_tokens):
                self._append_to_row(row, first, tuple(x[row][:, valid[row]] for x in (*new, new_scores)))
        if scores is not None:
            for row, (first, added) in enumerate(zip(counts, num_new, strict=True)):
                scores[row, :, first : first + added] = high.scores[row, :, first : first + added]
        after = [count + added for count, added in zip(counts, num_new, strict=True)]
        on_host = torch.tensor(after, dtype=torch.int64, device="cpu")

        def commit() -> None:
            if scores is not None:
                high.scores.copy_(scores)
            high.set_counts(after, on_host)

        return commit

    def _append_to_row(self, row: int, position: int, tokens: tuple[Tensor, ...]) -> None:
        """Put keys, values (G, n, D) and scores (G, n) of tokens from `position` on after those in use."""
        high, (keys, values, scores) = self.high, tokens
        first, added = high.counts[row], keys.shape[1]
        pack(high.view, row, first, keys, values, self.row_transforms[row])
        high.scores[row, :, first : first + added] = scores
        high.positions[row, :, first : first + added] = torch.arange(
            position, position + added, dtype=torch.int32, device=scores.device
        )

    def _high_capacity(self, num_slots: int, columns: Columns) -> int:
        longest = max(columns.num_tokens, default=0)
        return high_tier_capacity(self.config, longest, num_slots)


def fit_transforms(warm_up: WarmUp, valid: Tensor) -> tuple[KeyTransform, ValueTransform]:
    """The transforms of the warm-up's tokens, marked in `valid` (B, T); its sinks do not count."""
    config, keys, queries = warm_up.config, warm_up.tokens.keys, warm_up.statistics
    body = valid & (valid.cumsum(1) > config.sinks)
    counted = torch.where(body.any(1, keepdim=True), body, valid)
    stats = PromptStatistics.measure(keys, warm_up.tokens.values, queries.query_max, counted, config.center_keys)
    size = hadamard_block_size(keys.shape[3])
    key_transform = fit_key_transform(
        stats,
        config.center_keys,
        config.balance_keys,
        config.balancer_exponents,
        size if config.hadamard_keys else 1,
    )
    if queries.query_moment is not None:
        key_transform = with_feedback(key_transform, queries.query_moment)
    return key_transform, fit_value_transform(stats, config.center_values, size if config.hadamard_values else 1)


def _newest_held(positions: Tensor, num_tokens: int) -> int:
    """How many of a row's newest tokens are among positions (G, n) in every head."""
    held = torch.zeros(positions.shape[0], num_tokens, dtype=torch.bool, device=positions.device)
    held.scatter_(1, positions.long(), True)
    missing = (~held.all(0)).nonzero()
    return num_tokens - int(missing.max()) - 1 if len(missing) else num_tokens
