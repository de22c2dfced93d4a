"""Pictures of records, drawn with matplotlib, which is imported only here."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Any

from mikv.bench.pages import Record, kernel_name, milliseconds, model_name
from mikv.cache_names import is_installed
from mikv.errors import ConfigError

_WIDTH, _CAPTION_HEIGHT = 10.6, 0.46  # inches
_INK, _PALE = "#24292f", "#8b949e"
_COLORS = {
    "mikv": ("#0b6e4f", "#2a9d8f", "#79b791", "#b5c99a"),
    "full": (_INK,),
    "quanto": ("#d1495b", "#e58f9a"),
    "hqq": ("#c9820a", "#edae49"),
    "fp8": ("#8e6bbf",),
    "llama.cpp": ("#1d5a85", "#4a90c2", "#94bfe0"),
}
# of every picture; what they are drawn with on top is their own
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": _PALE,
    "axes.labelcolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "grid.color": "#e6e8eb",
    "svg.fonttype": "none",
}


def require_matplotlib() -> None:
    """Raise ConfigError if there is nothing to draw with."""
    if not is_installed("matplotlib"):
        raise ConfigError("plots need matplotlib: pip install 'mikv[bench]'")


def draw(records: Sequence[Record], path: Path) -> None:
    """Write the picture of the records of one bench. Raises ConfigError without matplotlib or without numbers."""
    require_matplotlib()
    measured = [record for record in records if record["skipped"] is None]
    if not measured:
        raise ConfigError(f"nothing to draw: every row was skipped, the first one because: {records[0]['skipped']}")
    matplotlib = import_module("matplotlib")
    with matplotlib.rc_context(STYLE):
        matplotlib.use("Agg")
        pyplot = import_module("matplotlib.pyplot")
        figures = {"attention": _attention, "generate": _generate, "matmul": _matmul}
        figure = figures[records[0]["bench"]](pyplot, measured)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
        pyplot.close(figure)


def _generate(pyplot: Any, records: Sequence[Record]) -> Any:
    """Time per token and bytes against context length, a line per cache."""
    first = records[0]
    figure, (time, size) = pyplot.subplots(1, 2, figsize=(_WIDTH, 4.8), layout="constrained")
    _leave_room(figure, 4.8)
    _lines(time, records, lambda r: 1e3 / r["decode_tokens_per_second"])
    time.set_title("Time per decoded token, ms")
    _lines(size, records, lambda r: r["cache_bytes"] / 2**20)
    size.set_title("Bytes of the cache, MiB")
    for axes in (time, size):
        axes.set_xlabel("tokens in the cache")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    _caption(figure, f"{model_name(first)} {first['dtype']}", first)
    return figure


def _lines(axes: Any, records: Sequence[Record], value: Any) -> None:
    caches = list(dict.fromkeys(record["cache"] for record in records))
    colors = _colors(caches)
    ends = {}
    for cache in caches:
        own = sorted((r["context"], value(r)) for r in records if r["cache"] == cache)
        ours = cache.startswith("mikv:")
        axes.plot(
            *zip(*own, strict=True),
            color=colors[cache],
            linewidth=2.6 if ours else 1.7,
            marker="o",
            markersize=5 if ours else 4,
            zorder=3 if ours else 2,
            clip_on=False,
        )
        ends[cache] = own[-1]
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    _label_ends(axes, ends, colors)


def _label_ends(axes: Any, ends: dict[str, tuple[float, float]], colors: dict[str, str]) -> None:
    """The name of every line at its right end, moved apart where they would touch."""
    heights = label_heights({name: y for name, (_, y) in ends.items()}, gap=axes.get_ylim()[1] * 0.06)
    right = max(x for x, _ in ends.values())
    for name, y in heights.items():
        end = ends[name]
        style = {"color": colors[name], "va": "center", "fontsize": 9, "annotation_clip": False}
        style |= {"fontweight": "bold"} if name.startswith("mikv:") else {}
        arrow = {"arrowstyle": "-", "color": colors[name], "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4}
        axes.annotate(name, end, (right * 1.05, y), arrowprops=arrow, **style)


def label_heights(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The same heights, but `gap` apart: neighbours that touch become a group around their common middle."""
    groups: list[tuple[float, list[str]]] = []  # middle and names, from below
    for name in sorted(heights, key=lambda name: heights[name]):
        groups.append((heights[name], [name]))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (len(groups[-1][1]) + len(groups[-2][1])) / 2:
            (middle, names), (above, more) = groups[-2:]
            weighted = (middle * len(names) + above * len(more)) / (len(names) + len(more))
            groups[-2:] = [(max(weighted, gap * (len(names) + len(more) - 1) / 2), names + more)]
    return {name: middle + gap * (i - (len(names) - 1) / 2) for middle, names in groups for i, name in enumerate(names)}


def _attention(pyplot: Any, records: Sequence[Record]) -> Any:
    """Share of the memory's speed, and time, a bar per kernel."""
    first, shape = records[0], records[0]["shape"]
    names = [kernel_name(record) for record in records]
    colors = [_COLORS["mikv"][0] if record["kernel"] == "mikv" else _PALE for record in records]
    rows = range(len(records))
    height = 1.9 + 0.36 * len(records)
    figure, (share, time) = pyplot.subplots(1, 2, figsize=(_WIDTH, height), sharey=True, layout="constrained")
    _leave_room(figure, height)

    share.barh(rows, [100 * record["bandwidth_share"] for record in records], color=colors, height=0.66)
    share.set_title("Share of memory's reading speed, %")
    share.set_xlim(0, max(100, *(115 * record["bandwidth_share"] for record in records)))
    share.axvline(100, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    for row, record in zip(rows, records, strict=True):
        text = f"{100 * record['bandwidth_share']:.1f} %  ({record['gbps']:.2g} GB/s)"
        _beside(share, 100 * record["bandwidth_share"], row, text)
    share.set_yticks(rows, names)
    share.invert_yaxis()

    steps = [record["ms"] for record in records]
    ideal = first["ms"] * first["ideal_fp16_speedup"]
    time.scatter(steps, rows, color=colors, s=70, zorder=3)
    time.set_xscale("log")
    time.set_xlim(min(*steps, ideal) / 2, max(*steps, ideal) * 4)
    time.hlines(rows, time.get_xlim()[0], steps, color="#d0d7de", linewidth=1.2)
    time.axvline(ideal, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    time.annotate(
        f"fp16 at reading speed, {milliseconds(ideal)} ms", (ideal, 1), (0, 4), xycoords=("data", "axes fraction"),
        textcoords="offset points", fontsize=8, color=_INK, va="bottom", ha="center",
    )  # fmt: skip
    time.set_title("Time of one step, ms", pad=18)
    share.set_title(share.get_title(loc="left"), pad=18)
    for row, ms in zip(rows, steps, strict=True):
        _beside(time, ms, row, milliseconds(ms), distance=9)
    time.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    time.xaxis.set_minor_formatter(lambda x, _: "")
    for axes in (share, time):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    tokens = f"{shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}, {shape['tokens']:,} tokens"
    _caption(figure, tokens + (f", batch {shape['batch']}" if shape["batch"] > 1 else ""), first)
    return figure


def _matmul(pyplot: Any, records: Sequence[Record]) -> Any:
    """Share of the memory's speed with the fewest rows, and how many times PyTorch's speed with each number of rows."""
    first, shape = records[0], records[0]["shape"]
    counts = sorted({record["rows"] for record in records})
    fewest = [record for record in records if record["rows"] == counts[0]]
    names = [kernel_name(record) for record in fewest]
    colors = [_COLORS["mikv"][0] if record["kernel"].startswith("mikv") else _PALE for record in fewest]
    height = 1.9 + 0.3 * len(names)
    figure, (share, speed) = pyplot.subplots(1, 2, figsize=(_WIDTH, height), sharey=True, layout="constrained")
    _leave_room(figure, height)

    share.barh(range(len(names)), [100 * record["bandwidth_share"] for record in fewest], color=colors, height=0.66)
    share.set_title(f"Share of memory's reading speed, %, rows: {counts[0]}")
    share.set_xlim(0, max(100, *(135 * record["bandwidth_share"] for record in fewest)))
    share.axvline(100, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    for row, record in enumerate(fewest):
        text = f"{100 * record['bandwidth_share']:.0f} %  ({record['ms_cold']:.2f} ms)"
        _beside(share, 100 * record["bandwidth_share"], row, text)
    share.set_yticks(range(len(names)), names)
    share.invert_yaxis()

    sizes = [90 / (1 + i) for i in range(len(counts))]
    for count, size in zip(counts, sizes, strict=True):
        own = [record for record in records if record["rows"] == count]
        places = [names.index(kernel_name(record)) for record in own]
        style = {"color": [colors[place] for place in places], "s": size, "zorder": 3, "alpha": 0.85}
        speed.scatter([record["speedup_cold"] for record in own], places, **style)
        speed.scatter([], [], color=_INK, s=size, label=f"{count}")
    speed.set_xscale("log")
    speed.axvline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    speed.set_title("Times as fast as PyTorch in float32")
    speed.legend(title="rows", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    speed.grid(axis="x")
    speed.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    speed.xaxis.set_minor_formatter(lambda x, _: "")
    for axes in (share, speed):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    _caption(figure, f"{shape['m']:,}×{shape['k']:,}, groups of {shape['group_size']}, from memory", first)
    return figure


def _beside(axes: Any, x: float, row: int, text: str, distance: int = 5) -> None:
    place = {"xytext": (distance, 0), "textcoords": "offset points", "va": "center"}
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # dashed lines stay off the text
    axes.annotate(text, (x, row), fontsize=8.5, color=_INK, bbox=box, **place)


def _colors(caches: Sequence[str]) -> dict[str, str]:
    """A color per cache: kinds have theirs, from dark to light if there are several of a kind."""
    used = dict.fromkeys(_COLORS, 0)
    colors = {}
    for cache in caches:
        kind = next((kind for kind in _COLORS if cache.startswith(kind)), None)
        shades = _COLORS[kind] if kind else (_PALE,)
        colors[cache] = shades[(used[kind] if kind else 0) % len(shades)]
        if kind:
            used[kind] += 1
    return colors


def _leave_room(figure: Any, height: float) -> None:
    """For the caption, at the foot of a figure of `height` inches."""
    share = _CAPTION_HEIGHT / height
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share), wspace=0.07)


def _caption(figure: Any, what: str, record: Record) -> None:
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    where = f"{what} · {threads} · {record['hardware']} · kernels: {record['isa']}"
    command = fill(record["command"], 175, break_on_hyphens=False, subsequent_indent="    ")
    figure.text(0.008, 0.012, f"{where}\n{command}", fontsize=7.5, color=_PALE, va="bottom", linespacing=1.5)
