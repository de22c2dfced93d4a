"""Exact changes of basis that make keys and values easy to quantize. All tensors float, leading axes free.

    keys      k' = H((k - mu) * b)      q' = H(q / b)      q.k = q'.k' + q.mu
    values    v' = H(v - mean)          sum_t p_t v_t = H(sum_t p_t v'_t) + (sum_t p_t) mean

mu, mean: channel means of the prompt; b: the channel balancer (MiKV Eq. 2); H: an orthonormal block Hadamard matrix,
its own inverse. Everything folds into the query once per step and into the output once per step, so attention only
ever sees codes, scales and a transformed query. The statistics are stored in float16; any rounding of them is exact,
because the same rounded numbers are used on both sides.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

_BALANCER_MIN, _BALANCER_MAX = 1e-4, 1e4
_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Transform:
    """What both transforms store. `center` is (B, G, 1, D) or None; `hadamard_size` 1 means no rotation."""

    center: Tensor | None
    hadamard_size: int

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        stored = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in stored.items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The transform with `change` applied to every stored tensor."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def of_row(self, row: int) -> Self:
        """The transform of one row, for keys or values (G, T, D)."""
        return self.map(lambda tensor: tensor[row])


@dataclass(frozen=True)
class KeyTransform(Transform):
    """k (B, G, T, D) <-> k'. `balancer` is (B, G, 1, D) or None."""

    balancer: Tensor | None

    def encode(self, keys: Tensor) -> Tensor:
        """Keys in the basis in which they are quantized, float32."""
        x = keys.float()
        if self.center is not None:
            x = x - self.center.float()
        if self.balancer is not None:
            x = x * self.balancer.float()
        return hadamard(x, self.hadamard_size)

    def query(self, queries: Tensor) -> Tensor:
        """The query whose product with k' is q.(k - mu), float32."""
        x = queries.float()
        if self.balancer is not None:
            x = x / self.balancer.float()
        return hadamard(x, self.hadamard_size)

    def logit_offset(self, queries: Tensor) -> Tensor | None:
        """q.mu (..., 1), to be added to every product with k'; None without centring."""
        return None if self.center is None else (queries.float() * self.center.float()).sum(-1, keepdim=True)


@dataclass(frozen=True)
class ValueTransform(Transform):
    """v (B, G, T, D) <-> v'."""

    def encode(self, values: Tensor) -> Tensor:
        """Values in the basis in which they are quantized, float32."""
        x = values.float()
        if self.center is not None:
            x = x - self.center.float()
        return hadamard(x, self.hadamard_size)

    def output(self, weighted_sum: Tensor, mass: Tensor) -> Tensor:
        """Undo the transform on sum_t p_t v'_t (..., D), where `mass` (..., 1) is sum_t p_t."""
        x = hadamard(weighted_sum, self.hadamard_size)
        return x if self.center is None else x + mass * self.center.float()


@dataclass(frozen=True)
class PromptStatistics:
    """Per-channel numbers of the prompt that the transforms are made of, each (B, G, 1, D) float32.

    `key_max` is the largest absolute centred key if keys are centred, else of the key itself.
    """

    key_mean: Tensor
    value_mean: Tensor
    key_max: Tensor
    query_max: Tensor

    @classmethod
    def measure(cls, keys: Tensor, values: Tensor, query_max: Tensor, counted: Tensor, center_keys: bool) -> Self:
        """Over the tokens marked in `counted` (B, T) bool of keys and values (B, G, T, D); `query_max` (B, G, D)."""
        weight = counted[:, None, :, None].float()  # (B, 1, T, 1)
        count = weight.sum(2, keepdim=True).clamp_min(1)
        key_mean = (keys.float() * weight).sum(2, keepdim=True) / count
        value_mean = (values.float() * weight).sum(2, keepdim=True) / count
        centered = keys.float() - _storable(key_mean).float() if center_keys else keys.float()
        key_max = (centered.abs() * weight).amax(2, keepdim=True)
        return cls(key_mean, value_mean, key_max, query_max[:, :, None, :])


def channel_balancer(query_max: Tensor, key_max: Tensor, exponents: tuple[float, float]) -> Tensor:
    """b = max|q|^e0 / max|k|^e1 per channel (MiKV Eq. 2 with e0 = e1 = 1/2), float16; 1 where a maximum is 0."""
    balancer = query_max.pow(exponents[0]) / key_max.pow(exponents[1])
    usable = (query_max > 0) & (key_max > 0)
    return torch.where(usable, balancer, 1.0).clamp(_BALANCER_MIN, _BALANCER_MAX).half()


def fit_key_transform(
    stats: PromptStatistics, center: bool, balance: bool, exponents: tuple[float, float], hadamard_size: int
) -> KeyTransform:
    """The key transform of a prompt."""
    balancer = channel_balancer(stats.query_max, stats.key_max, exponents) if balance else None
    return KeyTransform(_storable(stats.key_mean) if center else None, hadamard_size, balancer)


def fit_value_transform(stats: PromptStatistics, center: bool, hadamard_size: int) -> ValueTransform:
    """The value transform of a prompt."""
    return ValueTransform(_storable(stats.value_mean) if center else None, hadamard_size)


def hadamard_block_size(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`: heads of 80 are rotated in 5 blocks of 16."""
    return head_dim & -head_dim


def hadamard(x: Tensor, block_size: int) -> Tensor:
    """Multiply each block of `block_size` channels of x (..., D) by the orthonormal Sylvester-Hadamard matrix."""
    if block_size == 1:
        return x
    blocks = x.unflatten(-1, (-1, block_size))
    return (blocks @ _hadamard_matrix(block_size, x.dtype, x.device)).flatten(-2)


@lru_cache(maxsize=32)
def _hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return (matrix / size**0.5).to(device, dtype)


def _storable(mean: Tensor) -> Tensor:
    return mean.clamp(-_HALF_MAX, _HALF_MAX).half()
