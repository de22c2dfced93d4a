"""The operations on tiers in PyTorch, for any device: the readable twin of the kernels.

B batch, H query heads, G KV heads, P pages, Tq new tokens, D head dim. Knows tiers as `TierView`s, whose blocks it
reaches through their page tables; knows nothing about policies or models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mikv.formats import BLOCK_TOKENS, Format, Parts, SymmetricFormat
from mikv.ops.segments import AttentionOptions, Segment, attend_segments
from mikv.ops.segments import score_prompt as score_prompt
from mikv.ops.views import TierView
from mikv.transforms import KeyTransform, ValueTransform

Transforms = tuple[KeyTransform, ValueTransform]

_DEMOTED_AT_ONCE = 4 * BLOCK_TOKENS  # tokens whose floats exist between two tiers


def attend(
    queries: Tensor,
    new: tuple[Tensor, Tensor],
    mask: Tensor | None,
    tiers: tuple[TierView, TierView | None],
    transforms: Transforms,
    options: AttentionOptions,
    query_weight: Tensor | None,
    scored: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Softmax attention of queries (B, H, Tq, D) over both tiers and the new tokens together.

    `new` are the keys and values (B, G, Tq, D) of the queries' own tokens; `mask` (B or 1, 1, Tq, Tq) is True where a
    query may look among them, None is causal. Returns the output (B, H, Tq, D) in the queries' dtype and, if `scored`,
    the attention that high slots (B, G, capacity) and new tokens (B, G, Tq) received, float32: summed over the group's
    heads and over the queries, weighted by `query_weight` (B, Tq).
    """
    options.require_inference()
    high, low = tiers
    segments = [Segment.of_tensors(*new, mask, causal=mask is None), _segment(high)]
    if low is not None:
        segments.append(_segment(low))
    output, received = attend_segments(queries, segments, transforms, options, query_weight)
    if not scored:
        return output, None, None
    unused = high.capacity - received[1].shape[-1]
    return output, torch.nn.functional.pad(received[1], (0, unused)), received[0]


def pack(
    tier: TierView,
    row: int,
    first_slot: int,
    keys: Tensor,
    values: Tensor,
    transforms: Transforms | None,
    feedback: Tensor | None = None,
) -> None:
    """Quantize tokens (G, n, D) and write them to the slots of a row from `first_slot` on.

    `transforms` are the row's; a tier in their basis applies them, None says that keys and values are in it already.
    `feedback` (G, D, D) float32, for keys of 2 to 4 bits on a symmetric grid: see SymmetricFormat.
    Raises NumericsError for NaN, Inf and scales beyond 16-bit floats, after which the slots may hold anything.
    """
    if transforms is not None and tier.transformed:
        keys, values = transforms[0].encode(keys), transforms[1].encode(values)
    span = _Span(tier, row, first_slot, first_slot + keys.shape[1])
    whole = span.first == first_slot and span.stop == first_slot + keys.shape[1]
    for prefix, form, x in zip("kv", tier.formats, (keys, values), strict=True):
        passed_on = feedback if prefix == "k" else None
        if whole:
            span.write(prefix, form.pack(_quantized(form, x.unflatten(1, (-1, BLOCK_TOKENS)), passed_on)))
            continue
        tokens = form.unpack(span.read(prefix))
        slots = slice(first_slot - span.first, first_slot - span.first + x.shape[1])
        for name, part in _quantized(form, x, passed_on).items():
            held = tokens[name].flatten(1, 2)  # (G, 32 * blocks, ...)
            held[:, slots] = part
            tokens[name] = held.unflatten(1, (-1, BLOCK_TOKENS))
        span.write(prefix, form.pack(tokens))


def _quantized(form: Format, x: Tensor, feedback: Tensor | None) -> Parts:
    if feedback is None:
        return form.quantize(x)
    assert isinstance(form, SymmetricFormat), form.name
    return form.quantize_with_feedback(x, feedback)


def append(
    high: TierView,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    first_positions: Sequence[int],
    transforms: Transforms,
) -> None:
    """Put tokens (B, G, n, D) with scores (B, G, n) into the next free slots of all rows.

    The tokens' positions are those from `first_positions` (one per row) on. Raises NumericsError as `pack`
    does. The caller updates the counts.
    """
    num_tokens = keys.shape[2]
    for row, (first, position) in enumerate(zip(high.counts.tolist(), first_positions, strict=True)):
        of_row = transforms[0].of_row(row), transforms[1].of_row(row)
        pack(high, row, first, keys[row], values[row], of_row)
        span = _Span(high, row, first, first + num_tokens)
        slots = slice(first - span.first, first - span.first + num_tokens)
        positions = torch.arange(position, position + num_tokens, dtype=torch.int32, device=keys.device)
        for name, new in (("score", scores[row]), ("position", positions)):
            held = span.load(name).flatten(1, 2)  # (G, 32 * blocks)
            held[:, slots] = new
            span.store(name, held.unflatten(1, (-1, BLOCK_TOKENS)))


def unpack(tier: TierView, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Decode the keys and values (G, n, D) float32 of slots (G, n) of a row, in the tier's basis."""
    if not slots.shape[1]:
        none = torch.zeros(*slots.shape, tier.formats[0].head_dim, dtype=torch.float32, device=slots.device)
        return none, none
    span = _Span(tier, row, int(slots.min()), int(slots.max()) + 1)
    blocks, offsets = (slots - span.first) // BLOCK_TOKENS, slots % BLOCK_TOKENS
    heads = torch.arange(slots.shape[0], dtype=torch.int64, device=slots.device)[:, None]
    decoded = []
    for prefix, form in zip("kv", tier.formats, strict=True):
        tokens = form.unpack(span.read(prefix))
        chosen = {
            # what a block has only once, its tokens share
            name: part[heads, blocks, offsets] if part.shape[2] > 1 else part[heads, blocks, 0]
            for name, part in tokens.items()
        }
        decoded.append(form.dequantize(chosen))
    return decoded[0], decoded[1]


def demote(
    high: TierView,
    low: TierView | None,
    row: int,
    slots: Tensor,
    transforms: Transforms | None,
    feedback: Tensor | None = None,
) -> None:
    """Append the tokens of high slots (G, n), ascending, to the row's low tier; the last slots then fill the holes.

    The low tier gets them as new blocks (n is a multiple of 32, its count too); without one they are dropped, and n may
    be any. `transforms` are the row's, given if the high tier is raw; `feedback` is that of `pack`. Scores and
    positions move along; the order in which holes are filled is free. The caller updates the counts.
    """
    if low is not None:
        first = int(low.counts[row])
        for tokens in slots.split(_DEMOTED_AT_ONCE, dim=1):
            keys, values = unpack(high, row, tokens)
            pack(low, row, first, keys, values, None if high.transformed else transforms, feedback)
            first += tokens.shape[1]
    _fill_holes(high, row, slots)


def _fill_holes(tier: TierView, row: int, slots: Tensor) -> None:
    """Move the last slots of a row that are not among `slots` (G, n) to those that are not among the last."""
    count, num_holes = int(tier.counts[row]), slots.shape[1]
    kept = count - num_holes
    if not num_holes or not kept:
        return
    is_hole = torch.zeros(slots.shape[0], count, dtype=torch.int8, device=slots.device).scatter_(1, slots, 1)
    # as many of the last n slots stay as there are holes before them; beyond that, holes move to holes
    sources = is_hole[:, kept:].argsort(dim=1, stable=True) + kept  # (G, n)
    span = _Span(tier, row, int(slots.min()), count)
    sources, targets = sources - span.first, slots - span.first
    heads = torch.arange(slots.shape[0], dtype=torch.int64, device=slots.device)[:, None]
    for prefix, form in zip("kv", tier.formats, strict=True):
        tokens = form.unpack(span.read(prefix))
        for name, part in tokens.items():
            held = part.flatten(1, 2)  # (G, 32 * blocks, ...)
            held[heads, targets] = held[heads, sources]
            tokens[name] = held.unflatten(1, (-1, BLOCK_TOKENS))
        span.write(prefix, form.pack(tokens))
    for name in ("score", "position"):
        held = span.load(name).flatten(1, 2)  # (G, 32 * blocks)
        held[heads, targets] = held[heads, sources]
        span.store(name, held.unflatten(1, (-1, BLOCK_TOKENS)))


class _Span:
    """The blocks of a row that hold the slots [first_slot, stop_slot): copies of their parts (G, blocks, ...).

    `first` and `stop` are the first slot of the first block and the one after the last's.
    """

    def __init__(self, tier: TierView, row: int, first_slot: int, stop_slot: int) -> None:
        first_block, stop_block = first_slot // BLOCK_TOKENS, -(-stop_slot // BLOCK_TOKENS)
        assert stop_slot <= tier.capacity, (stop_slot, tier.capacity)
        self.first, self.stop = first_block * BLOCK_TOKENS, stop_block * BLOCK_TOKENS
        self._parts = tier.parts
        pages, heads, blocks = _places(tier, first_block, stop_block)
        self._index = pages[row], heads, blocks

    def load(self, name: str) -> Tensor:
        """A copy of a part."""
        return self._parts[name][self._index]

    def store(self, name: str, part: Tensor) -> None:
        """The inverse of `load`."""
        self._parts[name][self._index] = part

    def read(self, prefix: str) -> Parts:
        """Copies of all parts of the keys or values."""
        return {name[2:]: self.load(name) for name in self._parts if name.startswith(f"{prefix}.")}

    def write(self, prefix: str, blocks: Parts) -> None:
        """The inverse of `read`."""
        for name, part in blocks.items():
            self.store(f"{prefix}.{name}", part)


def _segment(tier: TierView) -> Segment:
    """The tokens of all rows, as many as the fullest has; the others' missing ones are masked."""
    counts = tier.counts.tolist()
    num_tokens = max(counts, default=0)
    mask = None
    if min(counts, default=0) < num_tokens:
        in_use = torch.arange(num_tokens, dtype=torch.int64, device="cpu") < tier.counts[:, None]
        mask = in_use[:, None, None].to(_any_part(tier).device)  # (B, 1, 1, T)

    def keys(start: int, stop: int) -> Tensor:
        return _decode(tier, 0, start, stop)

    def values(start: int, stop: int) -> Tensor:
        decoded = _decode(tier, 1, start, stop)
        # what was never written may be NaN, of which no probability of 0 makes 0
        return decoded if mask is None else decoded.masked_fill(~mask[:, :, 0, start:stop, None], 0.0)

    return Segment(num_tokens, keys, values, mask, tier.transformed)


def _decode(tier: TierView, which: int, start: int, stop: int) -> Tensor:
    """Keys (`which` 0) or values (1) of the slots [start, stop) of all rows, (B, G, stop - start, D) float32."""
    first, last = start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)
    in_order = tier.pages.shape[1] == 1 and tier.pages[:, 0].tolist() == list(range(_any_part(tier).shape[0]))
    places = (slice(None), slice(None), slice(first, last)) if in_order else _places(tier, first, last)
    prefix = "kv"[which] + "."
    blocks = {name[2:]: part[places] for name, part in tier.parts.items() if name.startswith(prefix)}
    decoded = tier.formats[which].decode(blocks).flatten(2, 3)
    return decoded[:, :, start - first * BLOCK_TOKENS : stop - first * BLOCK_TOKENS]


def _places(tier: TierView, first: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the blocks [first, stop) of all rows are: an index (B, G, stop - first) into every part."""
    blocks = torch.arange(first, stop, dtype=torch.int64, device="cpu")
    blocks_per_page = _any_part(tier).shape[2]
    pages = tier.pages.long()[:, None, blocks // max(1, blocks_per_page)]  # (B, 1, stop - first)
    heads = torch.arange(_any_part(tier).shape[1], dtype=torch.int64, device="cpu")[:, None]  # (G, 1)
    return pages, heads, blocks % max(1, blocks_per_page)


def _any_part(tier: TierView) -> Tensor:
    return next(iter(tier.parts.values()))
