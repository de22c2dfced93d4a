"""TurboQuant (arXiv 2504.19874): a random rotation makes every direction alike, then each channel is rounded alone.

    x  ->  |x| in fp16, codes of R x / |x|       R one fixed random rotation; levels that are best for a channel of a
    x  ~   |x| R^T levels[codes]                 random unit vector (Lloyd-Max); nothing is centred or calibrated

Its variant of least squared error. At 2.5 bits the channels are split into two halves, each a vector of its own with
its own rotation and norm: those with the larger energy in the prompt at 3 bits, the others at 2. (The paper's own
example, 32 of 128 channels at 3 bits, makes 2.25; it does not say how channels are chosen.) Every token is rounded,
also the newest. The rotations are the same for all caches and are not counted.

B batch, G KV heads, T tokens, D head dim.
"""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mikv.cache.geometry import FP16_BYTES
from mikv.errors import NumericsError
from mikv.lab.baselines.simulated import SimulatedCache, SimulatedLayer, code_bytes

_SEED = 2504
_GRID_POINTS, _ROUNDS = 8001, 4000


def turboquant(model: PreTrainedModel, bits: float) -> SimulatedCache:
    """An empty cache with keys and values at `bits` (4, 3, 2.5) per number."""
    return SimulatedCache(model.config, partial(TurboQuantLayer, bits))


class TurboQuantLayer(SimulatedLayer):
    """One layer. `halves` are, for keys and values, the channels (B, G, D) in the order 3-bit half, 2-bit half."""

    def __init__(self, bits: float) -> None:
        super().__init__()
        self.bits = bits
        self.halves: tuple[Tensor, Tensor] | None = None

    @property
    def bits_of_parts(self) -> tuple[int, ...]:
        """Bits of each vector that a token's head is split into."""
        return (3, 2) if self.bits == 2.5 else (int(self.bits),)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Attend exactly to the new tokens, and store them rounded."""
        seen = self.with_new(key_states, value_states)
        if self.halves is None and len(self.bits_of_parts) == 2:
            self.halves = by_energy(key_states), by_energy(value_states)
        keys, values = self._rounded(key_states, 0), self._rounded(value_states, 1)
        self.keys, self.values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        return seen

    def _rounded(self, x: Tensor, which: int) -> Tensor:
        if self.halves is None:
            return rounded(x.float(), self.bits_of_parts[0])
        order = self.halves[which][:, :, None].expand_as(x)  # (B, G, T, D)
        parts = x.float().gather(-1, order).chunk(2, dim=-1)
        back = [rounded(part, bits) for part, bits in zip(parts, self.bits_of_parts, strict=True)]
        return torch.empty_like(x, dtype=torch.float32).scatter_(-1, order, torch.cat(back, dim=-1))

    def stored_bytes(self) -> int:
        """Codes and norms, and one bit per channel that says which half it is in."""
        if not self.is_initialized:
            return 0
        batch, heads, num_tokens, head_dim = self.keys.shape
        parts = self.bits_of_parts
        per_token = sum(code_bytes(head_dim // len(parts), bits) + FP16_BYTES for bits in parts)
        halves = 0 if self.halves is None else code_bytes(head_dim, 1)
        return 2 * batch * heads * (num_tokens * per_token + halves)


def by_energy(x: Tensor) -> Tensor:
    """Channels (B, G, D) of x (B, G, T, D), those with the largest sum of squares first."""
    return x.float().square().sum(2).argsort(-1, descending=True)


def rounded(x: Tensor, bits: int) -> Tensor:
    """x (..., D) float32 after a round trip. Raises NumericsError for norms beyond 16-bit floats, NaN and Inf."""
    norm = x.norm(dim=-1, keepdim=True)
    stored_norm = norm.half().float()
    if not torch.isfinite(stored_norm).all():
        largest = float(norm.max())
        raise NumericsError(f"a norm of {largest:.3g} among the keys or values is beyond 16-bit floats (65504)")
    rotation = random_rotation(x.shape[-1]).to(x.device)
    levels = torch.tensor(best_levels(bits, x.shape[-1]), device=x.device)
    boundaries = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(x / norm.clamp_min(torch.finfo(torch.float32).tiny) @ rotation.T, boundaries)
    return stored_norm * (levels[codes] @ rotation)


@lru_cache(maxsize=8)
def random_rotation(size: int) -> Tensor:
    """A rotation (D, D), uniformly random and always the same: the orthogonal factor of a Gaussian matrix."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    factor, triangle = torch.linalg.qr(gaussian)
    return (factor * triangle.diagonal().sign()).float()


@lru_cache(maxsize=16)
def best_levels(bits: int, size: int) -> tuple[float, ...]:
    """The 2**bits levels of least mean squared error for one channel of a random unit vector of `size` (Eq. 4).

    Lloyd's algorithm on the density (1 - x^2)^((size - 3) / 2), over 8 standard deviations: levels become the means of
    their cells, from the integrals of the density and of x times the density.
    """
    reach = min(1.0, 8 / size**0.5)
    x = torch.linspace(-reach, reach, _GRID_POINTS, dtype=torch.float64)
    density = (1 - x.square()).pow((size - 3) / 2)
    integrals = torch.stack((density, x * density))
    integrals = torch.nn.functional.pad(torch.cumulative_trapezoid(integrals), (1, 0))  # (2, points) up to each x
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64) / size**0.5
    for _ in range(_ROUNDS):
        edges = torch.cat((x[:1], (levels[1:] + levels[:-1]) / 2, x[-1:]))
        place = (edges + reach) / (2 * reach) * (_GRID_POINTS - 1)
        left = place.long().clamp_max(_GRID_POINTS - 2)
        mass, moment = torch.lerp(integrals[:, left], integrals[:, left + 1], place - left).diff()
        levels = moment / mass
    return tuple(levels.tolist())
