"""Numbers that the tests share: error budgets, the one comparison with an oracle, makers of random inputs.

B batch, H query heads, G KV heads, Tq queries, T tokens, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The largest error that a test accepts, as a share of the largest number expected, and why."""

    relative: float
    reason: str


BUDGETS = {
    "bitwise": Budget(0.0, "the same operations on the same numbers"),
    "float32": Budget(2e-6, "float32 sums of up to a thousand products, taken in another order"),
    "attention": Budget(2e-5, "float32 logits of up to 30, whose rounding softmax multiplies by their size"),
    "chained": Budget(2e-4, "attention whose inputs were quantized from numbers that differ by float32 rounding"),
    "change of basis": Budget(2e-6, "two float32 rotations of up to 256 channels, relative to |q| |k|"),
    "half": Budget(5e-4, "one rounding to float16: half a unit in the last of 11 bits"),
    "native low": Budget(1.2e-2, "8-bit queries and weights, .6 and .5 % of values that cancel"),
    "native high": Budget(1e-3, "queries and weights rounded to 15 bits"),
    "native exact": Budget(1e-5, "float32 sums taken in another order, and an exp of our own"),
    "native bfloat16": Budget(1.2e-2 + 2**-9, "as native low, and one rounding to 8 bits of mantissa"),
    "product by tables": Budget(1e-2, "sums of 4 inputs in 127 steps up to their largest, .7 % of normal ones"),
    "product by bytes": Budget(1.1e-2, "inputs in 127 steps, .6 %, and scales in 255, .3 % of 4 bits, .5 % of 8"),
    "product by 7 bits": Budget(1.7e-2, "inputs in 127 steps, .6 %, and scales in 127, .7 % of 4 bits, 1.2 % of 8"),
    "product with an outlier": Budget(3.5e-2, "the inputs beside it are rounded in steps of 1 / 127 of it"),
    "table": Budget(5e-5, "constants printed with 4 digits after the point"),
}


def _steps(spread: float, bits: int) -> float:
    """Root mean square error of rounding to 2**bits levels over `spread`: step / sqrt(12)."""
    return spread / (2**bits - 1) / 12**0.5


# Root mean square error of a round trip of N(0, 1) numbers.
# lloyd-max  the distortion of the integer levels, .2 %, 1.0 % and 1.8 % above that of the optimal ones (Max 1960, table
#            I: .1175, .03454, .009497), which is what kernels pay for exact levels in bytes
# uniform  the distortion in Max 1960, table II. On both grids a token that fits its own scale does no worse
# int8 with one scale  255 steps over twice the largest of 256 numbers, which is 3.07 (root mean square) in magnitude
# group, channel  steps over the range of 128 and of 32 numbers, 5.23 and 4.21 (root mean square)
ROUND_TRIP_BUDGETS = {
    **{("lloyd-max", bits): mse**0.5 for bits, mse in {2: 0.11772, 3: 0.03490, 4: 0.00967}.items()},
    **{("uniform", bits): mse**0.5 for bits, mse in {2: 0.1188, 3: 0.03744, 4: 0.01154}.items()},
    **{(grid, 8): _steps(2 * 3.07, 8) for grid in ("lloyd-max", "uniform")},
    **{("group", bits): _steps(5.23, bits) for bits in (2, 3, 4, 8)},
    **{("channel", bits): _steps(4.21, bits) for bits in (2, 3, 4, 8)},
}


def assert_close(actual: Tensor, expected: Tensor, budget: str, *, op: str, form: str = "float32") -> None:
    """Fail unless max |actual - expected| is within BUDGETS[budget] of max |expected|; say what was compared."""
    assert actual.shape == expected.shape, f"{op}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs()
    worst = float(difference.max()) if difference.numel() else 0.0
    largest = float(expected.double().abs().max()) if expected.numel() else 0.0
    relative = worst / largest if largest else worst
    allowed = BUDGETS[budget]
    assert relative <= allowed.relative, (
        f"{op} {tuple(actual.shape)} {form}: max error {worst:.3g}, relative {relative:.3g}; "
        f"budget {budget!r} is {allowed.relative:.3g} ({allowed.reason})"
    )


def assert_within(actual: Tensor, expected: Tensor, budget: str, *, op: str, form: str) -> None:
    """Fail unless the norm of the difference is within BUDGETS[budget] of the expected norm; say what was compared."""
    assert actual.shape == expected.shape, f"{op}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{op} {form}: NaN or Inf"
    difference, norm = float((actual.double() - expected.double()).norm()), float(expected.double().norm())
    relative = difference / norm if norm else difference
    allowed = BUDGETS[budget]
    assert relative <= allowed.relative, (
        f"{op} {tuple(actual.shape)} {form}: relative error {relative:.3g}; "
        f"budget {budget!r} is {allowed.relative:.3g} ({allowed.reason})"
    )


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Independent N(0, 1)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_biased_channel(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Keys of a Qwen2.5-like model: N(0, 1), and one channel of every token near 60."""
    x = gaussian(shape, seed)
    x[..., shape[-1] // 3] += 60.0
    return x


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """N(0, 1) over a chi: Student's t with 3 degrees of freedom, a few numbers tens of times the typical one."""
    degrees = 3
    chi_squared = gaussian((degrees, *shape), seed + 1).square().sum(0)
    return gaussian(shape, seed) / (chi_squared / degrees).sqrt()


MAKERS = {"gaussian": gaussian, "one biased channel": one_biased_channel, "heavy-tailed": heavy_tailed}
