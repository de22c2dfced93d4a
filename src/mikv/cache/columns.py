"""Which columns of a padded batch are tokens. Reads attention masks; knows nothing about keys, values or tiers.

A column is one step of the batch; in each row it is a token or padding. A token's position is its place among the
tokens of its row. Padding is remembered as intervals, so it costs no bytes per token.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mikv.errors import UnsupportedModelError


@dataclass(frozen=True)
class StepMask:
    """What a step's attention mask says about its new columns.

    valid  (B, Tq) bool, True for tokens, or None if all are
    fresh  (B, 1, Tq, Tq) bool, which new columns a query sees, or None if those up to its own
    """

    valid: Tensor | None
    fresh: Tensor | None


class Columns:
    """The columns seen so far, per row. Never changed, but replaced."""

    def __init__(self, batch: int) -> None:
        self.num_columns = 0
        self.num_tokens = [0] * batch
        self.holes: list[list[tuple[int, int]]] = [[] for _ in range(batch)]  # padding, [start, stop) intervals

    def read_step(self, mask: Tensor | None, num_queries: int) -> StepMask:
        """Split a mask (B, 1, Tq, columns + Tq) into what it says about the new columns.

        Raises UnsupportedModelError if it hides stored tokens, shows padding, differs between heads or adds a bias:
        low-tier tokens have no place, so a mask cannot pick among them.
        """
        if mask is None:
            return StepMask(None, None)
        visible = _as_bool(mask)
        fresh = visible[..., self.num_columns :]
        if fresh.shape[-1] != num_queries:
            raise UnsupportedModelError(
                f"the attention mask has {visible.shape[-1]} columns, the cache and the new tokens "
                f"{self.num_columns + num_queries}; pass the mask of the whole sequence"
            )
        valid = fresh.diagonal(dim1=-2, dim2=-1)[:, 0].expand(len(self.num_tokens), -1)  # (B, Tq): sees itself
        self._check_past(visible[..., : self.num_columns], valid)
        return StepMask(None if bool(valid.all()) else valid, fresh)

    def advanced(self, valid: Tensor | None, num_queries: int) -> Self:
        """These columns and a step's new ones."""
        after = self._copy()
        after.num_columns += num_queries
        if valid is None:
            after.num_tokens = [count + num_queries for count in self.num_tokens]
            return after
        after.holes = [list(row) for row in self.holes]
        for row, flags in enumerate(valid.tolist()):
            after.num_tokens[row] += sum(flags)
            _add_holes(after.holes[row], flags, self.num_columns)
        return after

    def _copy(self) -> Self:
        other = type(self)(0)
        other.num_columns, other.num_tokens, other.holes = self.num_columns, list(self.num_tokens), self.holes
        return other

    def valid(self, device: torch.device) -> Tensor | None:
        """(B, num_columns) bool, True for tokens; None if there is no padding."""
        if not any(self.holes):
            return None
        valid = torch.ones(len(self.holes), self.num_columns, dtype=torch.bool, device="cpu")
        for row, holes in enumerate(self.holes):
            for start, stop in holes:
                valid[row, start:stop] = False
        return valid.to(device)

    def tokens_in_last(self, num_columns: int) -> list[int]:
        """How many of the last `num_columns` are tokens, per row."""
        first = self.num_columns - num_columns
        return [num_columns - sum(max(0, stop - max(start, first)) for start, stop in holes) for holes in self.holes]

    def cropped(self, num_columns: int) -> Self:
        """These columns without the last `num_columns`."""
        before, removed = self._copy(), self.tokens_in_last(num_columns)
        before.num_tokens = [count - gone for count, gone in zip(self.num_tokens, removed, strict=True)]
        before.num_columns -= num_columns
        end = before.num_columns
        before.holes = [[(start, min(stop, end)) for start, stop in row if start < end] for row in self.holes]
        return before

    def of_rows(self, index: Tensor) -> Self:
        """Columns whose rows are those of `index`."""
        chosen, rows = self._copy(), index.tolist()
        chosen.num_tokens, chosen.holes = [self.num_tokens[row] for row in rows], [self.holes[row] for row in rows]
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {"num_columns": self.num_columns, "num_tokens": self.num_tokens, "holes": self.holes}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        columns = cls(len(state["num_tokens"]))
        columns.num_columns = int(state["num_columns"])
        columns.num_tokens = [int(count) for count in state["num_tokens"]]
        columns.holes = [[(int(start), int(stop)) for start, stop in row] for row in state["holes"]]
        return columns

    def _check_past(self, visible: Tensor, valid: Tensor) -> None:
        expected = self.valid(visible.device)
        wrong = ~visible if expected is None else visible != expected[:, None, None]  # (B, 1, Tq, past)
        wrong = wrong & valid[:, None, :, None]  # what padding looks at does not matter
        if not bool(wrong.any()):
            return
        row, _, _, column = (int(i) for i in wrong.nonzero()[0])
        raise UnsupportedModelError(
            f"the attention mask treats column {column} of row {row} differently from the step that stored it: tokens "
            "in a MiKV cache cannot be hidden or added later; use a cache of its own for each mask"
        )


def _add_holes(holes: list[tuple[int, int]], flags: list[bool], first: int) -> None:
    """Add the padding among the columns from `first` on, where `flags` are False."""
    for column, is_token in enumerate(flags, first):
        if is_token:
            continue
        if holes and holes[-1][1] == column:
            holes[-1] = (holes[-1][0], column + 1)
        else:
            holes.append((column, column + 1))


def _as_bool(mask: Tensor) -> Tensor:
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise UnsupportedModelError(
            f"an attention mask of shape {tuple(mask.shape)} is not (batch, 1, queries, columns); "
            "mikv needs one mask for all heads"
        )
    if mask.dtype == torch.bool:
        return mask
    lowest = torch.finfo(mask.dtype).min / 2
    if not bool(((mask == 0) | (mask <= lowest)).all()):
        raise UnsupportedModelError("the attention mask adds a position bias (as ALiBi does); mikv supports none")
    return mask == 0
