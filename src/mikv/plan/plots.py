"""The picture of plans: time per token against batch, and memory by part. Imports matplotlib only here."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from mikv.bench.plots import STYLE, require_matplotlib
from mikv.plan.memory import usable_bytes
from mikv.plan.plan import Plan, plan

_WIDTH, _HEIGHT, _CAPTION = 11.0, 5.0, 0.07
_INK, _PALE = "#24292f", "#8b949e"
_LINES = ("#24292f", "#0b6e4f", "#d1495b", "#1d5a85", "#c9820a", "#8e6bbf")
_PARTS = {
    "weights": "#0b6e4f",
    "embeddings": "#79b791",
    "kv_cache": "#1d5a85",
    "activations": "#edae49",
    "reserved": "#d0d7de",
}
_BATCHES = tuple(2**i for i in range(11))
_GIB = 1 << 30


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Write the picture. Raises ConfigError without matplotlib."""
    require_matplotlib()
    matplotlib = import_module("matplotlib")
    with matplotlib.rc_context(STYLE):
        matplotlib.use("Agg")
        pyplot = import_module("matplotlib.pyplot")
        figure, (time, memory) = pyplot.subplots(1, 2, figsize=(_WIDTH, _HEIGHT), layout="constrained")
        figure.get_layout_engine().set(rect=(0, _CAPTION, 1, 1 - _CAPTION), wspace=0.08)
        _draw_time(time, plans)
        _draw_memory(memory, plans)
        figure.text(0.008, 0.015, _caption(plans[0]), fontsize=7.5, color=_PALE)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
        pyplot.close(figure)


def time_by_batch(one: Plan) -> list[tuple[int, float]]:
    """(batch, ms per step) on the devices of a plan, up to the batch that they have no more room for."""
    points = []
    for batch in _BATCHES:
        step = plan(replace(one.deployment, batch=batch), one.devices).step
        if step is None:
            break
        points.append((batch, 1e3 * step.total))
    return points


def _draw_time(axes: Any, plans: Sequence[Plan]) -> None:
    """A line per plan; later ones thinner, so that lines that coincide are seen."""
    for index, one in enumerate(plans):
        points = time_by_batch(one)
        if points:
            style = {"color": _LINES[index % len(_LINES)], "linewidth": max(1.2, 3 - 0.5 * index), "marker": "o"}
            axes.plot(*zip(*points, strict=True), label=_label(one), markersize=4, clip_on=False, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title("Time per token of a sequence, ms")
    axes.set_xlabel("batch; a line ends where memory does")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.grid(axis="y", which="both")
    axes.set_axisbelow(True)
    if axes.get_lines():
        axes.legend(fontsize=9, loc="best", framealpha=0.9, edgecolor="none")


def _draw_memory(axes: Any, plans: Sequence[Plan]) -> None:
    """A stacked bar per plan, of all its devices, and a mark where their usable memory ends."""
    places = range(len(plans))
    bottoms = [0.0] * len(plans)
    for part, color in _PARTS.items():
        sizes = [asdict(one.memory)[part] * one.devices / _GIB for one in plans]
        axes.bar(places, sizes, bottom=bottoms, width=0.55, color=color, label=part.replace("_", " "))
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    for place, one, top in zip(places, plans, bottoms, strict=True):
        room = one.devices * usable_bytes(one.deployment) / _GIB
        axes.hlines(room, place - 0.36, place + 0.36, color=_INK, linewidth=1.4, linestyle=(0, (3, 2)))
        box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # the dashes stay off the text
        text = {"ha": "center", "fontsize": 8.5, "textcoords": "offset points", "bbox": box}
        axes.annotate(f"{top:,.1f}", (place, top), (0, 3), **text)
    axes.set_title("Memory of all devices, GiB; dashed: usable")
    axes.set_xticks(
        places, [_label(one).replace(" + ", "\n+ ").replace(" on ", "\non ") for one in plans], fontsize=8.5
    )
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _label(one: Plan) -> str:
    asked = one.deployment
    where = "" if asked.hardware.is_cpu else f" on {one.devices} GPU{'s' * (one.devices > 1)}"
    return one.name + where


def _caption(one: Plan) -> str:
    asked = one.deployment
    return (
        f"{asked.shape.name}, {asked.hardware.title}, {asked.context:,} tokens per sequence; memory at batch "
        f"{asked.batch}. Estimates: mikv plan --constants lists what they assume."
    )
