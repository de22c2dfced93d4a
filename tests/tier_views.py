"""Tiers to give to operations, of any formats, with transforms and slots for them.

B batch, G KV heads, P pages, T tokens, D head dim.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from mikv.formats import BLOCK_TOKENS, GRIDS, QUANTIZED_BITS, Format, PartShapes, quantized_format, raw_format
from mikv.ops import TierView
from mikv.transforms import (
    KeyTransform,
    PromptStatistics,
    ValueTransform,
    fit_key_transform,
    fit_value_transform,
    hadamard_block_size,
)

BATCH, NUM_KV_HEADS = 2, 2
LAYOUTS = ("growing", "pool")
RAW = [("exact", "raw"), ("fp16", "raw")]
QUANTIZED = [(name, grid) for grid in GRIDS if grid != "channel" for name in QUANTIZED_BITS]
CHANNEL = [(name, "channel") for name in QUANTIZED_BITS]  # the format of whole blocks

Transforms = tuple[KeyTransform, ValueTransform]


def formats(name: str, grid: str, head_dim: int) -> tuple[Format, Format]:
    """Of keys and values; `raw` and `channel`, which only keys have, as in a configuration."""
    if grid == "raw":
        raw = raw_format(name, torch.float32, head_dim)
        return raw, raw
    keys = quantized_format(name, grid, head_dim // 2, head_dim, "tokens")
    value_grid = "group" if grid == "channel" else grid
    return keys, quantized_format(name, value_grid, head_dim // 2, head_dim, "channels")


def tiers(
    layout: str, high: tuple[Format, Format], low: tuple[Format, Format], capacity: int = 192
) -> tuple[TierView, TierView]:
    """Empty tiers of at least `capacity` slots per row each: `growing`, or small pages in a `pool` that both share."""
    num_blocks = capacity // BLOCK_TOKENS
    if layout == "growing":
        return empty_tier(high, num_blocks), empty_tier(low, num_blocks, is_high=False)
    # quota pages of 96 tokens: 32 high, 64 low; the rows' pages lie among each other and others'
    generator = torch.Generator().manual_seed(0)
    pages = torch.randperm(3 * BATCH * num_blocks, generator=generator)[: BATCH * num_blocks]
    pages = pages.view(BATCH, num_blocks).int()
    pool = _pool(3 * BATCH * num_blocks, (_shapes(high, True), _shapes(low, False)), (1, 2))
    return _view(high, pool[0], pages, True), _view(low, pool[1], pages, False)


def empty_tier(
    forms: tuple[Format, Format], num_blocks: int, *, is_high: bool = True, pages_per_row: int = 1
) -> TierView:
    """A tier alone, each part a tensor of its own; the last row has the first pages."""
    pages = torch.arange(BATCH * pages_per_row, dtype=torch.int32).flip(0).view(BATCH, pages_per_row)
    parts = {
        name: _meaningless(BATCH * pages_per_row, NUM_KV_HEADS * num_blocks * prod(shape) * dtype.itemsize)
        .view(dtype)
        .unflatten(1, (NUM_KV_HEADS, num_blocks, *shape))
        for name, (shape, dtype) in _shapes(forms, is_high).items()
    }
    return _view(forms, parts, pages, is_high)


def with_counts(tier: TierView, *counts: int) -> TierView:
    """The same storage with other counts."""
    return replace(tier, counts=torch.tensor(counts, dtype=torch.int64))


def fitted(queries: Tensor, keys: Tensor, values: Tensor) -> Transforms:
    """All transforms on, fitted to these tokens (B, H or G, T, D)."""
    largest = queries.abs().amax(2).unflatten(1, (NUM_KV_HEADS, -1)).amax(2)
    counted = torch.ones(BATCH, keys.shape[2], dtype=torch.bool)
    stats = PromptStatistics.measure((keys, values), largest, counted, True)
    size = hadamard_block_size(keys.shape[3])
    return fit_key_transform(stats, True, True, (0.5, 0.5), size), fit_value_transform(stats, True, size)


def of_row(transforms: Transforms, row: int) -> Transforms:
    """Vectors (G, 1, D)."""
    return transforms[0].of_row(row), transforms[1].of_row(row)


def slots_of(first: int, stop: int) -> Tensor:
    """The same slots (G, T) in each head."""
    return torch.arange(first, stop).expand(NUM_KV_HEADS, -1)


def random_slots(count: int, chosen: int, seed: int = 0) -> Tensor:
    """Ascending slots (G, T), others in each head."""
    generator = torch.Generator().manual_seed(seed)
    slots = [torch.randperm(count, generator=generator)[:chosen].sort().values for _ in range(NUM_KV_HEADS)]
    return torch.stack(slots)


def _view(forms: tuple[Format, Format], parts: dict[str, Tensor], pages: Tensor, is_high: bool) -> TierView:
    counts = torch.zeros(BATCH, dtype=torch.int64)
    return TierView(forms, parts, pages, counts, not is_high or forms[0].grid != "raw")


def _shapes(pair: tuple[Format, Format], is_high: bool) -> PartShapes:
    shapes: PartShapes = {}
    for prefix, form in zip("kv", pair, strict=True):
        shapes |= {f"{prefix}.{name}": part for name, part in form.part_shapes().items()}
    if is_high:
        shapes |= {"score": ((BLOCK_TOKENS,), torch.float32), "position": ((BLOCK_TOKENS,), torch.int32)}
    return shapes


def _pool(num_pages: int, tiers: tuple[PartShapes, ...], blocks: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Parts (P, G, blocks, ...) of all tiers as strided views of one pool of bytes, a page after the other."""
    sizes = [
        NUM_KV_HEADS * num_blocks * prod(shape) * dtype.itemsize
        for shapes, num_blocks in zip(tiers, blocks, strict=True)
        for shape, dtype in shapes.values()
    ]
    columns = iter(_meaningless(num_pages, sum(sizes)).split(sizes, dim=1))
    return [
        {
            name: next(columns).view(dtype).unflatten(1, (NUM_KV_HEADS, num_blocks, *shape))
            for name, (shape, dtype) in shapes.items()
        }
        for shapes, num_blocks in zip(tiers, blocks, strict=True)
    ]


def _meaningless(num_pages: int, num_bytes: int) -> Tensor:
    """Bytes that tell on who reads them: as floats they are NaN."""
    return torch.full((num_pages, num_bytes), 0xFF, dtype=torch.uint8)
