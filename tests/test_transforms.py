"""Key and value transforms are exact: attention on what is stored is attention on what was given."""

from itertools import product

import pytest
import torch
from torch import Tensor

from mikv.transforms import (
    KeyTransform,
    PromptStatistics,
    ValueTransform,
    channel_balancer,
    fit_key_transform,
    fit_value_transform,
    hadamard,
    hadamard_block_size,
    with_feedback,
)
from numerics import BUDGETS, MAKERS, assert_close, gaussian

HEAD_DIMS = (64, 80, 96, 128, 256)
SWITCHES = list(product([False, True], repeat=3))  # centring, balancer, Hadamard
BATCH, NUM_HEADS, NUM_TOKENS = 2, 3, 33


def prompt(head_dim: int, maker: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, G, T, D), one query head per KV head."""
    shape = (BATCH, NUM_HEADS, NUM_TOKENS, head_dim)
    return gaussian(shape, 1), MAKERS[maker](shape, 2), MAKERS[maker](shape, 3)


def statistics(queries: Tensor, keys: Tensor, values: Tensor, center_keys: bool) -> PromptStatistics:
    counted = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
    return PromptStatistics.measure((keys, values), queries.abs().amax(2), counted, center_keys)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("center", "balance", "rotate"), SWITCHES)
def test_logits_are_the_same_in_every_basis(
    center: bool, balance: bool, rotate: bool, head_dim: int, maker: str
) -> None:
    """q.k == q'.k' + q.mu; each product compared in float64, in units of |q'| |k'|."""
    queries, keys, values = prompt(head_dim, maker)
    stats = statistics(queries, keys, values, center)
    size = hadamard_block_size(head_dim) if rotate else 1
    transform = fit_key_transform(stats, center, balance, (0.5, 0.5), size)
    query, key = transform.query(queries).double(), transform.encode(keys).double()
    offset = transform.logit_offset(queries)
    logits = query @ key.mT + (0.0 if offset is None else offset.double())
    exact = queries.double() @ keys.double().mT
    unit = query.norm(dim=-1, keepdim=True) * key.norm(dim=-1)[:, :, None] + queries.norm(dim=-1, keepdim=True) * (
        0.0 if transform.center is None else transform.center.double().norm(dim=-1, keepdim=True)
    )
    worst = float(((logits - exact).abs() / unit).max())
    assert worst <= BUDGETS["change of basis"].relative, f"q.k D={head_dim} {maker}: relative error {worst:.3g}"


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("center", "rotate"), product([False, True], repeat=2))
def test_weighted_values_are_the_same_in_every_basis(center: bool, rotate: bool, head_dim: int, maker: str) -> None:
    """sum_t p_t v_t == H(sum_t p_t v'_t) + (sum_t p_t) mean, for weights that do not add up to 1."""
    _, _, values = prompt(head_dim, maker)
    stats = statistics(values, values, values, False)
    transform = fit_value_transform(stats, center, hadamard_block_size(head_dim) if rotate else 1)
    weights = gaussian((BATCH, NUM_HEADS, 5, NUM_TOKENS), 4).abs()
    output = transform.output(weights @ transform.encode(values), weights.sum(-1, keepdim=True))
    assert_close(output, weights.double() @ values.double(), "change of basis", op=f"p.v {maker}")


@pytest.mark.parametrize(("center", "balance", "rotate"), SWITCHES)
def test_the_transform_of_a_row_is_that_row_of_the_transform(center: bool, balance: bool, rotate: bool) -> None:
    queries, keys, values = prompt(80, "one biased channel")
    stats = statistics(queries, keys, values, center)
    size = 16 if rotate else 1
    key_transform = fit_key_transform(stats, center, balance, (0.5, 0.5), size)
    value_transform = fit_value_transform(stats, center, size)
    for row in range(BATCH):
        assert torch.equal(key_transform.of_row(row).encode(keys[row]), key_transform.encode(keys)[row])
        assert torch.equal(value_transform.of_row(row).encode(values[row]), value_transform.encode(values)[row])


def test_nothing_to_do_leaves_keys_as_they_are() -> None:
    keys = gaussian((2, 3, 7, 64))
    transform = KeyTransform(None, 1, None)
    assert torch.equal(transform.encode(keys), keys)
    assert torch.equal(transform.query(keys), keys)
    assert transform.logit_offset(keys) is None
    assert transform.tensors() == {}
    assert torch.equal(ValueTransform(None, 1).encode(keys), keys)


def test_statistics_are_stored_in_16_bits_and_counted() -> None:
    queries, keys, values = prompt(64, "gaussian")
    stats = statistics(queries, keys, values, True)
    stored = fit_key_transform(stats, True, True, (0.5, 0.5), 64).tensors()
    assert set(stored) == {"center", "balancer"}
    assert all(
        tensor.dtype == torch.float16 and tensor.shape == (BATCH, NUM_HEADS, 1, 64) for tensor in stored.values()
    )
    assert set(fit_value_transform(stats, True, 64).tensors()) == {"center"}


# --- Hadamard ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "block"), [(64, 64), (80, 16), (96, 32), (112, 16), (128, 128), (192, 64), (256, 256), (8, 8)]
)
def test_rotation_blocks_are_the_largest_power_of_two_that_divides(head_dim: int, block: int) -> None:
    assert hadamard_block_size(head_dim) == block


def test_hadamard_of_four_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert hadamard(x, 4).tolist() == [5.0, -1.0, -2.0, 0.0]  # (+ + + +), (+ - + -), (+ + - -), (+ - - +), halved


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_hadamard_is_orthonormal_and_its_own_inverse(head_dim: int) -> None:
    size = hadamard_block_size(head_dim)
    matrix = hadamard(torch.eye(head_dim), size)
    assert_close(matrix @ matrix.mT, torch.eye(head_dim), "change of basis", op="H H^T")
    assert torch.equal(matrix, matrix.mT)
    x = gaussian((5, head_dim))
    assert_close(hadamard(hadamard(x, size), size), x, "change of basis", op="H H x")


@pytest.mark.parametrize("head_dim", [80, 96])
def test_hadamard_blocks_do_not_mix(head_dim: int) -> None:
    size = hadamard_block_size(head_dim)
    x = torch.zeros(head_dim)
    x[size + 3] = 1.0
    spread = hadamard(x, size)
    assert bool((spread[size : 2 * size].abs() == size**-0.5).all())
    assert spread.count_nonzero() == size


# --- the balancer -----------------------------------------------------------------------------------------------------


def test_the_balancer_is_equation_2_by_hand() -> None:
    query_max, key_max = torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 16.0, 9.0])
    assert channel_balancer(query_max, key_max, (0.5, 0.5)).tolist() == [2.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("exponents", "expected"), [((1.0, 0.0), 4.0), ((0.0, 1.0), 1 / 16), ((0.25, 0.75), 0.17677669), ((0.0, 0.0), 1.0)]
)
def test_the_balancer_takes_other_exponents(exponents: tuple[float, float], expected: float) -> None:
    balancer = channel_balancer(torch.tensor([4.0]), torch.tensor([16.0]), exponents)
    assert balancer.item() == pytest.approx(expected, rel=BUDGETS["half"].relative)


def test_after_balancing_queries_and_keys_have_the_same_maximum() -> None:
    """With Eq. 2 both maxima become sqrt(max|q| max|k|)."""
    queries, keys, values = prompt(64, "heavy-tailed")
    transform = fit_key_transform(statistics(queries, keys, values, False), False, True, (0.5, 0.5), 1)
    largest = (transform.query(queries).abs().amax(2), transform.encode(keys).abs().amax(2))
    geometric = (queries.abs().amax(2) * keys.abs().amax(2)).sqrt()
    for side in largest:
        assert side.div(geometric).sub(1).abs().max() <= BUDGETS["half"].relative


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize(("query_max", "key_max"), [(0.0, 3.0), (3.0, 0.0), (0.0, 0.0)])
def test_channels_without_signal_are_left_alone(
    query_max: float, key_max: float, exponents: tuple[float, float]
) -> None:
    assert channel_balancer(torch.tensor([query_max]), torch.tensor([key_max]), exponents).item() == 1.0


def test_the_balancer_is_clamped_to_what_16_bits_hold() -> None:
    balancer = channel_balancer(torch.tensor([1e30, 1e-30]), torch.tensor([1e-30, 1e30]), (0.5, 0.5))
    assert balancer.tolist() == pytest.approx([1e4, 1e-4], rel=BUDGETS["half"].relative)
    assert balancer.dtype == torch.float16


def test_a_dead_channel_stays_exact() -> None:
    """A channel that is zero in every key and in every query has b = 1 and adds nothing to a logit."""
    queries, keys, values = prompt(64, "gaussian")
    queries[..., 5] = 0.0
    keys[..., 9] = 0.0
    transform = fit_key_transform(statistics(queries, keys, values, False), False, True, (0.5, 0.5), 1)
    assert transform.balancer is not None
    assert transform.balancer[..., [5, 9]].eq(1.0).all()
    assert_close(transform.query(queries) @ transform.encode(keys).mT, queries @ keys.mT, "change of basis", op="q.k")


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_by_hand() -> None:
    keys = torch.tensor([[[[1.0, -4.0], [3.0, 2.0], [-1.0, 5.0]]]])  # (1, 1, 3, 2)
    values = keys + 10.0
    counted = torch.ones(1, 3, dtype=torch.bool)
    query_max = torch.tensor([[[7.0, 8.0]]])
    plain = PromptStatistics.measure((keys, values), query_max, counted, center_keys=False)
    assert plain.key_mean.tolist() == [[[[1.0, 1.0]]]]
    assert plain.value_mean.tolist() == [[[[11.0, 11.0]]]]
    assert plain.key_max.tolist() == [[[[3.0, 5.0]]]]
    assert plain.query_max.tolist() == [[[[7.0, 8.0]]]]
    centered = PromptStatistics.measure((keys, values), query_max, counted, center_keys=True)
    assert centered.key_max.tolist() == [[[[2.0, 5.0]]]]


@pytest.mark.parametrize("center_keys", [False, True])
def test_tokens_that_are_not_counted_change_nothing(center_keys: bool) -> None:
    """Padding and sinks: whatever is in them, the statistics are those of the other tokens alone."""
    keys, values = gaussian((2, 3, 9, 64), 1), gaussian((2, 3, 9, 64), 2)
    keys[0, :, :4], values[0, :, :4] = 1000.0, -1000.0
    counted = torch.ones(2, 9, dtype=torch.bool)
    counted[0, :4] = False
    query_max = torch.ones(2, 3, 64)
    together = PromptStatistics.measure((keys, values), query_max, counted, center_keys)
    alone = PromptStatistics.measure(
        (keys[:1, :, 4:], values[:1, :, 4:]), query_max[:1], torch.ones(1, 5, dtype=torch.bool), center_keys
    )
    assert_close(together.key_mean[:1], alone.key_mean, "float32", op="key mean")
    assert_close(together.value_mean[:1], alone.value_mean, "float32", op="value mean")
    assert_close(together.key_max[:1], alone.key_max, "float32", op="key max")


def test_a_row_without_tokens_has_a_transform() -> None:
    keys = gaussian((1, 2, 5, 64))
    counted = torch.zeros(1, 5, dtype=torch.bool)
    stats = PromptStatistics.measure((keys, keys), torch.zeros(1, 2, 64), counted, center_keys=True)
    transform = fit_key_transform(stats, True, True, (0.5, 0.5), 64)
    assert all(bool(tensor.isfinite().all()) for tensor in transform.tensors().values())


def test_a_mean_beyond_16_bits_is_clamped_and_still_exact() -> None:
    queries, keys, values = prompt(64, "gaussian")
    keys[..., 3] += 1e5
    transform = fit_key_transform(statistics(queries, keys, values, True), True, False, (0.5, 0.5), 1)
    assert transform.center is not None
    assert transform.center[..., 3].eq(65504.0).all()
    offset = transform.logit_offset(queries)
    assert offset is not None
    logits = transform.query(queries).double() @ transform.encode(keys).double().mT + offset.double()
    assert_close(logits, queries.double() @ keys.double().mT, "change of basis", op="q.k")


# --- feedback ---------------------------------------------------------------------------------------------------------


def fitted_with_feedback(head_dim: int, moment_factor: float = 1.0) -> tuple[KeyTransform, Tensor]:
    """A transform with feedback, and the second moment of the queries in its basis."""
    queries, keys, values = prompt(head_dim, "one biased channel")
    queries = queries * torch.logspace(0, -1, head_dim)
    transform = fit_key_transform(
        statistics(queries, keys, values, True), True, True, (0.5, 0.5), hadamard_block_size(head_dim)
    )
    turned = transform.query(queries)
    return with_feedback(transform, queries.mT @ queries * moment_factor), turned.mT @ turned


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_feedback_is_the_triangle_of_the_queries_damped_moment_in_a_byte_each(head_dim: int) -> None:
    transform, moment = fitted_with_feedback(head_dim)
    assert transform.feedback is not None
    assert transform.feedback.shape == (BATCH, NUM_HEADS, head_dim * (head_dim - 1) // 2)
    assert transform.feedback.nbytes == transform.feedback.numel()
    dense = transform.dense_feedback()
    assert dense is not None
    assert torch.equal(dense, dense.triu(1))
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damped = (moment + 0.1 * mean * torch.eye(head_dim)).double()
    # M = (I + U) E (I + U)^T with E diagonal
    inverse = torch.linalg.inv(torch.eye(head_dim).double() + dense.double())
    decorrelated = inverse @ damped @ inverse.mT
    variance = decorrelated.diagonal(dim1=-2, dim2=-1)
    correlation = decorrelated / (variance[..., None, :] * variance[..., None]).sqrt()
    assert float((correlation - torch.eye(head_dim)).square().mean().sqrt()) < 0.03


def test_feedback_does_not_depend_on_the_size_of_the_queries() -> None:
    feedback = [fitted_with_feedback(64, factor)[0].feedback for factor in (1.0, 2.0**20, 2.0**-20)]
    assert all(torch.equal(feedback[0], other) for other in feedback[1:])


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_head_without_usable_queries_gets_no_feedback_and_the_others_theirs(bad: float) -> None:
    queries, keys, values = prompt(64, "gaussian")
    transform = fit_key_transform(statistics(queries, keys, values, True), True, True, (0.5, 0.5), 64)
    moment = queries.mT @ queries
    expected = with_feedback(transform, moment).dense_feedback()
    moment[1, 2] = bad
    dense = with_feedback(transform, moment).dense_feedback()
    assert dense is not None
    assert expected is not None
    assert bool((dense[1, 2] == 0).all())
    assert torch.equal(dense[0], expected[0])


def test_a_transform_without_feedback_has_none() -> None:
    queries, keys, values = prompt(64, "gaussian")
    transform = fit_key_transform(statistics(queries, keys, values, True), True, True, (0.5, 0.5), 64)
    assert transform.dense_feedback() is None
    assert "feedback" not in transform.tensors()
