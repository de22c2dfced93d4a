"""What calibration says about a layer: damped, so that it can be inverted, and factored for error compensation.

H float32 (K, K), mean of x x^T over inputs x;  H^-1 = U^T U, U upper triangular
"""

import torch
from torch import Tensor

from mikv.errors import NumericsError

_LEAST_EXTRA, _MOST_EXTRA = 0.01, 10.0


def damped(hessian: Tensor, share: float) -> Tensor:
    """H plus a share of its mean diagonal on the diagonal: an input that was never seen then has some weight.

    An H of zeros, of a layer that calibration never reached, becomes the identity: all weights count alike.
    """
    mean = hessian.diagonal().mean()
    extra = torch.where(mean > 0, share * mean, 1.0)
    return hessian + extra * torch.eye(hessian.shape[0], dtype=torch.float32, device=hessian.device)


def inverse_factor(hessian: Tensor) -> Tensor:
    """U of a damped H. Damps it more, tenfold each time, while rounding makes it indefinite.

    Raises NumericsError for an H that has none even so: of inputs that are not finite, or at the ends of float32.
    """
    share, size = 0.0, hessian.diagonal().mean()
    while share <= _MOST_EXTRA:
        # with the columns in reverse, H = L L^T; turned back, H = R R^T with R upper triangular, and U = R^-1
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, share).flip(0, 1) if share else hessian.flip(0, 1))
        if not int(failed):
            identity = torch.eye(hessian.shape[0], dtype=torch.float32, device=hessian.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        share = max(_LEAST_EXTRA, share * 10)
    raise NumericsError(
        f"the layer's inputs on the calibration text cannot be calibrated on: their mean square is {float(size):g}"
    )
