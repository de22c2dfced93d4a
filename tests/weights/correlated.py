"""A layer for tests of solvers: weights (M, K), and inputs that are correlated, as hidden states are."""

import torch
from torch import Tensor


def layer(rows: int = 48, columns: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the mean of x x^T over inputs that are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    inputs *= torch.rand(columns, generator=generator) * 2 + 0.1
    return torch.randn(rows, columns, generator=generator) * 0.02, inputs.T @ inputs / len(inputs)
