"""Weights that make up for changed inputs."""

import torch

from mikv.weights.drift import made_up


def test_what_changed_inputs_cost_is_partly_made_up_for() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    exact = torch.randn(4096, 16, generator=generator)
    mixing = torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator)
    inputs = exact @ mixing  # a change that weights can undo
    hessian, drift = inputs.T @ inputs / 4096, (exact - inputs).T @ inputs / 4096
    wanted = exact @ weight.T
    before = (inputs @ weight.T - wanted).square().mean()
    after = (inputs @ made_up(weight, hessian, drift).T - wanted).square().mean()
    assert 0.4 * before < after < 0.7 * before  # a quarter of the correction leaves (1 - .25)**2 of the error


def test_inputs_that_did_not_change_leave_the_weights_as_they_are() -> None:
    weight, hessian = torch.randn(8, 16), torch.eye(16)
    assert torch.equal(made_up(weight, hessian, torch.zeros(16, 16)), weight)
