"""`mikv bench matmul`: products of a few rows of activations with stored weights, in the processor's cache and not.

All kernels take turns: in a round, in random order, each multiplies once with weights that must come from memory, and
once with weights that it has just read. After every cold product about as many bytes of another buffer are read at full
speed, in the same process and with the same threads; a bandwidth share is of the median of its readings. Each kernel
has several copies of its weights and uses them in turn, so many that between two visits of one, twice the last-level
cache has been read. The warm product has a copy of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mikv.bench.matmul_kernels import BASELINE, MatmulKernel, matmul_kernels
from mikv.bench.matmul_onnx import OPTIONS as ONNX_OPTIONS
from mikv.bench.matmul_plan import MatmulPlan, make_activations, make_weights
from mikv.bench.matmul_weight import StoredWeight
from mikv.bench.streaming import MOST_BYTES, Stream
from mikv.errors import ConfigError
from mikv.processor import last_level_cache_bytes

_FEWEST_ROUNDS = 5
_MOST_SHARES = 3  # of the time that a kernel takes on average
_METRICS = (
    "ms_cold",
    "ms_cold_p10",
    "ms_warm",
    "cpu_ms_cold",
    "speedup_cold",
    "cpu_speedup_cold",
    "speedup_warm",
    "bytes",
    "bits_per_weight",
    "gbps",
    "bandwidth_share",
    "bandwidth_share_p10",
    "rel_error",
    "format_error",
)


@dataclass
class Entrant:
    """A kernel with its copies, the last of which is the warm one.

    errors      per number of rows: of the kernel, and of the format
    cold, warm  milliseconds by round, of one number of rows
    cold_cpu    milliseconds of all threads' processor time, which other programs do not add to
    speeds      GB/s of reading memory after each cold product
    """

    kernel: MatmulKernel
    copies: list[StoredWeight]
    errors: dict[int, tuple[float, float]]
    cold: dict[int, float] = field(default_factory=dict)
    cold_cpu: dict[int, float] = field(default_factory=dict)
    warm: dict[int, float] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of one copy."""
        return self.copies[0].bytes


def run(
    plan: MatmulPlan, on_kernel: Callable[[str], None] = lambda name: None, cold_bytes: int | None = None
) -> dict[str, Any]:
    """Measure every kernel with PyTorch's present number of threads.

    `cold_bytes` is what is read between two visits of a copy; None is twice the last-level cache. Returns
    `stream_gbps`, how it was measured and the `rows` as JSON types; rows of kernels that cannot run have a reason in
    `skipped` and None for every number.
    """
    cold_bytes = cold_bytes or 2 * last_level_cache_bytes()
    stream = Stream()
    readings = [stream.read(stream.size_like(MOST_BYTES)) for _ in range(_FEWEST_ROUNDS)]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        entrants, skipped = _enter(plan, on_kernel)
        in_a_round = sum(entrant.bytes + stream.size_like(entrant.bytes) for entrant in entrants)
        for entrant in entrants:  # those that are read in turns, and the warm one
            entrant.copies += [entrant.copies[0].copy() for _ in range(1 + -(-cold_bytes // in_a_round))]
        for num_rows in plan.rows:
            on_kernel(f"{num_rows} rows with {len(entrants)} kernels")
            _measure(entrants, make_activations(plan, num_rows), stream, plan.seconds * len(entrants))
            readings += [speed for entrant in entrants for speed in entrant.speeds]
            rows += [_row(entrant, entrants, num_rows) for entrant in entrants]
            rows += [_names(line, num_rows) | dict.fromkeys(_METRICS) | {"skipped": why} for line, why in skipped]
    return {
        "stream_gbps": round(median(readings), 3),
        "stream_method": stream.method,
        "shape": {"m": plan.m, "k": plan.k, "group_size": plan.group_size},
        "cold_bytes": cold_bytes,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "peer_options": {"onnxruntime": ONNX_OPTIONS},
        "rows": rows,
    }


def _enter(plan: MatmulPlan, on_kernel: Callable[[str], None]) -> tuple[list[Entrant], list[tuple[MatmulKernel, str]]]:
    """Kernels with one copy each and their errors; and those that cannot run, with the reason."""
    weights = make_weights(plan)
    inputs = {num_rows: make_activations(plan, num_rows) for num_rows in plan.rows}
    wanted = {num_rows: linear(x.double(), weights.double()) for num_rows, x in inputs.items()}
    entrants, skipped = [], []
    for line in matmul_kernels(plan.bits, plan.group_size):
        on_kernel(f"the errors of {line.kernel} {line.bits}")
        if line.unavailable is not None:
            skipped.append((line, line.unavailable))
            continue
        try:
            stored = line.build(weights)
        except ConfigError as error:
            skipped.append((line, str(error)))
            continue
        matrix, errors = stored.exact(), {}
        for num_rows, activations in inputs.items():
            given = activations.to(stored.dtype)
            found = stored.product(given)().double()
            exact = linear(given.double(), matrix)
            errors[num_rows] = (_distance(found, exact), _distance(found, wanted[num_rows]))
        entrants.append(Entrant(line, [stored], errors))
    return entrants, skipped


def _measure(entrants: list[Entrant], activations: Tensor, stream: Stream, seconds: float) -> None:
    """Rounds for so many seconds, the first of which warms up and does not count.

    A kernel that takes much longer than others sits out rounds, except for the baseline.
    """
    products = [[copy.product(activations.to(copy.dtype)) for copy in entrant.copies] for entrant in entrants]
    spent, order, random = [0.0] * len(entrants), list(range(len(entrants))), Random(0)
    for entrant in entrants:
        entrant.cold, entrant.cold_cpu, entrant.warm, entrant.speeds = {}, {}, {}, []
    start, rounds = perf_counter(), 0
    while rounds <= _FEWEST_ROUNDS or perf_counter() - start < seconds:
        most = _MOST_SHARES * sum(spent) / len(entrants)
        random.shuffle(order)  # what a kernel leaves in the processor's caches, and its threads, meet the next one
        for i in order:
            entrant, (*cold, warm) = entrants[i], products[i]
            if rounds > _FEWEST_ROUNDS and spent[i] > most and entrant.kernel.kernel != BASELINE:
                continue
            begin = perf_counter()
            cold_ms, cpu_ms = _milliseconds(cold[rounds % len(cold)])
            speed = stream.read(stream.size_like(entrant.bytes))
            warm()
            warm_ms, _ = _milliseconds(warm)
            spent[i] += perf_counter() - begin
            if rounds:
                entrant.cold[rounds], entrant.cold_cpu[rounds], entrant.warm[rounds] = cold_ms, cpu_ms, warm_ms
                entrant.speeds.append(speed)
        rounds += 1


def _milliseconds(product: Callable[[], Tensor]) -> tuple[float, float]:
    """How long it takes, and how long all threads together compute."""
    start, start_cpu = perf_counter(), process_time()
    product()
    return (perf_counter() - start) * 1e3, (process_time() - start_cpu) * 1e3


def _row(entrant: Entrant, entrants: list[Entrant], num_rows: int) -> dict[str, Any]:
    baseline = next(other for other in entrants if other.kernel.kernel == BASELINE)
    cold, stream_gbps = median(entrant.cold.values()), median(entrant.speeds)
    fastest, gbps = quantiles(entrant.cold.values(), n=10)[0], entrant.bytes / cold / 1e6
    rel_error, format_error = entrant.errors[num_rows]
    return _names(entrant.kernel, num_rows) | {
        "ms_cold": cold,
        "ms_cold_p10": fastest,
        "ms_warm": median(entrant.warm.values()),
        "cpu_ms_cold": median(entrant.cold_cpu.values()),
        "speedup_cold": _ratio(baseline.cold, entrant.cold),
        "cpu_speedup_cold": _ratio(baseline.cold_cpu, entrant.cold_cpu),
        "speedup_warm": _ratio(baseline.warm, entrant.warm),
        "bytes": entrant.bytes,
        "bits_per_weight": baseline.kernel.bits * entrant.bytes / baseline.bytes,
        "gbps": gbps,
        "bandwidth_share": gbps / stream_gbps,
        # on a busy machine: undisturbed
        "bandwidth_share_p10": entrant.bytes / fastest / 1e6 / quantiles(entrant.speeds, n=10)[-1],
        "rel_error": rel_error,
        "format_error": format_error,
        "paired_stream_gbps": stream_gbps,
        "rounds": len(entrant.cold),
        "copies": len(entrant.copies),
        "skipped": None,
    }


def _names(line: MatmulKernel, num_rows: int) -> dict[str, Any]:
    return {"kernel": line.kernel, "bits": line.bits, "rows": num_rows}


def _ratio(baseline: dict[int, float], own: dict[int, float]) -> float:
    """The median over rounds, of which each has the same conditions for both."""
    return median(baseline[i] / own[i] for i in own)


def _distance(found: Tensor, exact: Tensor) -> float:
    """The length of the difference as a share of the length of what is right."""
    return float((found - exact).norm() / exact.norm())
