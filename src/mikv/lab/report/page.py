"""One HTML file out of records and a precision map: markup, style, data, scripts and plotly, nothing to be fetched."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from html import escape
from importlib import import_module
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from mikv.cache_names import is_installed
from mikv.errors import ConfigError
from mikv.lab.report import sections
from mikv.lab.report.curves import (
    OVERVIEW,
    View,
    compared,
    cost,
    full_cache,
    negative_score,
    of_task,
    overview,
    pareto_front,
)
from mikv.lab.report.families import FAMILIES, OTHER
from mikv.lab.report.records import EvalRecords, short_names

if TYPE_CHECKING:
    from mikv.lab.precision_map import PrecisionMap

_PAGE = files("mikv.lab.report") / "page"
_SCRIPTS = ("theme.js", "charts.js", "table.js", "precision_map.js")


def require_plotly() -> None:
    """Raise ConfigError if the page's charts cannot be written."""
    if not is_installed("plotly"):
        raise ConfigError("the page needs plotly: pip install 'mikv[report]'")


def page(found: EvalRecords, map_of: "PrecisionMap | None", sources: Sequence[str], day: date) -> str:
    """The page. `sources` are the names of the files that the records come from, `day` is when it is written."""
    require_plotly()
    curves = [_model_curves(found, model) for model in found.models]
    drawn = [point for model in curves for task in model["tasks"].values() for point in task["points"]]
    data = {
        "curves": curves,
        "families": [asdict(family) for family in (*FAMILIES, OTHER)],
        "map": None if map_of is None else map_of.to_dict(),
    }
    return Template(_read("page.html")).substitute(
        style=sections.family_style() + _read("page.css"),
        intro=_intro(found, sources, day),
        summary=sections.summary(found),
        legend=sections.legend({(point["family"], point["method"]) for point in drawn}),
        tasks="".join(_option(task) for task in curves[0]["tasks"]),
        no_charts="" if drawn else "hidden",
        task_menu="" if len(curves[0]["tasks"]) > 1 else "hidden",
        charts="".join(_charts(index, model) for index, model in enumerate(curves)),
        filters=sections.filters(found),
        table=sections.records_table(found),
        meanings=sections.meanings(found),
        circumstances=sections.circumstances(found),
        data=_embed(data),
        plotly=import_module("plotly.offline").get_plotlyjs(),
        scripts="\n".join(f"(() => {{\n{_read(name)}\n}})();" for name in _SCRIPTS),
        needles=sections.heat_maps(found),
        no_needles="" if sections.heat_maps(found) else "hidden",
        skipped=sections.skipped(found),
        no_skipped="" if found.skipped else "hidden",
        no_map="" if map_of is not None else "hidden",
    )


def _model_curves(found: EvalRecords, model: str) -> dict[str, Any]:
    """Points and fronts of a model: where the most caches were measured, then for each task."""
    own = [record for record in found.measured if record["model"] == model]
    tasks = list(dict.fromkeys(record["task"] for record in found.measured))
    views = {OVERVIEW: overview(own)} if len(tasks) != 1 else {}
    return {
        "name": short_names(found.models)[model],
        "tasks": {name: _view(view) for name, view in (views | {task: of_task(own, task) for task in tasks}).items()},
    }


def _view(view: View) -> dict[str, Any]:
    """A point per cache and chart; where both charts are of the same tasks, a point has both numbers."""
    panels = {"score": view.score, "kl": view.kl}
    if view.score is not None and view.kl is not None and view.score.tasks == view.kl.tasks:
        shown = [asdict(point) for point in compared(view.kl.points)]
    else:
        shown = [
            asdict(point) | dict.fromkeys(("kl", "kl_stderr") if value == "score" else ("score", "score_stderr"))
            for value, panel in panels.items()
            for point in compared(panel.points if panel is not None else ())
        ]
    full = full_cache(view.score.points) if view.score is not None else None
    fronts = {"score": negative_score, "kl": cost}
    return {
        "points": shown,
        "full_score": None if full is None else full.score,
        "extents": {value: None if panel is None else panel.extent for value, panel in panels.items()},
        "fronts": {
            value: [] if panel is None else [p.cache for p in pareto_front(compared(panel.points), fronts[value])]
            for value, panel in panels.items()
        },
    }


def _charts(index: int, model: dict[str, Any]) -> str:
    """The model's charts; none of numbers that no record has."""
    titles = {"score": "Score", "kl": "KL to the full cache, nats"}
    charts = "".join(
        f'<figure><figcaption><b>{title}</b><span class="reference"></span><small class="extent"></small></figcaption>'
        f'<div class="chart" data-model="{index}" data-value="{value}"></div></figure>'
        for value, title in titles.items()
        if any(point[value] is not None for view in model["tasks"].values() for point in view["points"])
    )
    return f'<h3>{escape(model["name"])}</h3><div class="pair">{charts}</div>' if charts else ""


def _option(task: str) -> str:
    words = "overview: what most caches were measured on" if task == OVERVIEW else task
    return f'<option value="{escape(task)}">{escape(words)}</option>'


def _intro(found: EvalRecords, sources: Sequence[str], day: date) -> str:
    caches = {record["cache"] for record in found.records}
    tasks = {record["task"] for record in found.records}
    counts = {"cache": len(caches), "model": len(found.models), "task": len(tasks), "record": len(found.records)}
    line = ", ".join(f"{number:,} {what}{'' if number == 1 else 's'}" for what, number in counts.items())
    line += f" · {escape(', '.join(sources))} · {day.day} {day:%B %Y}"
    if found.ignored:
        line += f" · {found.ignored:,} lines of other kinds left aside"
    if found.replaced:
        line += f" · {found.replaced:,} repeated cells, of which the last counts"
    return line


def _embed(data: Any) -> str:
    """JSON that cannot end the script element it stands in; numbers that are none become null."""
    return json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")
