"""Storage of one tier of one layer. Knows bytes, blocks, slots and positions; knows nothing about attention.

    high tier   K parts, V parts, score (32,) float32, position (32,) int32     per block of 32 slots
    low tier    K parts, V parts                                               a block is written once and never changed

Each KV head has its own partition of the tokens, but every head of a row has the same number of tokens in each tier, so
one count per row says how much of a tier is in use. B batch (rows), G KV heads, D head dim.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mikv.formats import BLOCK_TOKENS, Format, PartShapes
from mikv.ops import TierView


class Tier:
    """Named tensors (B, G, blocks, ...) that grow together; row b uses its first `counts[b]` slots.

    `view` is what operations are given; it is replaced when tensors or rows are, and its counts follow `set_count`.
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
        self.tensors = {
            name: torch.empty(*rows, 0, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }
        self._adopt([0] * rows[0])

    def _adopt(self, counts: list[int]) -> None:
        """Show the tensors and counts in a new view."""
        self.counts = counts
        self.capacity = next(iter(self.tensors.values())).shape[2] * BLOCK_TOKENS
        pages = torch.arange(len(counts), dtype=torch.int32, device="cpu")[:, None]  # a row is a page
        self.view = TierView(
            self.formats, self.tensors, pages, torch.tensor(counts, dtype=torch.int64, device="cpu"), self.transformed
        )

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

    def advance(self, num_tokens: int) -> None:
        """The next `num_tokens` slots of every row are in use, too."""
        self.counts = [count + num_tokens for count in self.counts]
        self.view.counts.add_(num_tokens)

    def resize(self, capacity: int) -> None:
        """Allocate exactly `capacity` slots per row, whole blocks; those in use are copied as they are."""
        assert capacity % BLOCK_TOKENS == 0, capacity
        assert capacity >= self.used, (capacity, self.used)
        blocks, used = capacity // BLOCK_TOKENS, -(-self.used // BLOCK_TOKENS)
        for name, old in self.tensors.items():
            new = old.new_empty(*old.shape[:2], blocks, *old.shape[3:])
            new[:, :, :used] = old[:, :, :used]
            new[:, :, used:] = 0  # a saved cache holds nothing of what the memory held before
            self.tensors[name] = new
        self._adopt(self.counts)

    def reserve(self, num_tokens: int) -> None:
        """Have room for `num_tokens`, whole blocks, in each row."""
        if num_tokens > self.capacity:
            # 1/64 of slack: copying the packed blocks once per needed/64 blocks costs less than reading them does
            slack = num_tokens // BLOCK_TOKENS // 64 if self.capacity else 0
            self.resize(num_tokens + slack * BLOCK_TOKENS)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index` (B',) become the rows of the tier; a row may be taken several times."""
        self.tensors = {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.tensors.items()}
        self._adopt([self.counts[row] for row in index.tolist()])

    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        self.tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        self._adopt(self.counts)

    def restore(self, tensors: Mapping[str, Tensor], counts: list[int]) -> None:
        """Take over saved tensors. Raises ValueError if they are not of this tier's shapes and dtypes."""
        capacities = {tensor.shape[2] * BLOCK_TOKENS for tensor in tensors.values()}
        if len(capacities) != 1 or not 0 <= min(counts) <= max(counts) <= min(capacities):
            raise ValueError(f"{counts} tokens do not fit tiers of {sorted(capacities)}")
        for name, own in self.tensors.items():
            new = tensors[name]
            if new.dtype != own.dtype or (*new.shape[:2], *new.shape[3:]) != (*own.shape[:2], *own.shape[3:]):
                raise ValueError(f"{name} has shape {tuple(new.shape)} and dtype {new.dtype}")
        self.tensors = dict(tensors)
        self._adopt(list(counts))


class RawTokens:
    """All tokens as the model made them, columns in order with padding: the full cache, and the first few tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys.contiguous(), values.contiguous()
        self.num_columns = keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """(B, G, T, D) in the model's dtype."""
        return self._keys[:, :, : self.num_columns]

    @property
    def values(self) -> Tensor:
        """(B, G, T, D) in the model's dtype."""
        return self._values[:, :, : self.num_columns]

    @property
    def nbytes(self) -> int:
        """All bytes allocated, slack included."""
        return self._keys.nbytes + self._values.nbytes

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add columns (B, G, N, D). The first take what they need; later growth is by 1/16, so that it is amortised."""
        needed = self.num_columns + keys.shape[2]
        if needed > self._keys.shape[2]:
            capacity = needed + (needed // 16 if self.num_columns else 0)
            self._keys, self._values = (_grown(x, self.num_columns, capacity) for x in (self._keys, self._values))
        self._keys[:, :, self.num_columns : needed] = keys
        self._values[:, :, self.num_columns : needed] = values
        self.num_columns = needed

    def crop(self, num_columns: int) -> None:
        """Forget the last `num_columns`."""
        self.num_columns -= num_columns

    def select_rows(self, index: Tensor) -> None:
        """Rows `index` (B',) become the rows."""
        index = index.to(self._keys.device)
        self._keys, self._values = self._keys.index_select(0, index), self._values.index_select(0, index)

    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        self._keys = self._keys.to(device, non_blocking=True)
        self._values = self._values.to(device, non_blocking=True)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries index (G, N) of a tensor (G, T, ...): (G, N, ...)."""
    heads = torch.arange(tensor.shape[0], dtype=torch.int64, device=tensor.device)[:, None]
    return tensor[heads, index]


def _grown(tensor: Tensor, used: int, capacity: int) -> Tensor:
    new = tensor.new_empty(*tensor.shape[:2], capacity, tensor.shape[3])
    new[:, :, :used] = tensor[:, :, :used]
    return new
