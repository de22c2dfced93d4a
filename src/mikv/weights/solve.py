"""Find the binary coding of a weight matrix: every method by its name.

    method           coding                    hessian   finds it by
    rtn              uniform, offset                     rounding to clipped grids
    greedy           scale per plane                     plane after plane; as in the paper, for the record
    alternating      scale per plane                     least squares and nearest levels in turns; as in the paper
    offset           scale per plane, offset   optional  the same, its columns weighted by the hessian's diagonal
    gptq             uniform, offset           needed    rounding with error compensation: the field's baseline
    gptq-bcq         scale per plane, offset   needed    the codings of "offset" with error compensation
    refined          scale per plane, offset   needed    sweeps over that in the metric of the hessian
    refined-uniform  uniform, offset           needed    sweeps over uniform grids

The hessian is the mean of x x^T over the layer's inputs x on calibration text: the mean squared error of its output is
trace((W - Q) H (W - Q)^T). Sources are named where the methods are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mikv.arithmetic import own_arithmetic
from mikv.errors import ConfigError, NumericsError
from mikv.weights.alternating import alternating, with_offset
from mikv.weights.calibrated import gptq, gptq_bcq, refined_bcq, refined_uniform
from mikv.weights.coding import Coding
from mikv.weights.greedy import greedy
from mikv.weights.grouping import as_uniform, code_matrix
from mikv.weights.hessian import damped
from mikv.weights.uniform import clipped_uniform
from mikv.weights.weight import MOST_BITS, BCQWeight, require_group_size

METHODS = ("rtn", "greedy", "alternating", "offset", "gptq", "gptq-bcq", "refined", "refined-uniform")
_CALIBRATED: dict[str, Callable[[Tensor, int, int, Tensor], BCQWeight]] = {
    "gptq": gptq,
    "gptq-bcq": gptq_bcq,
    "refined": refined_bcq,
    "refined-uniform": refined_uniform,
}
_LEAST_IMPORTANCE = 0.01  # of the mean: columns that calibration never reached still count
_SMALLEST_STEP = 2.0**-24
_LEAST_LOSS = 0.05  # of the weights' root mean square
_LOSS_OF_TWO_BITS, _LOSS_PER_BIT = 0.34, 0.53  # the same, of normal numbers in the best 2**bits levels (Max 1960)
_NEXT_TO_NOTHING = 0.01
_DATA_FREE: dict[str, Callable[[Tensor, Tensor, int], Coding]] = {
    "rtn": clipped_uniform,
    "greedy": greedy,
    "alternating": alternating,
    "offset": with_offset,
}


def needs_hessian(method: str) -> bool:
    """Whether a method works with calibration only. Raises ConfigError for a method that does not exist."""
    return _require_method(method) in _CALIBRATED


def follows_drift(method: str) -> bool:
    """Whether a method's weights make up for what layers before have changed. The field's baseline is as published."""
    return needs_hessian(method) and method != "gptq"


@own_arithmetic
def solve(weight: Tensor, bits: int, group_size: int | None, method: str, hessian: Tensor | None = None) -> BCQWeight:
    """The coding of float32 (M, K) with `bits` planes and groups of so many columns, None being whole rows.

    `hessian` float32 (K, K), see the module. "rtn", "greedy" and "alternating" do not look at it. The same input gives
    the same result.

    Raises:
        ConfigError: an argument that cannot work, or a hessian that is needed and missing.
        NumericsError: weights or hessian are not finite, or weights too large or too small for scales of 16 bits.

    """
    if needs_hessian(method) and hessian is None:
        raise ConfigError(f'method={method!r} needs calibration; give calibration texts, or use "offset"')
    require_sound(weight, bits, hessian)
    columns = require_group_size(weight.shape[1], group_size)
    if hessian is not None and needs_hessian(method):
        return _CALIBRATED[method](weight, bits, columns, hessian)
    importance = column_importance(weight, hessian if method == "offset" else None)
    coding_of = _DATA_FREE[method]
    coded = code_matrix(weight, importance, bits, columns, lambda x, weights: coding_of(x, weights, bits))
    return as_uniform(coded) if method == "rtn" else coded


@contextmanager
def in_layer(name: str) -> Iterator[None]:
    """Let errors of solvers, which know matrices only, begin with the layer's name."""
    try:
        yield
    except (ConfigError, NumericsError) as error:
        raise type(error)(f"{name}: {error}") from error


@own_arithmetic
def output_error(weight: Tensor, coded: BCQWeight, hessian: Tensor | None = None) -> float:
    """The mean squared error of the layer's output, relative to the output's mean square: trace(E H E^T) over W's.

    Without a hessian that of the weights themselves. 0 where there is no output to be relative to: layers of zeros.
    """
    size = weight.abs().max()
    if not bool(size > 0):
        return 0.0
    # whatever their size, squares neither overflow nor vanish
    weight, difference = weight / size, (coded.dequantize() - weight) / size
    if hessian is None:
        error, total = difference.square().sum(), weight.square().sum()
    else:
        hessian = hessian / hessian.abs().max().clamp_min(torch.finfo(hessian.dtype).tiny)
        error, total = ((difference @ hessian) * difference).sum(), ((weight @ hessian) * weight).sum()
    return float(error.clamp_min(0) / total) if bool(total > 0) else 0.0


def column_importance(weight: Tensor, hessian: Tensor | None) -> Tensor:
    """What the error of each column costs, float32 (K,): the mean square of its input, or 1 if that is not known."""
    if hessian is None:
        return torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    return damped(hessian, _LEAST_IMPORTANCE).diagonal()


def _require_method(method: str) -> str:
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is unknown; use one of {', '.join(METHODS)}")
    return method


def require_sound(weight: Tensor, bits: int, hessian: Tensor | None) -> None:
    """Raise ConfigError or NumericsError unless a solver can work with these."""
    if not 1 <= bits <= MOST_BITS:
        raise ConfigError(f"bits={bits} is not one of 1 to {MOST_BITS}")
    if weight.ndim != 2 or weight.dtype != torch.float32 or weight.numel() == 0:
        raise ConfigError(f"weight is {weight.dtype} {tuple(weight.shape)}, not a float32 matrix with rows and columns")
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).any(1).sum())
        raise NumericsError(f"weights are NaN or infinite in {bad} of {weight.shape[0]} rows; is the checkpoint whole?")
    _require_resolved(weight, bits)
    if hessian is None:
        return
    if hessian.shape != (weight.shape[1],) * 2 or hessian.dtype != torch.float32:
        expected = (weight.shape[1],) * 2
        raise ConfigError(f"hessian is {hessian.dtype} {tuple(hessian.shape)}, not torch.float32 {expected}")
    if not bool(hessian.isfinite().all()):
        raise NumericsError("the layer's inputs on the calibration text are NaN or infinite; calibrate in float32")


def _require_resolved(weight: Tensor, bits: int) -> None:
    """Raise NumericsError if steps of the smallest 16-bit floats change the matrix more than `bits` bits do anyway.

    A scale or offset is off by 2**-24 / sqrt(12), the root mean square, and a weight by as many as it has. Rows that
    small are allowed where they are next to nothing of the matrix, as embeddings of unused tokens are.
    """
    size = weight.abs().max()
    if not bool(size > 0):
        return
    rows = (weight / size).square().mean(1)  # (M,)
    allowed = max(_LEAST_LOSS, _LOSS_OF_TWO_BITS * _LOSS_PER_BIT ** (bits - 2))
    least = _SMALLEST_STEP * ((bits + 1) / 12) ** 0.5 / allowed
    if bool(rows[rows.sqrt() * size < least].sum() > _NEXT_TO_NOTHING * rows.sum()):
        around = float(rows.mean().sqrt() * size)
        raise NumericsError(
            f"weights are around {around:.1g}, too small for scales of 16 bits: bits={bits} takes {least:.1g} or more; "
            "keep the layer as it is with modules_to_not_convert"
        )
