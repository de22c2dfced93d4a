"""From a Deployment to a Plan: everything that `mikv plan` says about it. All numbers are estimates."""

from dataclasses import asdict, dataclass
from typing import Any

from mikv.plan.deployment import Deployment
from mikv.plan.energy import joules_per_token, watts
from mikv.plan.memory import Memory, cache_bytes, devices_needed, matrix_bytes, memory, usable_bytes
from mikv.plan.time import StepTime, break_even_batch, decode_time, prefill_time

_GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """A deployment on `devices`, `needed` being the fewest with room for it (None: no number of them has).

    Where it does not fit, `step` and `prefill_seconds` are None: it would not run.
    """

    deployment: Deployment
    devices: int
    needed: int | None
    memory: Memory
    step: StepTime | None
    prefill_seconds: float | None

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.step is not None

    @property
    def name(self) -> str:
        """`bcq3 + balanced`."""
        return f"{self.deployment.weights.name} + {self.deployment.cache.name}"

    @property
    def joules_per_token(self) -> float | None:
        """None if it does not fit or the devices' power is not known."""
        return None if self.step is None else joules_per_token(self.deployment, self.devices, self.step.total)

    @property
    def break_even_batch(self) -> int | None:
        """Rows from which on dequantizing and multiplying is faster than tables; None without tables, or if never."""
        return break_even_batch(self.deployment, self.devices)

    @property
    def bits_per_weight(self) -> float:
        """Of the layers' matrices, scales included."""
        return 8 * matrix_bytes(self.deployment) / self.deployment.shape.matrix_parameters

    @property
    def cache_ratio(self) -> float:
        """Bytes of the cache as a share of the same in fp16."""
        geometry = self.deployment.shape.geometry(1, self.deployment.dtype_bytes)
        fp16 = self.deployment.batch * geometry.fp16_bytes(self.deployment.context)
        return cache_bytes(self.deployment, 1) / fp16

    def notes(self) -> tuple[str, ...]:
        """What a reader must know to believe the numbers no more than they deserve."""
        return tuple(_notes(self))

    def to_dict(self) -> dict[str, Any]:
        """JSON types; bytes of all devices together."""
        asked, step = self.deployment, self.step
        seconds = {} if step is None else {part: 1e3 * value for part, value in step.seconds.items()}
        return {
            "option": self.name,
            "weights": asked.weights.name,
            "cache": asked.cache.name,
            "group_size": asked.weights.group_size,
            "bits_per_weight": self.bits_per_weight,
            "cache_ratio": self.cache_ratio,
            "gpus": self.devices,
            "gpus_needed": self.needed,
            "fits": self.fits,
            "memory_bytes": asdict(self.memory.of_all(self.devices)),
            "total_bytes": self.memory.total * self.devices,
            "bytes_per_gpu": self.memory.total,
            "usable_bytes_per_gpu": usable_bytes(asked),
            "ms_per_token": None if step is None else 1e3 * step.total,
            "ms_by_part": seconds,
            "bound": None if step is None else step.bound,
            "tokens_per_second_per_sequence": None if step is None else 1 / step.total,
            "tokens_per_second": None if step is None else asked.batch / step.total,
            "watts_per_gpu": watts(asked, self.devices),
            "joules_per_token": self.joules_per_token,
            "break_even_batch": self.break_even_batch,
            "prefill_seconds": self.prefill_seconds,
            "notes": list(self.notes()),
        }


def plan(deployment: Deployment, gpus: int | None = None) -> Plan:
    """Estimate everything on `gpus` devices, or on the fewest that have room.

    Raises ConfigError if the heads cannot be divided among `gpus`.
    """
    if gpus is not None:
        deployment.require_degree(gpus)
    needed = devices_needed(deployment)
    devices = gpus or needed or deployment.degrees[-1]
    held = memory(deployment, devices)
    fits = held.total <= usable_bytes(deployment)
    return Plan(
        deployment,
        devices,
        needed,
        held,
        decode_time(deployment, devices) if fits else None,
        prefill_time(deployment, devices) if fits else None,
    )


def _notes(estimate: Plan) -> list[str]:
    asked, notes = estimate.deployment, []
    if not estimate.fits:
        held, room = estimate.memory.total / _GIB, usable_bytes(asked) / _GIB
        way_out = (
            f"it needs {estimate.needed}" if estimate.needed else "no number of them that divides its heads is enough"
        )
        notes.append(
            f"does not fit on {estimate.devices} x {asked.hardware.title}: "
            f"{held:.1f} GiB each of {room:.1f} usable; {way_out}"
        )
    if not asked.hardware.is_cpu:
        if asked.weights.is_lut:
            notes.append("mikv has no GPU kernel for binary-coded weights yet: times assume the paper's, on any GPU")
        if asked.cache.is_packed:
            notes.append("mikv has no GPU kernel for its cache yet: times assume the bandwidth share of its CPU kernel")
        if asked.weights.kernel in ("int4", "int3"):
            notes.append(
                f"{asked.weights.name} times are of the kernels of 2023 in LUT-GEMM's table 1; newer ones are faster"
            )
    if asked.shape.left_out:
        notes.append(f"only the text part is planned: {asked.shape.left_out} comes on top")
    if asked.shape.num_experts:
        notes.append("experts are assumed to be taken with equal chance, and divided among devices like all matrices")
    if estimate.devices > 8:
        notes.append("links are assumed to be as fast among all GPUs as within one server")
    if estimate.joules_per_token is None and estimate.fits:
        notes.append("the power of this machine is not known: give it as --watts")
    return notes
