"""What `mikv quantize` has done, for people: errors by kind of layer, the worst layers, sizes, and a picture."""

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from math import sqrt
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from rich.table import Table

from mikv.cli import terminal

Layer = Mapping[str, Any]

_NUM_WORST = 5
_BLOCK = re.compile(r"\.(\d+)\.")
_COLORS = ("#0b6e4f", "#d1495b", "#1d5a85", "#c9820a", "#8e6bbf", "#2a9d8f", "#e58f9a", "#4a90c2")
_MEANING = {
    True: "error: of a layer's output on the calibration text",
    False: "error: of a layer's weights, for without calibration nothing is known of its inputs",
}


def show_tables(result: Mapping[str, Any]) -> None:
    """Print the tables and where the model is."""
    console, layers = terminal.console(), result["layers"]
    title = f"{result['model']} by {result['method']}, {result['bits_per_weight']:.2f} bits per weight with scales"
    console.print(title, style="italic", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(("layers", "count", "bits", "error", "worst", "s")):
        table.add_column(column, justify="right" if i else "left")
    for kind, own in by_kind(layers).items():
        weights = sum(layer["num_weights"] for layer in own)
        bits = sum(layer["bits_per_weight"] * layer["num_weights"] for layer in own) / weights
        errors = [relative_error(layer) for layer in own]
        seconds = sum(layer["seconds"] for layer in own)
        table.add_row(
            kind, str(len(own)), f"{bits:.2f}", f"{fmean(errors):.1%}", f"{max(errors):.1%}", f"{seconds:.1f}"
        )
    console.print(table)
    worst = sorted(layers, key=relative_error, reverse=True)[:_NUM_WORST]
    console.print("largest errors: " + ", ".join(f"{layer['name']} {relative_error(layer):.1%}" for layer in worst))
    console.print(f"{_MEANING[result['calibration'] != 'none']}, relative to its own length", style="dim")
    console.print(
        f"{result['bytes_before'] / 2**20:,.1f} MiB in memory before, {result['bytes_after'] / 2**20:,.1f} MiB in "
        f"{result['out']}; {result['seconds']:.0f} s. Use it as --model {result['out']}",
        soft_wrap=True,
    )


def by_kind(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers of the same name in different blocks together, in the order of the model."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    return kinds


def relative_error(layer: Layer) -> float:
    """The length of the error over that of the output: the root of what the report has."""
    return sqrt(layer["output_error"])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The error of every layer over its block, a line per kind; layers outside of blocks have none."""
    from mikv.bench.plots import STYLE, label_heights

    matplotlib = import_module("matplotlib")
    with matplotlib.rc_context(STYLE):
        matplotlib.use("Agg")
        pyplot = import_module("matplotlib.pyplot")
        figure, axes = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
        ends: dict[str, float] = {}
        for kind, own in by_kind(result["layers"]).items():
            points = [(int(block[1]), 100 * relative_error(x)) for x in own if (block := _BLOCK.search(x["name"]))]
            if points:
                color = _COLORS[len(ends) % len(_COLORS)]
                axes.plot(*zip(*points, strict=True), color=color, linewidth=1.7, marker="o", markersize=3.5)
                ends[kind] = points[-1][1]
        axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
        last = axes.get_xlim()[1]
        for kind, height in label_heights(ends, gap=axes.get_ylim()[1] * 0.05).items():
            color = _COLORS[list(ends).index(kind) % len(_COLORS)]
            axes.annotate(kind, (last, height), color=color, va="center", fontsize=9, annotation_clip=False)
        axes.set_title(f"Error of each layer, %: {Path(result['model']).name}, {result['bits_per_weight']:.2f} bits")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("block")
        axes.grid(axis="y")
        command = fill(result["command"], 150, break_on_hyphens=False, subsequent_indent="    ")
        figure.supxlabel(command, x=0.008, ha="left", fontsize=7.5, color="#8b949e")
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
        pyplot.close(figure)
