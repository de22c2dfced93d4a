"""Sweeps over a coding in the metric of the hessian: scales and offsets by least squares, then signs, group by group.

    E = W' - W,   loss = trace(E H E^T),   G = E H

For one group of columns, all else fixed, with B its signs and a row of ones, (q + 1, g) per output row:
    scales and offset change by the solution of  (B H_gg B^T) c = -B G_g
    then column by column, the code becomes that of the level nearest to  w'_k - G_k / H_kk
Neither can raise the loss, but for the rounding of scales to 16 bits. In a uniform coding one row of B stands for all
planes: their signs, each with half of the weight of the one before. Matrices are transposed, (K, M), as in gptq.py.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mikv.weights.alternating import solve_ridge
from mikv.weights.coding import Coding, halving, rounded
from mikv.weights.gptq import BLOCK, spans


def refined(weight: Tensor, hessian: Tensor, codings: list[Coding], sweeps: int, uniform: bool) -> list[Coding]:
    """The codings of the groups of columns of float32 (M, K) after so many sweeps; `uniform` ones stay so."""
    state = _State(weight, hessian, codings)
    for _ in range(sweeps):
        for group in range(len(codings)):
            state.refit(group, uniform)
            state.choose_signs(group)
    return state.codings


class _State:
    """Codings, the matrix they stand for, and the gradient."""

    def __init__(self, weight: Tensor, hessian: Tensor, codings: list[Coding]) -> None:
        self.hessian, self.codings = hessian, list(codings)
        self.values = torch.cat([coding.values() for coding in codings], 1).T.contiguous()  # (K, M)
        self.gradient = hessian @ (self.values - weight.T)  # (K, M)
        self.spans = list(spans(0, weight.shape[1], codings[0].codes.shape[1]))

    def refit(self, group: int, uniform: bool) -> None:
        """Fit the scales and the offset of a group, which has one."""
        (start, stop), coding = self.spans[group], self.codings[group]
        assert coding.offset is not None
        shares = halving(coding.bits, coding.codes.device)
        basis = [coding.signs(plane).T.contiguous() for plane in range(coding.bits)]  # (g, M) each
        if uniform:
            basis = [sum((share * row for share, row in zip(shares, basis, strict=True)), torch.zeros_like(basis[0]))]
        basis.append(torch.ones_like(basis[0]))
        change = self._least_squares(start, stop, basis)  # (M, 2 or q + 1)
        scales = rounded(coding.scales[: len(basis) - 1] + change[:, :-1].T)
        scales = scales * shares[:, None] if uniform else scales
        self.codings[group] = coding.with_scales(scales, rounded(coding.offset + change[:, -1]))
        self._replace(start, stop, self.codings[group].values().T)

    def _least_squares(self, start: int, stop: int, basis: list[Tensor]) -> Tensor:
        metric, gradient = self.hessian[start:stop, start:stop], self.gradient[start:stop]
        weighted = [metric @ row for row in basis]
        matrix = torch.stack([torch.stack([(a * b).sum(0) for b in basis], -1) for a in weighted], -2)  # (M, n, n)
        return solve_ridge(matrix, torch.stack([-(row * gradient).sum(0) for row in basis], -1))

    def choose_signs(self, group: int) -> None:
        """Choose the codes of a group anew, column by column."""
        (start, stop), coding = self.spans[group], self.codings[group]
        levels, codes = coding.levels(), coding.codes.clone()
        for first, last in spans(start, stop, BLOCK):
            metric = self.hessian[first:last, first:last]
            values, gradient = self.values[first:last].clone(), self.gradient[first:last].clone()
            for k in range(last - first):
                code, value = levels.nearest((values[k] - gradient[k] / metric[k, k])[:, None])
                codes[:, first - start + k] = code[:, 0]
                gradient[k + 1 :].addr_(metric[k, k + 1 :], value[:, 0] - values[k])
                values[k] = value[:, 0]
            self._replace(first, last, values)
        self.codings[group] = replace(coding, codes=codes)

    def _replace(self, start: int, stop: int, values: Tensor) -> None:
        """Set columns of the matrix, and bring the gradient up to date."""
        self.gradient.addmm_(self.hessian[:, start:stop], values - self.values[start:stop])
        self.values[start:stop] = values
