"""Plans and claims as rows of text, for the terminal and for docs/results alike, and as records."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mikv.plan.claims import Comparison
from mikv.plan.plan import Plan
from mikv.plan.published import Published

_GIB = 1 << 30
Rows = list[tuple[str, ...]]


def plan_rows(plans: Sequence[Plan]) -> Rows:
    """A row per quantity, a column per plan."""
    rows: Rows = [
        ("bits per weight", *(f"{one.bits_per_weight:.2f}" for one in plans)),
        ("cache of fp16", *(f"{one.cache_ratio:.3f}" for one in plans)),
        ("devices", *(_devices(one) for one in plans)),
    ]
    for part in asdict(plans[0].memory):
        rows.append((f"{part.replace('_', ' ')}, GiB", *(_gib(one, part) for one in plans)))
    rows.append(("all memory, GiB", *(_gib(one, "total") for one in plans)))
    records = [one.to_dict() for one in plans]
    for label, key, digits in (
        ("ms per token", "ms_per_token", 1),
        ("tokens/s, each sequence", "tokens_per_second_per_sequence", 1),
        ("tokens/s, all", "tokens_per_second", 1),
        ("joules per token", "joules_per_token", 2),
    ):
        rows.append((label, *(_number(record[key], digits) for record in records)))
    for part in ("matrices", "head", "attention", "communication", "overhead"):
        rows.append((f"  {part}, ms", *(_number(record["ms_by_part"].get(part), 2) for record in records)))
    rows.append(("bound by", *(record["bound"] or "-" for record in records)))
    rows.append(("tables lose from batch", *(_break_even(one) for one in plans)))
    rows.append(("prefill, s", *(_number(record["prefill_seconds"], 2) for record in records)))
    return rows


def claim_table(found: Sequence[Comparison]) -> tuple[tuple[str, ...], Rows]:
    """Columns and rows of the claim."""
    columns = ("on GPUs", "latency", "GPU-s", "paper", "matrices", "J, const.", "J, meas.")
    return columns, [
        (
            one.name,
            f"{one.latency:.2f}",
            f"{one.gpu_seconds:.1f}",
            "-" if one.published_gpu_seconds is None else f"{one.published_gpu_seconds:.1f}",
            f"{one.matrix_gpu_seconds:.1f}",
            f"{one.joules_constant_power:.1f}, -{one.saved_constant_power:.0%}",
            f"{one.joules_measured_power:.1f}, -{one.saved_measured_power:.0%}",
        )
        for one in found
    ]


def claim_record(one: Comparison) -> dict[str, Any]:
    """JSON types."""
    return {
        "kind": "claim",
        "option": one.name,
        "latency_ratio": one.latency,
        "gpu_seconds_ratio": one.gpu_seconds,
        "matrix_gpu_seconds_ratio": one.matrix_gpu_seconds,
        "published_gpu_seconds_ratio": one.published_gpu_seconds,
        "joules_ratio_constant_power": one.joules_constant_power,
        "joules_ratio_measured_power": one.joules_measured_power,
    }


def published_table(rows: Sequence[Published]) -> tuple[tuple[str, ...], Rows]:
    """Columns and rows of the comparison with the paper."""
    columns = ("table, model", "weights", "GPUs", "paper, ms", "estimate, ms", "error", "")
    return columns, [
        (
            f"{row.table}, {row.model}",
            row.weights.name,
            str(row.gpus),
            "no room" if row.milliseconds is None else f"{row.milliseconds:.1f}",
            _estimated(row),
            "-" if row.error is None else f"{row.error:+.1%}",
            "" if row.is_fitted else "not fitted",
        )
        for row in rows
    ]


def published_record(row: Published) -> dict[str, Any]:
    """JSON types."""
    step = row.estimate().step
    return {
        "kind": "published",
        "table": row.table,
        "model": row.model,
        "weights": row.weights.name,
        "gpus": row.gpus,
        "published_ms": row.milliseconds,
        "estimated_ms": None if step is None else 1e3 * step.total,
        "error": row.error,
        "is_fitted": row.is_fitted,
    }


def _estimated(row: Published) -> str:
    step = row.estimate().step
    return "no room" if step is None else f"{1e3 * step.total:.1f}"


def _devices(one: Plan) -> str:
    if one.fits:
        return str(one.devices) if one.devices == one.needed else f"{one.devices} ({one.needed} needed)"
    return f"{one.devices}, no room" + (f"; {one.needed} needed" if one.needed else "")


def _gib(one: Plan, part: str) -> str:
    size = getattr(one.memory, part) * one.devices / _GIB
    return f"{size:,.2f}" if size >= 1 else f"{size:.3f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _break_even(one: Plan) -> str:
    if not one.deployment.weights.is_lut:
        return "-"
    return "never" if one.break_even_batch is None else str(one.break_even_batch)
