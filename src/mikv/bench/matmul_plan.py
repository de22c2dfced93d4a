"""What `mikv bench matmul` multiplies: synthetic weights (M outputs, K inputs) and activations, and for how long."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mikv.errors import ConfigError
from mikv.weights.weight import require_group_size

_MOST_BYTES = 512 << 20  # of a matrix in float32; every kernel holds several in its own format
_MOST_ROWS = 4096
DIFFERENT_ROWS = 128  # of the weights, which then repeat: good codings are not found at the speed of a kernel
_ROW_SPREAD, _CHANNEL_SPREAD = 0.3, 0.5  # of the logarithm of a weight row's and an input channel's size
_CHANNELS_PER_OUTLIER, _OUTLIER = 512, 20.0


@dataclass(frozen=True)
class MatmulPlan:
    """Weights of m outputs and k inputs in each of `bits`, times each number of `rows` of activations.

    seconds   of measuring per kernel and number of rows; at least 5 rounds, however long they take
    """

    m: int = 4096
    k: int = 4096
    rows: tuple[int, ...] = (1, 4, 8, 128)
    bits: tuple[int, ...] = (2, 3, 4)
    group_size: int = 128
    seconds: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("--m", self.m), ("--k", self.k)):
            if value < 1:
                raise ConfigError(f"{name} {value} must be 1 or more")
        if self.float32_bytes > _MOST_BYTES:
            raise ConfigError(
                f"--m {self.m} times --k {self.k} takes {self.float32_bytes / 2**30:.1f} GiB in float32; this command "
                f"compares many copies of such a matrix, so use --m {max(1, _MOST_BYTES // 4 // self.k)}"
            )
        require_group_size(self.k, self.group_size, "--group-size")
        for rows in self.rows:
            if not 1 <= rows <= _MOST_ROWS:
                raise ConfigError(f"--rows {rows} must be between 1 and {_MOST_ROWS}")
        for bits in self.bits:
            if not 1 <= bits <= 4:
                raise ConfigError(f"--bits {bits} must be 1, 2, 3 or 4: those are the weights that are compared")
        if not self.seconds > 0:
            raise ConfigError(f"--seconds {self.seconds:g} must be more than 0")

    @property
    def float32_bytes(self) -> int:
        """Bytes of the matrix in float32."""
        return 4 * self.m * self.k


def make_weights(plan: MatmulPlan) -> Tensor:
    """Normal numbers whose size differs from row to row, float32 (M, K); always the same for the same plan."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.exp(_ROW_SPREAD * torch.randn(DIFFERENT_ROWS, 1, generator=random))
    return repeat_rows(sizes * torch.randn(DIFFERENT_ROWS, plan.k, generator=random), plan.m, 0)


def repeat_rows(x: Tensor, num_rows: int, dim: int) -> Tensor:
    """The first entries along `dim` again and again, until there are `num_rows`."""
    return x.index_select(dim, torch.arange(num_rows) % x.shape[dim])


def make_activations(plan: MatmulPlan, rows: int) -> Tensor:
    """Normal numbers whose size differs from channel to channel, a few being 20 times as large; float32 (rows, K)."""
    random = torch.Generator().manual_seed(1)
    sizes = torch.exp(_CHANNEL_SPREAD * torch.randn(plan.k, generator=random))
    outliers = torch.randperm(plan.k, generator=random)[: -(-plan.k // _CHANNELS_PER_OUTLIER)]
    sizes[outliers] *= _OUTLIER
    return sizes * torch.randn(rows, plan.k, generator=random)


def parse_counts(option: str, text: str) -> tuple[int, ...]:
    """`1,4,8` as numbers, each once. Raises ConfigError."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(f"{option} {text!r} must be whole numbers with commas, such as 1,4,8") from None
