"""`mikv.bench.matmul`: what a row says, that weights are cold, that kernels multiply with what they hold."""

import pytest
import torch

from mikv.bench import matmul_kernels, matmul_mikv, matmul_plan
from mikv.bench.matmul import run
from mikv.bench.matmul_kernels import matmul_kernels as kernels
from mikv.bench.matmul_mikv import MikvWeight
from mikv.bench.matmul_plan import MatmulPlan, make_activations, make_weights, parse_counts
from mikv.bench.matmul_torch import TorchLinear
from mikv.bench.matmul_weight import Grid
from mikv.bench.streaming import FEWEST_BYTES
from mikv.errors import ConfigError

PLAN = MatmulPlan(m=128, k=512, rows=(1, 5), bits=(2, 4), group_size=64, seconds=1e-4)
NUMBERS = ("ms_cold", "ms_warm", "gbps", "bandwidth_share", "rel_error", "format_error", "bytes", "speedup_cold")
# Of outputs. float32 sums; bfloat16 rounds each output; the others round activations with outliers to 8 bits.
LIMITS = {"torch_fp32": 1e-6, "onnxruntime_fp32": 1e-6, "torch_bf16": 5e-3, "torch_int4pack": 5e-3}
EIGHT_BITS = 5e-2


@pytest.fixture
def small_solutions(monkeypatch):
    """Fewer rows that differ are solved faster."""
    for module in (matmul_plan, matmul_mikv):
        monkeypatch.setattr(module, "DIFFERENT_ROWS", 16)


@pytest.fixture
def result(small_machine, small_solutions):
    return run(PLAN)


def lines():
    return kernels((2, 3, 4), 64)


def test_every_kernel_has_a_row_for_every_number_of_rows(result):
    names = [line.kernel for line in kernels(PLAN.bits, PLAN.group_size)]
    for num_rows in PLAN.rows:
        assert sorted(row["kernel"] for row in result["rows"] if row["rows"] == num_rows) == sorted(names)
    assert {row["bits"] for row in result["rows"]} == {2, 4, 16, 32}


def test_numbers_fit_together(result, small_machine):
    assert result["stream_gbps"] > 0
    measured = [row for row in result["rows"] if not row["skipped"]]
    in_a_round = sum(row["bytes"] + 2 * small_machine for row in measured if row["rows"] == 1)
    assert 2 * small_machine < FEWEST_BYTES  # so a reading is the whole buffer
    for row in result["rows"]:
        if row["skipped"]:
            assert all(row[name] is None for name in NUMBERS)
            continue
        assert row["rounds"] >= 5
        assert row["ms_cold_p10"] <= row["ms_cold"]
        assert row["cpu_ms_cold"] > 0
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms_cold"] / 1e6)
        assert row["bandwidth_share"] == pytest.approx(row["gbps"] / row["paired_stream_gbps"])
        assert row["bits_per_weight"] == pytest.approx(8 * row["bytes"] / (PLAN.m * PLAN.k))
        # of the copies, one is the warm one, and one is what is visited again
        assert (row["copies"] - 2) * in_a_round >= result["cold_bytes"] == 2 * small_machine
    assert all(row["speedup_cold"] == 1 for row in measured if row["kernel"] == "torch_fp32")


@pytest.mark.parametrize("line", lines(), ids=lambda line: f"{line.kernel}-{line.bits}")
@pytest.mark.parametrize("num_rows", [1, 7])
def test_a_kernel_multiplies_with_the_matrix_that_it_says_it_holds(line, num_rows, small_solutions):
    if line.unavailable:
        pytest.skip(line.unavailable)
    plan = MatmulPlan(m=128, k=512, group_size=64)
    weights = make_weights(plan)
    stored = line.build(weights)
    activations = make_activations(plan, num_rows).to(stored.dtype)
    exact = activations.double() @ stored.exact().T
    limit = LIMITS.get(line.kernel, EIGHT_BITS)
    for each in (stored, stored.copy()):
        found = each.product(activations)().double()
        assert found.shape == (num_rows, 128)
        assert (found - exact).norm() < limit * exact.norm()
    # the matrix is the given one in few bits
    assert (stored.exact() - weights).norm() < {2: 0.55, 3: 0.25, 4: 0.15}.get(line.bits, 0.01) * weights.norm()


@pytest.mark.parametrize("line", lines(), ids=lambda line: f"{line.kernel}-{line.bits}")
def test_bytes_are_those_of_the_bits(line, small_solutions):
    if line.unavailable:
        pytest.skip(line.unavailable)
    bits = 8 * line.build(make_weights(PLAN)).bytes / (PLAN.m * PLAN.k)
    assert line.bits <= bits <= line.bits + 1.25


def test_copies_lie_in_other_memory(small_solutions):
    weights = make_weights(PLAN)
    plain = TorchLinear.build(weights, torch.float32)
    assert len({plain.copy().weights.data_ptr(), plain.weights.data_ptr(), weights.data_ptr()}) == 3
    ours = MikvWeight.build(weights, 2, 64, path=0)
    assert ours.copy().codes.data_ptr() != ours.codes.data_ptr()
    assert ours.copy().scales.data_ptr() != ours.scales.data_ptr()


def test_a_grid_reaches_from_the_smallest_to_the_largest_weight_of_a_group_and_has_zero():
    weights = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [1.0, 2.0, 3.0, 0.0]])
    grid = Grid.of(weights, 2, 4)
    assert grid.scales.tolist() == [[1.0], [1.0]]
    assert grid.codes.tolist() == [[[0, 1, 1, 3]], [[1, 2, 3, 0]]]
    assert grid.exact()[0].tolist() == [-1, 0, 0, 2]
    ragged = Grid.of(torch.ones(1, 5), 4, 4).exact()
    torch.testing.assert_close(ragged, torch.ones(1, 5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_missing_peers_are_skipped_rows(small_machine, small_solutions, monkeypatch):
    monkeypatch.setattr(matmul_kernels, "is_installed", lambda package: False)
    rows = run(MatmulPlan(m=64, k=64, rows=(1,), bits=(2,), group_size=32, seconds=1e-4))["rows"]
    skipped = {row["kernel"]: row["skipped"] for row in rows if row["skipped"] and "needs" in row["skipped"]}
    assert skipped["onnxruntime"] == "needs onnxruntime and onnx: pip install 'mikv[bench]'"
    assert skipped["llama.cpp_Q2_K"] == "needs llama-cpp-python: pip install 'mikv[bench]'"


def test_sizes_that_a_format_cannot_hold_are_skipped_rows(small_machine, small_solutions):
    rows = run(MatmulPlan(m=24, k=104, rows=(1,), bits=(4,), group_size=32, seconds=1e-4))["rows"]
    [row] = [row for row in rows if row["kernel"] == "torch_int4pack"]
    assert row["skipped"] == "takes groups of 32, 64, 128, 256 that divide --k and --m in multiples of 16"
    assert not next(row for row in rows if row["kernel"] == "mikv")["skipped"]


def test_activations_have_a_few_channels_that_are_much_larger():
    sizes = make_activations(MatmulPlan(), 64).square().mean(0).sqrt()
    assert 6 <= int((sizes > 8 * sizes.median()).sum()) <= 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0}, "--m 0 must be 1 or more"),
        ({"k": -4}, "--k -4 must be 1 or more"),
        ({"m": 1 << 20}, "--m 1048576 times --k 4096 takes 16.0 GiB .* use --m 32768"),
        ({"rows": (1, 0)}, "--rows 0 must be between 1 and 4096"),
        ({"bits": (5,)}, "--bits 5 must be 1, 2, 3 or 4"),
        ({"group_size": 48}, "--group-size=48 is not a multiple of 32"),
        ({"seconds": 0}, "--seconds 0 must be more than 0"),
    ],
)
def test_impossible_plans_are_refused_with_a_way_out(options, message):
    with pytest.raises(ConfigError, match=message):
        MatmulPlan(**options)


def test_counts_are_whole_numbers_each_once():
    assert parse_counts("--rows", "8,1,8") == (8, 1)
    with pytest.raises(ConfigError, match="--rows '1,many' must be whole numbers with commas"):
        parse_counts("--rows", "1,many")
