"""Storage of the two tiers of one layer. Knows bytes, slots, blocks and positions; knows nothing about attention.

    high tier   R slots per row and KV head:    K parts, V parts, score float32, position int32
    low tier    blocks of 32 tokens:            K parts, V parts; a block is written once and never changed

Each KV head has its own partition of the tokens, but every head of a row has the same number of tokens in each tier, so
one count per row says how much of a table is in use. B batch (rows), G KV heads, D head dim.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mikv.formats import BLOCK_TOKENS, Format, Parts, PartShapes

EntryShapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Table:
    """Named tensors (B, G, capacity, ...) that grow together; row b uses its first `counts[b]` entries."""

    def __init__(self, shapes: EntryShapes, batch: int, num_heads: int, device: torch.device) -> None:
        self.counts = [0] * batch
        self.capacity = 0
        self.tensors = {
            name: torch.empty(batch, num_heads, 0, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in shapes.items()
        }

    @property
    def used(self) -> int:
        """Entries in use in the fullest row."""
        return max(self.counts, default=0)

    @property
    def nbytes(self) -> int:
        """All bytes allocated, slack included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def resize(self, capacity: int) -> None:
        """Allocate exactly `capacity` entries per row; those in use are copied as they are."""
        assert capacity >= self.used, (capacity, self.used)
        for name, old in self.tensors.items():
            new = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self.used] = old[:, :, : self.used]
            self.tensors[name] = new
        self.capacity = capacity

    def write(self, row: int, entries: Mapping[str, Tensor]) -> None:
        """Append entries (G, N, ...) to a row that has the capacity for them."""
        first = self.counts[row]
        for name, tensor in self.tensors.items():
            new = entries[name]
            tensor[row, :, first : first + new.shape[1]] = new
        self.counts[row] = first + new.shape[1]

    def keep(self, row: int, entries: Tensor) -> None:
        """Keep only the entries (G, M) of a row, in that order."""
        count = entries.shape[1]
        for tensor in self.tensors.values():
            tensor[row, :, :count] = take(tensor[row], entries)
        self.counts[row] = count

    def select_rows(self, index: Tensor) -> None:
        """Rows `index` (B',) become the rows of the table; a row may be taken several times."""
        self.tensors = {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.tensors.items()}
        self.counts = [self.counts[i] for i in index.tolist()]

    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        self.tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor], counts: list[int]) -> None:
        """Take over saved tensors. Raises ValueError if they are not of this table's shapes and dtypes."""
        capacities = {tensor.shape[2] for tensor in tensors.values()}
        if len(capacities) != 1 or not 0 <= min(counts) <= max(counts) <= min(capacities):
            raise ValueError(f"{counts} entries do not fit tables of {sorted(capacities)}")
        for name, own in self.tensors.items():
            new = tensors[name]
            if new.dtype != own.dtype or (*new.shape[:2], *new.shape[3:]) != (*own.shape[:2], *own.shape[3:]):
                raise ValueError(f"{name} has shape {tuple(new.shape)} and dtype {new.dtype}")
        self.tensors, self.counts, self.capacity = dict(tensors), list(counts), capacities.pop()


class HighTier:
    """Tokens in high precision, one slot each, with their scores and positions."""

    def __init__(self, formats: tuple[Format, Format], shape: tuple[int, int, int], device: torch.device) -> None:
        """`shape` is (B, G, D)."""
        batch, num_heads, head_dim = shape
        self.key_format, self.value_format = formats
        entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: (part_shape[1:], dtype)
            for name, (part_shape, dtype) in _pair_shapes(formats, num_tokens=1, head_dim=head_dim).items()
        }
        entries |= {"score": ((), torch.float32), "position": ((), torch.int32)}
        self.table = Table(entries, batch, num_heads, device)

    def append(self, row: int, keys: Tensor, values: Tensor, scores: Tensor, positions: Tensor) -> None:
        """Add tokens (G, N, D) with scores and positions (G, N) to a row that has room for them."""
        parts = _prefixed("k", self.key_format.encode(keys)) | _prefixed("v", self.value_format.encode(values))
        self.table.write(row, parts | {"score": scores, "position": positions})

    def keys(self, start: int, stop: int) -> Tensor:
        """Decode the keys of slots [start, stop) of all rows: (B, G, N, D) float32."""
        return self.key_format.decode(_sliced(self.table, "k", start, stop))

    def values(self, start: int, stop: int) -> Tensor:
        """Decode the values of slots [start, stop) of all rows."""
        return self.value_format.decode(_sliced(self.table, "v", start, stop))

    def take(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Decode the keys and values (G, N, D) of slots (G, N) of a row."""
        chosen = {name: take(tensor[row], slots) for name, tensor in self.table.tensors.items()}
        return self.key_format.decode(_unprefixed("k", chosen)), self.value_format.decode(_unprefixed("v", chosen))

    @property
    def scores(self) -> Tensor:
        """Scores (B, G, capacity) float32."""
        return self.table.tensors["score"]

    @property
    def positions(self) -> Tensor:
        """Positions (B, G, capacity) int32."""
        return self.table.tensors["position"]


class LowTier:
    """Tokens in low precision, in blocks of 32."""

    def __init__(self, formats: tuple[Format, Format], shape: tuple[int, int, int], device: torch.device) -> None:
        """`shape` is (B, G, D)."""
        batch, num_heads, head_dim = shape
        self.key_format, self.value_format = formats
        self.table = Table(_pair_shapes(formats, BLOCK_TOKENS, head_dim), batch, num_heads, device)

    @property
    def num_tokens(self) -> int:
        """Tokens in the fullest row."""
        return self.table.used * BLOCK_TOKENS

    def append(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens (G, 32 * n, D) to a row as n new blocks."""
        num_blocks = keys.shape[1] // BLOCK_TOKENS
        needed = self.table.counts[row] + num_blocks
        if needed > self.table.capacity:
            # 1/64 of slack: copying the packed blocks once per needed/64 blocks costs less than reading them does
            grown = self.table.capacity > 0
            self.table.resize(needed + (needed // 64 if grown else 0))
        blocks = (x.unflatten(1, (num_blocks, BLOCK_TOKENS)) for x in (keys, values))  # (G, n, 32, D)
        parts = [form.encode(x) for form, x in zip((self.key_format, self.value_format), blocks, strict=True)]
        self.table.write(row, _prefixed("k", parts[0]) | _prefixed("v", parts[1]))

    def keys(self, start: int, stop: int) -> Tensor:
        """Decode the keys of tokens [start, stop) of all rows, multiples of 32: (B, G, N, D) float32."""
        return self._decode(self.key_format, "k", start, stop)

    def values(self, start: int, stop: int) -> Tensor:
        """Decode the values of tokens [start, stop) of all rows, multiples of 32."""
        return self._decode(self.value_format, "v", start, stop)

    def _decode(self, form: Format, which: str, start: int, stop: int) -> Tensor:
        return form.decode(_sliced(self.table, which, start // BLOCK_TOKENS, stop // BLOCK_TOKENS)).flatten(2, 3)


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
    heads = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    return tensor[heads, index]


def _pair_shapes(formats: tuple[Format, Format], num_tokens: int, head_dim: int) -> PartShapes:
    shapes: PartShapes = {}
    for prefix, form in zip("kv", formats, strict=True):
        shapes |= {f"{prefix}.{name}": part for name, part in form.part_shapes(num_tokens, head_dim).items()}
    return shapes


def _prefixed(prefix: str, parts: Parts) -> Parts:
    return {f"{prefix}.{name}": tensor for name, tensor in parts.items()}


def _unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Parts:
    return {name[2:]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def _sliced(table: Table, prefix: str, start: int, stop: int) -> Parts:
    return {name: tensor[:, :, start:stop] for name, tensor in _unprefixed(prefix, table.tensors).items()}


def _grown(tensor: Tensor, used: int, capacity: int) -> Tensor:
    new = tensor.new_empty(*tensor.shape[:2], capacity, tensor.shape[3])
    new[:, :, :used] = tensor[:, :, :used]
    return new
