"""Exact changes of basis that make keys and values easy to quantize. All tensors float, leading axes free.

    keys      k' = H((k - mu) * b)      q' = H(q / b)      q.k = q'.k' + q.mu
    values    v' = H(v - mean)          sum_t p_t v_t = H(sum_t p_t v'_t) + (sum_t p_t) mean

mu, mean: channel means of the prompt; b: the channel balancer (MiKV Eq. 2); H: an orthonormal block Hadamard matrix,
its own inverse. Everything folds into the query once per step and into the output once per step, so attention only
ever sees codes, scales and a transformed query. The statistics are stored in float16; any rounding of them is exact,
because the same rounded numbers are used on both sides.

Keys are rounded with feedback: the channels of k' one after the other, each making up for the errors of those before
it in the metric that counts, sum over the prompt's queries of (q'.error)^2. That is what GPTQ and LDLQ
(arXiv 2210.17323, 2307.13304) do for weights. It costs no bits and nothing when the cache is read.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import isqrt
from typing import Any, Self

import torch
from torch import Tensor

from mikv.arithmetic import constant, own_arithmetic

_BALANCER_MIN, _BALANCER_MAX = 1e-4, 1e4
_HALF_MAX = 65504.0
_FEEDBACK_DTYPE = torch.float8_e4m3fn
_FEEDBACK_MAX = torch.finfo(_FEEDBACK_DTYPE).max
_KEY_MAX_FLOOR = 0.5
# Share of the mean of the metric's diagonal that is added to it: queries to come differ from those of the prompt.
_FEEDBACK_DAMPING = 0.1


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
    """k (B, G, T, D) <-> k'. `balancer` is (B, G, 1, D) or None.

    `feedback` is (B, G, D(D-1)/2) or None: above the diagonal of the matrix that rounding with feedback needs, each
    number one byte, a float8_e4m3 (a dtype for which PyTorch lacks most operations).
    """

    balancer: Tensor | None
    feedback: Tensor | None = None

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

    def dense_feedback(self) -> Tensor | None:
        """Feedback (..., D, D) float32, strictly upper triangular: what an error in channel i adds to channel j."""
        if self.feedback is None:
            return None
        head_dim = (1 + isqrt(1 + 8 * self.feedback.shape[-1])) // 2
        rows, columns = torch.triu_indices(head_dim, head_dim, 1, dtype=torch.int64, device=self.feedback.device)
        dense = torch.zeros(
            *self.feedback.shape[:-1], head_dim, head_dim, dtype=torch.float32, device=self.feedback.device
        )
        dense[..., rows, columns] = self.feedback.view(_FEEDBACK_DTYPE).float()
        return dense

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
    def measure(
        cls,
        keys_values: tuple[Tensor, Tensor],
        query_max: Tensor,
        counted: Tensor,
        center_keys: bool,
        attention: Tensor | None = None,
    ) -> Self:
        """Over the tokens marked in `counted` (B, T) bool of keys and values (B, G, T, D); `query_max` (B, G, D).

        Values are averaged by the `attention` (B, G, T) that they received: what is read most is rounded best, above
        all tokens that are alike, whose errors add up.
        """
        keys, values = keys_values
        weight = counted[:, None, :, None].float()  # (B, 1, T, 1)
        count = weight.sum(2, keepdim=True).clamp_min(1)
        key_mean = (keys.float() * weight).sum(2, keepdim=True) / count
        value_mean = (values.float() * weight).sum(2, keepdim=True) / count
        if attention is not None:
            share = attention[..., None] * weight  # (B, G, T, 1)
            total = share.sum(2, keepdim=True)
            mean = (values.float() * share).sum(2, keepdim=True) / total.clamp_min(torch.finfo(torch.float32).tiny)
            value_mean = torch.where(total > 0, mean, value_mean)
        centered = keys.float() - _storable(key_mean).float() if center_keys else keys.float()
        key_max = (centered.abs() * weight).amax(2, keepdim=True)
        return cls(key_mean, value_mean, key_max, query_max[:, :, None, :])

    def shared_by(self, good: Tensor, share: Tensor) -> Self:
        """These of the rows `good` (B,) bool; the others have what those have in common, each by its `share` (B,)."""
        own, share = good[:, None, None, None], share[:, None, None, None].float()

        def common(name: str) -> Tensor:
            x = getattr(self, name)
            pooled = (x * share).sum(0) if name.endswith("mean") else (x * own).amax(0)
            return torch.where(own, x, pooled)

        names = [field.name for field in fields(self)]
        return type(self)(**{name: common(name) for name in names})

    @property
    def floored_key_max(self) -> Tensor:
        """`key_max`, at least half of its mean over the channels.

        Where keys hardly differ, channels that do not change would be stretched until all bits went to noise.
        """
        return self.key_max.clamp_min(_KEY_MAX_FLOOR * self.key_max.mean(-1, keepdim=True))


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


def with_feedback(transform: KeyTransform, query_moment: Tensor) -> KeyTransform:
    """The transform with the feedback for queries of the second moment sum q q^T (B, G, D, D) float32.

    A head whose moment is zero, NaN or Inf gets none: its keys are rounded to the nearest level.
    """
    moment = transform.query(transform.query(query_moment).mT)  # of q'
    moment = torch.where(moment.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), moment, 0.0)
    diagonal = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(torch.finfo(torch.float32).tiny)
    damped = moment / diagonal + _FEEDBACK_DAMPING * torch.eye(
        moment.shape[-1], dtype=torch.float32, device=moment.device
    )
    # M = (I + U) E (I + U)^T with U strictly upper triangular: a Cholesky decomposition from the last channel on
    lower = torch.linalg.cholesky(damped.double().flip(-2, -1))
    upper = (lower / lower.diagonal(dim1=-2, dim2=-1)[..., None, :]).flip(-2, -1)
    rows, columns = torch.triu_indices(moment.shape[-1], moment.shape[-1], 1, dtype=torch.int64, device=moment.device)
    stored = upper[..., rows, columns].clamp(-_FEEDBACK_MAX, _FEEDBACK_MAX).to(_FEEDBACK_DTYPE).view(torch.uint8)
    return replace(transform, feedback=stored)


def fit_value_transform(stats: PromptStatistics, center: bool, hadamard_size: int) -> ValueTransform:
    """The value transform of a prompt."""
    return ValueTransform(_storable(stats.value_mean) if center else None, hadamard_size)


def hadamard_block_size(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`: heads of 80 are rotated in 5 blocks of 16."""
    return head_dim & -head_dim


@own_arithmetic
def hadamard(x: Tensor, block_size: int) -> Tensor:
    """Multiply each block of `block_size` channels of x (..., D) by the orthonormal Sylvester-Hadamard matrix."""
    if block_size == 1:
        return x
    blocks = x.unflatten(-1, (-1, block_size))
    return (blocks @ _hadamard_matrix(block_size, x.dtype, x.device)).flatten(-2)


@constant
def _hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return (matrix / size**0.5).to(device, dtype)


def _storable(mean: Tensor) -> Tensor:
    return mean.clamp(-_HALF_MAX, _HALF_MAX).half()
