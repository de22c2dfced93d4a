"""nuQmm's "14.4 times faster, 93 % less energy" for GPT-3 175B, taken apart: latency, GPU-seconds and joules.

The claim stands in the abstract of version 1 of arXiv 2206.09557 (June 2022) and was withdrawn in version 2. 93 % is
1 - 1 / 14.4: the energy saved is the speed-up written differently, as at constant power or in GPU-seconds.
"""

from dataclasses import dataclass

from mikv.plan.constants import GPU
from mikv.plan.plan import Plan, plan
from mikv.plan.published import paper_deployment, published_rows
from mikv.plan.weight_formats import parse_weights

CLAIMED_SPEEDUP = 14.4
CLAIMED_SAVING = 1 - 1 / CLAIMED_SPEEDUP
_NEAR = 0.1
# what it may have been compared with: later versions say fp16 on 8 GPUs, the first one's body is not available here
_REFERENCES = (("fp16", 8), ("fp32", 16))
_CANDIDATES = (("bcq1", 1), ("bcq2", 1), ("bcq3", 1), ("bcq2", 2), ("bcq4", 2), ("bcq2", 8))


@dataclass(frozen=True)
class Comparison:
    """Binary-coded weights against a reference, both on A100-80 at batch 1; the ratios are reference / weights.

    published_gpu_seconds  of LUT-GEMM's table 4 for OPT-175B, where it has both
    """

    reference: Plan
    candidate: Plan
    published_gpu_seconds: float | None

    @property
    def latency(self) -> float:
        """How many times sooner a token is there."""
        return _seconds(self.reference) / _seconds(self.candidate)

    @property
    def gpu_seconds(self) -> float:
        """How many times fewer GPUs are occupied for how long."""
        return self.latency * self.reference.devices / self.candidate.devices

    @property
    def matrix_gpu_seconds(self) -> float:
        """The same of matrices and communication alone, as kernels are measured."""
        return _matrix_gpu_seconds(self.reference) / _matrix_gpu_seconds(self.candidate)

    @property
    def joules_constant_power(self) -> float:
        """Joules if every GPU draws the same whatever it does: the same number as GPU-seconds."""
        return self.gpu_seconds

    @property
    def joules_measured_power(self) -> float:
        """Joules with the power that table 2 implies for the kernels, 1.31 times that of cuBLAS."""
        return self.gpu_seconds / GPU["lut_power"]

    @property
    def saved_constant_power(self) -> float:
        """Share of the joules."""
        return 1 - 1 / self.joules_constant_power

    @property
    def saved_measured_power(self) -> float:
        """Share of the joules."""
        return 1 - 1 / self.joules_measured_power

    @property
    def name(self) -> str:
        """`bcq3 on 1 / fp32 on 16`."""
        candidate, reference = (f"{p.deployment.weights.name} on {p.devices}" for p in (self.candidate, self.reference))
        return f"{candidate} / {reference}"


def comparisons() -> tuple[Comparison, ...]:
    """All candidates against all references."""
    return tuple(
        Comparison(_plan(*reference), _plan(*candidate), _published(reference, candidate))
        for reference in _REFERENCES
        for candidate in _CANDIDATES
    )


def findings(found: tuple[Comparison, ...]) -> tuple[str, ...]:
    """What the comparisons say about the claim."""
    fastest = max(found, key=lambda one: one.latency)
    tokens = _near({one.name: one.gpu_seconds for one in found})
    kernels = _near({one.name: one.matrix_gpu_seconds for one in found})
    return (
        f"93 % is 1 - 1/{CLAIMED_SPEEDUP} = {CLAIMED_SAVING:.1%}: the saving is the speed-up once more, so power was "
        "held constant or GPU-seconds were counted. Table 2 of the later paper measures 0.27 of the energy in 1/4.85 "
        f"of the time on one GPU, which is {GPU['lut_power']:g} times the power.",
        f"As latency the claim is not reproduced: the most is {fastest.latency:.1f} ({fastest.name}).",
        f"As GPU-seconds of whole tokens, within 10 % of {CLAIMED_SPEEDUP}: {tokens}. The paper's own table 4 gives "
        "6.6 (3 bits), 8.5 (2 bits) and 11.2 (1 bit) on one GPU against fp16 on 8.",
        f"As GPU-seconds of matrices and communication alone, as kernels are measured, within 10 %: {kernels}. That "
        "the claim was meant so is a guess.",
        "Which precision, GPUs and layers the first version compared cannot be reconstructed: its tables are not "
        "available here, and the later versions replace the claim by 47.3 % less latency on 8 GPUs.",
    )


def _near(ratios: dict[str, float]) -> str:
    """Those that come near the claim."""
    return (
        "; ".join(f"{name} ({x:.1f})" for name, x in ratios.items() if abs(x / CLAIMED_SPEEDUP - 1) < _NEAR) or "none"
    )


def _plan(weights: str, gpus: int) -> Plan:
    return plan(paper_deployment("gpt-3-175b", parse_weights(weights, None)), gpus)


def _seconds(estimate: Plan) -> float:
    assert estimate.step is not None, f"{estimate.name} does not fit"
    return estimate.step.total


def _matrix_gpu_seconds(estimate: Plan) -> float:
    assert estimate.step is not None, f"{estimate.name} does not fit"
    return estimate.devices * (estimate.step.matrices + estimate.step.communication)


def _published(*formats: tuple[str, int]) -> float | None:
    """GPU-seconds of the first by those of the second, if table 4 has both."""
    found = {
        (row.weights.name, row.gpus): row.gpus * row.milliseconds
        for row in published_rows()
        if row.table == "4" and row.milliseconds is not None
    }
    reference, candidate = (found.get(key) for key in formats)
    return None if reference is None or candidate is None else reference / candidate
