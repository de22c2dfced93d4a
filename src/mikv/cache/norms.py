"""How much the rounding of tokens matters: the norms of their keys and values in the basis in which they are quantized.

G KV heads, n tokens, D head dim. A tile at a time; nothing is kept.
"""

import torch
from torch import Tensor

from mikv.cache.tiers import Tier, take
from mikv.formats import BLOCK_TOKENS
from mikv.ops import unpack
from mikv.transforms import KeyTransform, ValueTransform

Transforms = tuple[KeyTransform, ValueTransform]

_TILE_TOKENS = 8 * BLOCK_TOKENS  # their temporaries stay in the processor's second-level cache


def norms_of_tokens(keys: Tensor, values: Tensor, tokens: Tensor, transforms: Transforms) -> Tensor:
    """|k'||v'| of the tokens (G, n) of a row's keys and values (G, T, D): (G, n) float32."""
    tiles = tokens.split(_TILE_TOKENS, dim=1)
    return torch.cat([_norms(take(keys, tile), take(values, tile), transforms) for tile in tiles], dim=1)


def norms_of_slots(tier: Tier, row: int, transforms: Transforms) -> Tensor:
    """|k'||v'| of what a row has in a tier, as it is stored: (G, n) float32."""
    num_heads, count = tier.scores.shape[1], tier.counts[row]
    slots = torch.arange(count, dtype=torch.int64, device=tier.scores.device).expand(num_heads, -1)
    to_basis = None if tier.transformed else transforms
    tiles = slots.split(_TILE_TOKENS, dim=1)
    return torch.cat([_norms(*unpack(tier.view, row, tile), to_basis) for tile in tiles], dim=1)


def _norms(keys: Tensor, values: Tensor, transforms: Transforms | None) -> Tensor:
    if transforms is not None:
        keys, values = transforms[0].encode(keys), transforms[1].encode(values)
    return keys.norm(dim=-1) * values.norm(dim=-1)
