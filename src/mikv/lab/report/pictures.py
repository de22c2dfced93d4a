"""PNGs of the curves and of the precision map, for where HTML is not shown; matplotlib is imported only here."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Any

from mikv.bench.plots import STYLE
from mikv.cache_names import is_installed
from mikv.errors import ConfigError
from mikv.lab.precision_map import PrecisionMap
from mikv.lab.report.curves import (
    Panel,
    Point,
    Value,
    compared,
    cost,
    full_cache,
    negative_score,
    overview,
    pareto_front,
)
from mikv.lab.report.families import FAMILIES, FULL, MIKV, OTHER
from mikv.lab.report.labels import Label, label_points
from mikv.lab.report.records import EvalRecords, short_names

MAP_FILE = "precision-map.png"
_PALE = "#6e7781"
_HIGH, _KEPT = (0x12, 0xA6, 0x7C), (0x5B, 0x8D, 0xEF)
_STYLE = STYLE | {"axes.edgecolor": _PALE, "axes.grid": True, "axes.axisbelow": True}
_SHARES = (0.1, 0.15, 0.2, 0.25, 0.33, 0.5, 0.75, 1.0)
_LEAST_KL = 1e-6  # a logarithmic axis has no 0
_WIDTH, _COLUMNS, _LINE = 10.6, 116, 0.215  # inches, characters, inches
_FONT_SIZE = _WIDTH * 72 / (_COLUMNS + 4) / 0.602  # a character of DejaVu Sans Mono is so many ems wide


def require_matplotlib() -> None:
    """Raise ConfigError if there is nothing to draw with."""
    if not is_installed("matplotlib"):
        raise ConfigError("--png needs matplotlib: pip install 'mikv[report]'")


def picture_files(found: EvalRecords, with_map: bool, folder: Path) -> list[Path]:
    """What `draw` will write: the curves of each model, and the precision map."""
    names = [f"curves-{name.replace('/', '-')}.png" for name in short_names(found.models).values()]
    return [folder / name for name in (*names, *([MAP_FILE] if with_map else []))]


def draw(found: EvalRecords, map_of: PrecisionMap | None, folder: Path) -> list[Path]:
    """Write the pictures into `folder`, which is made if it is not there. Raises ConfigError without matplotlib."""
    require_matplotlib()
    files = picture_files(found, map_of is not None, folder)
    folder.mkdir(exist_ok=True)
    matplotlib = import_module("matplotlib")
    with matplotlib.rc_context(_STYLE):
        matplotlib.use("Agg")
        pyplot = import_module("matplotlib.pyplot")
        figures = [_curves(pyplot, found, model) for model in found.models]
        if map_of is not None:
            figures.append(_tokens(pyplot, map_of))
        for figure, file in zip(figures, files, strict=True):
            figure.savefig(file, dpi=160, facecolor="white", metadata={"Software": None})
            pyplot.close(figure)
    return files


def _curves(pyplot: Any, found: EvalRecords, model: str) -> Any:
    """The two charts with which the page opens."""
    view = overview([record for record in found.measured if record["model"] == model])
    panels = [(draw, panel) for draw, panel in ((_draw_scores, view.score), (_draw_kl, view.kl)) if panel is not None]
    width = _WIDTH * max(1, len(panels)) / 2
    height = 6.4 if panels else 0.6
    figure = pyplot.figure(figsize=(width, height), layout="constrained")
    name = short_names(found.models)[model].encode("utf-8", "replace").decode()
    figure.suptitle(name if panels else f"{name}: nothing was measured", x=0.008, ha="left", fontweight="bold")
    for number, (draw_panel, panel) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        _byte_axis(axes, [point.ratio for point in compared(panel.points)])
        title = draw_panel(axes, panel)
        axes.set_title(f"{title}\n{fill(panel.extent, 62)}", fontsize=9.5)
    legend: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if legend:
        style = {"ncols": min(len(legend), 3 * len(panels)), "frameon": False, "fontsize": 9}
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", **style)
    return figure


def _draw_scores(axes: Any, panel: Panel) -> str:
    """Returns what is drawn."""
    shown, full = compared(panel.points), full_cache(panel.points)
    _scatter(axes, shown, lambda point: point.score, lambda point: point.score_stderr)
    _front(axes, pareto_front(shown, negative_score), lambda point: point.score)
    if full is not None and full.score is not None:
        axes.axhline(full.score, color=FULL.light, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    label_points(axes, _labels(shown, lambda point: point.score))
    return "Score ± standard error, higher is better; dashed: full cache"


def _draw_kl(axes: Any, panel: Panel) -> str:
    """Returns what is drawn."""
    shown = compared(panel.points)
    axes.set_yscale("log")
    _scatter(axes, shown, _visible_kl, lambda point: point.kl_stderr)
    _front(axes, pareto_front(shown, cost), _visible_kl)
    label_points(axes, _labels(shown, _visible_kl))
    return "KL to the full cache ± standard error, nats, lower is better"


def _visible_kl(point: Point) -> float | None:
    return None if point.kl is None else max(point.kl, _LEAST_KL)


def _scatter(axes: Any, shown: Sequence[Point], value: Value, error: Value) -> None:
    """A point per cache with the error of its mean; methods in the legend."""
    for family in (*FAMILIES, OTHER):
        for method in family.methods:
            own = [point for point in shown if (point.family, point.method) == (family.name, method.name)]
            drawn = [(point.ratio, y, error(point) or 0.0) for point in own if (y := value(point)) is not None]
            if not drawn:
                continue
            x, heights, errors = ([one[place] for one in drawn] for place in range(3))
            # a logarithmic axis has no 0
            down = [min(one, 0.9 * at) for at, one in zip(heights, errors, strict=True)] if _is_log(axes) else errors
            above = 5 if family is MIKV else 4
            axes.errorbar(x, heights, (down, errors), fmt="none", ecolor=family.light, elinewidth=1, zorder=above - 1)
            style = {"color": family.light, "marker": method.marker, "edgecolors": "white", "linewidths": 0.6}
            axes.scatter(
                x,
                heights,
                s=80 if family is MIKV or method.marker == "*" else 58,
                zorder=above,
                label=method.name,
                **style,
            )


def _is_log(axes: Any) -> bool:
    return bool(axes.get_yscale() == "log")


def _front(axes: Any, front: Sequence[Point], value: Value) -> None:
    line = [(point.ratio, y) for point in front if (y := value(point)) is not None]
    if line:
        axes.plot(*zip(*line, strict=True), color=_PALE, linewidth=1, linestyle=":", drawstyle="steps-post", zorder=2)


def _labels(shown: Sequence[Point], value: Value) -> list[Label]:
    """Names at points; those of many settings are too long, and the legend has their sign."""
    families = {family.name: family for family in (*FAMILIES, OTHER)}
    return [
        Label(
            "" if "+" in point.cache else point.cache.removeprefix("mikv:"),
            (point.ratio, y),
            families[point.family].light,
            is_bold=point.family == MIKV.name,
        )
        for point in shown
        if (y := value(point)) is not None
    ]


def _byte_axis(axes: Any, ratios: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(_SHARES, [f"{100 * share:.0f} %" for share in _SHARES])
    if ratios:
        axes.set_xlim(min(ratios) * 0.85, max(ratios) * 1.2)
    axes.minorticks_off()
    axes.set_xlabel("bytes, share of fp16")


def _tokens(pyplot: Any, map_of: PrecisionMap) -> Any:
    """The text, each token on a ground as strong as the share of layers and heads that keep it high."""
    rows = _rows(map_of.texts)
    height = _LINE * (len(rows) + 4)
    figure = pyplot.figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-2, _COLUMNS + 2), ylim=(len(rows) + 1.2, -2.8))
    axes.axis("off")
    shares, always_kept = map_of.share_high().tolist(), map_of.always_kept()
    can_draw = _drawable()
    for row, pieces in enumerate(rows):
        for column, index, piece in pieces:
            color = _KEPT if always_kept[index] else _HIGH
            _box(pyplot, axes, (column, row), len(piece), _on_white(color, _strength(shares[index])))
            words = "".join(sign if can_draw(sign) else "□" for sign in piece)
            axes.text(column, row + 0.5, words, family="DejaVu Sans Mono", fontsize=_FONT_SIZE, va="center")
    combinations = sum(layer.high.shape[0] for layer in map_of.layers)
    axes.text(
        0, -1.6, f"In the high tier of none (white) to all (green) of the {combinations} layers × heads; "
        "blue: sinks and the newest tokens, which never leave it", fontsize=9.5, va="center", color=_PALE,
    )  # fmt: skip
    return figure


def _rows(texts: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """Pieces of tokens (column, token, text) by row: broken at newlines, and where a row is full."""
    rows: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for index, text in enumerate(texts):
        for number, part in enumerate(text.split("\n")):
            if number:
                rows.append([])
                column = 0
            if column and column + len(part) > _COLUMNS:
                rows.append([])
                column, part = 0, part.lstrip()
            for start in range(0, len(part), _COLUMNS):
                if start:
                    rows.append([])
                piece = part[start : start + _COLUMNS]
                rows[-1].append((column if not start else 0, index, piece))
                column = (column if not start else 0) + len(piece)
    return rows


def _box(pyplot: Any, axes: Any, place: tuple[int, int], width: int, color: tuple[float, ...]) -> None:
    axes.add_patch(pyplot.Rectangle((place[0], place[1] + 0.06), width - 0.08, 0.88, color=color, linewidth=0))


def _strength(share: float) -> float:
    """As on the page: what is kept anywhere is seen to be, and the root makes visible what few heads keep."""
    return 0.15 + 0.85 * share**0.5 if share else 0.0


def _on_white(color: tuple[int, int, int], strength: float) -> tuple[float, ...]:
    return tuple(1 - strength * (1 - channel / 255) for channel in color)


def _drawable() -> Callable[[str], bool]:
    """Whether the font has a character."""
    manager = import_module("matplotlib.font_manager")
    font = manager.get_font(manager.findfont("DejaVu Sans Mono"))
    return lambda sign: bool(font.get_char_index(ord(sign)))
