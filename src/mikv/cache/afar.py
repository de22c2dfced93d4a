"""Attention of new tokens that counts, for the scores of others, from a distance only.

B batch, G KV heads, Tq new tokens. The output is that of all attention.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mikv.formats import BLOCK_TOKENS

Results = tuple[Tensor, Tensor | None, Tensor | None]  # the output, and what high slots and new tokens received
Attend = Callable[[Tensor, tuple[Tensor, Tensor], Tensor | None, Tensor | None], Results]

QUERIES_AT_ONCE = BLOCK_TOKENS  # of a chunk; they count for the same tokens


def attend_from_afar(
    attend: Attend,
    queries: Tensor,
    new: tuple[Tensor, Tensor],
    mask: Tensor | None,
    weight: Tensor | None,
    high: tuple[Tensor, Sequence[int]],
    distance: int,
) -> Results:
    """`attend(queries, new, mask, weight)` in blocks, whose attention counts for tokens far before their middle query.

    `high` are the positions (B, G, capacity) of the high slots and the rows' lengths. A step of one token is exact; in
    a chunk a token is counted by up to half a block too many or too few queries.
    """
    num_new, blocks = queries.shape[2], []
    if num_new <= QUERIES_AT_ONCE:
        return _forget_near(attend(queries, new, mask, weight), 0, num_new, high, distance)
    for start in range(0, num_new, QUERIES_AT_ONCE):
        rows = slice(start, min(start + QUERIES_AT_ONCE, num_new))
        seen = new if mask is not None else (new[0][:, :, : rows.stop], new[1][:, :, : rows.stop])
        block_mask = None if mask is None else mask[:, :, rows]
        block_weight = None if weight is None else weight[:, rows]
        block = attend(queries[:, :, rows], seen, block_mask, block_weight)
        blocks.append(_forget_near(block, start, rows.stop, high, distance))
    outputs, highs, freshes = zip(*blocks, strict=True)
    padded = [torch.nn.functional.pad(fresh, (0, num_new - fresh.shape[2])) for fresh in freshes]
    return torch.cat(outputs, dim=2), torch.stack(highs).sum(0), torch.stack(padded).sum(0)


def _forget_near(
    block: Results, start: int, stop: int, high: tuple[Tensor, Sequence[int]], distance: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block of the new tokens' queries [start, stop) gave, but nothing to tokens near the middle one."""
    output, received_high, received_new = block
    assert received_high is not None
    assert received_new is not None
    positions, num_tokens = high
    near = (start + stop - 1) // 2 - distance + 1  # the first new token that is
    received_high.masked_fill_(_not_before(positions, [count + near for count in num_tokens]), 0.0)
    received_new[:, :, max(0, near) :] = 0.0
    return output, received_high, received_new


def _not_before(positions: Tensor, first: list[int]) -> Tensor:
    """Which slots hold tokens from position `first` of their row on: (B, G, capacity)."""
    if min(first) == max(first):
        return positions >= first[0]
    return positions >= torch.tensor(first, dtype=torch.int64, device=positions.device)[:, None, None]
