"""Storage of one tier of one layer. Knows bytes, blocks, slots and positions; knows nothing about attention.

    high tier   K parts, V parts, score (32,) float32, position (32,) int32     per block of 32 slots
    low tier    K parts, V parts                                               a block is written once and never changed

Each KV head has its own partition of the tokens, but every head of a row has the same number of tokens in each tier, so
one count per row says how much of a tier is in use. B batch (rows), G KV heads, D head dim.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from mikv.formats import BLOCK_TOKENS, Format, PartShapes
from mikv.ops import TierView


class Tier:
    """Named tensors (B, G, blocks, ...) that grow together; row b uses its first `counts[b]` slots.

    `view` is what operations are given, and holds all tensors: it is replaced when they are, in one assignment, so that
    an interruption finds the old storage or the new one. Slots that are not in use may be written at any time.
    """

    def __init__(
        self,
        formats: tuple[Format, Format],
        rows: tuple[int, int],
        device: torch.device,
        transformed: bool,
        with_scores: bool,
    ) -> None:
        """`rows` is (B, G)."""
        self.formats, self.transformed = formats, transformed
        shapes: PartShapes = {}
        for prefix, form in zip("kv", formats, strict=True):
            shapes |= {f"{prefix}.{name}": part for name, part in form.part_shapes().items()}
        if with_scores:
            shapes |= {"score": ((BLOCK_TOKENS,), torch.float32), "position": ((BLOCK_TOKENS,), torch.int32)}
        empty = {
            name: torch.empty(*rows, 0, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }
        self._adopt(empty, [0] * rows[0])

    def _adopt(self, tensors: dict[str, Tensor], counts: list[int]) -> None:
        """Show the tensors and counts in a new view."""
        pages = torch.arange(len(counts), dtype=torch.int32, device="cpu")[:, None]  # a row is a page
        on_host = torch.tensor(counts, dtype=torch.int64, device="cpu")
        view = TierView(self.formats, tensors, pages, on_host, self.transformed)
        self.counts, self.view = counts, view

    def copy(self, tensors: Mapping[str, Tensor] | None = None) -> "Tier":
        """A tier with counts of its own and the same tensors, or others of the same kind."""
        other = copy.copy(self)
        other._adopt(dict(self.tensors if tensors is None else tensors), list(self.counts))
        return other

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The storage by part, (B, G, blocks, ...)."""
        return self.view.parts

    @property
    def capacity(self) -> int:
        """Slots that a row has."""
        return self.view.capacity

    @property
    def used(self) -> int:
        """Slots in use in the fullest row."""
        return max(self.counts, default=0)

    @property
    def scores(self) -> Tensor:
        """Scores (B, G, capacity) float32 of a tier that has them."""
        return self.tensors["score"].view(*self.tensors["score"].shape[:2], self.capacity)

    @property
    def positions(self) -> Tensor:
        """Positions (B, G, capacity) int32 of a tier that has them."""
        return self.tensors["position"].view(*self.tensors["position"].shape[:2], self.capacity)

    @property
    def nbytes(self) -> int:
        """All bytes allocated, slack included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def set_count(self, row: int, count: int) -> None:
        """The first `count` slots of a row are in use."""
        self.counts[row] = count
        self.view.counts[row] = count

    def set_counts(self, counts: list[int], on_host: Tensor) -> None:
        """Set all rows' counts, given as a tensor (B,) int64, too. May be repeated."""
        self.view.counts.copy_(on_host)
        self.counts = counts

    def resize(self, capacity: int) -> None:
        """Allocate exactly `capacity` slots per row, whole blocks; those in use are copied as they are."""
        assert capacity % BLOCK_TOKENS == 0, capacity
        assert capacity >= self.used, (capacity, self.used)
        blocks, used = capacity // BLOCK_TOKENS, -(-self.used // BLOCK_TOKENS)
        resized = {}
        for name, old in self.tensors.items():
            new = old.new_empty(*old.shape[:2], blocks, *old.shape[3:])
            new[:, :, :used] = old[:, :, :used]
            new[:, :, used:] = 0  # a saved cache holds nothing of what the memory held before
            resized[name] = new
        self._adopt(resized, self.counts)

    def reserve(self, num_tokens: int) -> None:
        """Have room for `num_tokens`, whole blocks, in each row."""
        if num_tokens > self.capacity:
            # 1/64 of slack: copying the packed blocks once per needed/64 blocks costs less than reading them does
            slack = num_tokens // BLOCK_TOKENS // 64 if self.capacity else 0
            self.resize(num_tokens + slack * BLOCK_TOKENS)

    def of_rows(self, index: Tensor) -> "Tier":
        """A tier whose rows are those of `index` (B',); a row may be taken several times."""
        other = copy.copy(self)
        chosen = {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.tensors.items()}
        other._adopt(chosen, [self.counts[row] for row in index.tolist()])
        return other

    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        self._adopt(moved, self.counts)

    def restore(self, tensors: Mapping[str, Tensor], counts: list[int]) -> None:
        """Take over saved tensors. Raises ValueError if they are not of this tier's shapes and dtypes."""
        capacities = {tensor.shape[2] * BLOCK_TOKENS for tensor in tensors.values()}
        if len(capacities) != 1 or not 0 <= min(counts) <= max(counts) <= min(capacities):
            raise ValueError(f"{counts} tokens do not fit tiers of {sorted(capacities)}")
        for name, own in self.tensors.items():
            new = tensors[name]
            if new.dtype != own.dtype or (*new.shape[:2], *new.shape[3:]) != (*own.shape[:2], *own.shape[3:]):
                raise ValueError(f"{name} has shape {tuple(new.shape)} and dtype {new.dtype}")
        self._adopt(dict(tensors), list(counts))


class RawTokens:
    """All tokens as the model made them, columns in order with padding: the full cache, and the first few tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._storage = keys.contiguous(), values.contiguous()  # replaced in one assignment
        self.num_columns = keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """(B, G, T, D) in the model's dtype."""
        return self._storage[0][:, :, : self.num_columns]

    @property
    def values(self) -> Tensor:
        """(B, G, T, D) in the model's dtype."""
        return self._storage[1][:, :, : self.num_columns]

    @property
    def nbytes(self) -> int:
        """All bytes allocated, slack included."""
        return sum(tensor.nbytes for tensor in self._storage)

    def followed_by(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, T + N, D), with columns (B, G, N, D) that are kept once `num_columns` counts them.

        The first take what they need; later growth is by 1/16, so that it is amortised.
        """
        needed = self.num_columns + keys.shape[2]
        if needed > self._storage[0].shape[2]:
            capacity = needed + (needed // 16 if self.num_columns else 0)
            old = self._storage
            self._storage = _grown(old[0], self.num_columns, capacity), _grown(old[1], self.num_columns, capacity)
        for stored, new in zip(self._storage, (keys, values), strict=True):
            stored[:, :, self.num_columns : needed] = new
        return self._storage[0][:, :, :needed], self._storage[1][:, :, :needed]

    def of_rows(self, index: Tensor) -> "RawTokens":
        """Tokens whose rows are those of `index` (B',)."""
        index = index.to(self.keys.device)
        return RawTokens(self.keys.index_select(0, index), self.values.index_select(0, index))

    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        keys, values = self._storage
        self._storage = keys.to(device, non_blocking=True), values.to(device, non_blocking=True)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries index (G, N) of a tensor (G, T, ...): (G, N, ...)."""
    heads = torch.arange(tensor.shape[0], dtype=torch.int64, device=tensor.device)[:, None]
    return tensor[heads, index]


def _grown(tensor: Tensor, used: int, capacity: int) -> Tensor:
    new = tensor.new_empty(*tensor.shape[:2], capacity, tensor.shape[3])
    new[:, :, :used] = tensor[:, :, :used]
    return new
