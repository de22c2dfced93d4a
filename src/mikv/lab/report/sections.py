"""The parts of the page that need no script: HTML of the summary, the tables, the heat maps and the circumstances."""

from collections import Counter
from collections.abc import Collection, Sequence
from html import escape

from mikv.lab.report.curves import BUDGETS, Point, best_within, compared, cost, overview
from mikv.lab.report.families import FAMILIES, OTHER
from mikv.lab.report.needles import NeedleMap, needle_maps
from mikv.lab.report.records import EvalRecords, short_names
from mikv.lab.report.tables import COLUMNS, MISSING, Column, divergence, family_name, method_name, percent
from mikv.records import Record


def family_style() -> str:
    """The colors of families as CSS variables, for light and dark."""
    families = (*FAMILIES, OTHER)
    light, dark = (
        "".join(f"--family-{i}:{getattr(family, theme)};" for i, family in enumerate(families))
        for theme in ("light", "dark")
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def cache_name(cache: str, family: str, method: str) -> str:
    """A cache with its method's sign before it."""
    return f'<span class="cache">{_sign(family, method)} {escape(cache)}</span>'


def legend(drawn: Collection[tuple[str, str]]) -> str:
    """A switch per family that is drawn, with the signs of its methods."""
    buttons = []
    for family in (*FAMILIES, OTHER):
        methods = [one.name for one in family.methods if (family.name, one.name) in drawn]
        if methods:
            words = " ".join(f"{_sign(family.name, name)} {escape(name)}" for name in methods)
            buttons.append(
                f'<button type="button" class="chip" aria-pressed="true" data-family="{escape(family.name)}">'
                f"{words}</button>"
            )
    return "".join(buttons)


def summary(found: EvalRecords) -> str:
    """Per model and budget, the cache closest to the full one and the closest of another family."""
    names = short_names(found.models)
    heads = "".join(f"<th scope=col>{_budget(budget)}</th>" for budget in BUDGETS)
    rows = []
    for model in found.models:
        panel = overview([record for record in found.measured if record["model"] == model]).kl
        own = () if panel is None else panel.points
        cells = "".join(
            f'<td data-label="{_budget(budget)}">{_winners(best_within(compared(own), budget, cost))}</td>'
            for budget in BUDGETS
        )
        extent = "" if panel is None else f"<br><small>{escape(panel.extent)}</small>"
        rows.append(f"<tr><th scope=row>{escape(names[model])}{extent}</th>{cells}</tr>")
    return f'<table class="summary"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def records_table(found: EvalRecords) -> str:
    """All records; scripts sort and filter it."""
    columns, names = _used_columns(found.measured), short_names(found.models)
    head = "".join(
        f'<th scope=col aria-sort=none class="{"number" if column.is_number else "name"}">'
        f'<button type=button title="{escape(column.meaning)}">{escape(column.title)}</button></th>'
        for column in columns
    )
    rows = "".join(_row(record, columns, names) for record in found.measured)
    return f'<table id="records"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def filters(found: EvalRecords) -> str:
    """A menu for every name that differs between records."""
    names = short_names(found.models)
    menus = {
        "model": {model: names[model] for model in found.models},
        "task": {record["task"]: record["task"] for record in found.measured},
        "family": {name: name for name in dict.fromkeys(map(family_name, found.measured))},
    }
    return "".join(_menu(key, choices) for key, choices in menus.items() if len(choices) > 1)


def meanings(found: EvalRecords) -> str:
    """One line for each number."""
    return "".join(
        f"<dt>{escape(column.title)}</dt><dd>{escape(column.meaning)}</dd>" for column in _used_columns(found.measured)
    )


def heat_maps(found: EvalRecords) -> str:
    """The needle maps of every model and task, smallest cache first; nothing if there are none."""
    maps = needle_maps(found.measured)
    names = short_names(found.models)
    groups: dict[tuple[str, str], list[NeedleMap]] = {}
    for one in maps:
        groups.setdefault((one.model, one.task), []).append(one)
    return "".join(
        f'<h3>{escape(names[model])} <small>{escape(task)}</small></h3><div class="needles">'
        + "".join(map(_heat_map, sorted(own, key=lambda one: one.ratio)))
        + "</div>"
        for (model, task), own in groups.items()
    )


def skipped(found: EvalRecords) -> str:
    """Caches that could not be measured, each reason once."""
    names = short_names(found.models)
    count = Counter((record["cache"], names[record["model"]], record["skipped"]) for record in found.skipped)
    return "".join(
        f"<li>{escape(cache)} on {escape(model)}: {escape(str(reason))} <small>{_count(n, 'task')}</small></li>"
        for (cache, model, reason), n in count.items()
    )


def circumstances(found: EvalRecords) -> str:
    """Hardware and versions with the number of records, and the commands."""
    machines = Counter(_machine(record) for record in found.records)
    commands = dict.fromkeys(record["command"] for record in found.records)
    lines = "".join(f"<li>{escape(line)} <small>{_count(n, 'record')}</small></li>" for line, n in machines.items())
    listed = f"<summary>{_count(len(commands), 'command')}</summary><pre>{escape(chr(10).join(commands))}</pre>"
    return f"<ul>{lines}</ul><details{' open' if len(commands) < 4 else ''}>{listed}</details>"


def _sign(family: str, method: str) -> str:
    families = (*FAMILIES, OTHER)
    index = [one.name for one in families].index(family)
    glyph = next(one.glyph for one in families[index].methods if one.name == method)
    return f'<i class="sign" style="color:var(--family-{index})">{glyph}</i>'


def _budget(budget: float) -> str:
    return f"≤ {100 * budget:.0f} % of fp16"


def _winners(best: Sequence[Point]) -> str:
    if not best:
        return MISSING
    lines = [f"<b>{divergence(best[0].kl or 0)}</b> {cache_name(best[0].cache, best[0].family, best[0].method)}"]
    lines += [
        f"<small>then {divergence(p.kl or 0)} {cache_name(p.cache, p.family, p.method)}</small>" for p in best[1:]
    ]
    return "<br>".join(lines)


def _used_columns(records: Sequence[Record]) -> list[Column]:
    """Those that at least one record has a value for; the model only if there are several."""
    used = [column for column in COLUMNS if any(record[column.key] is not None for record in records)]
    one_model = len({record["model"] for record in records}) == 1
    return [column for column in used if not (one_model and column.key == "model")]


def _row(record: Record, columns: Sequence[Column], names: dict[str, str]) -> str:
    shown = {**record, "model": names[record["model"]]}
    cells = []
    for column in columns:
        text = escape(column.text(shown))
        if column.key == "cache":
            text = cache_name(record["cache"], family_name(record), method_name(record))
        kind = "number" if column.is_number else "name"
        cells.append(f'<td class="{kind}" data-sort="{escape(column.sort_value(shown))}">{text}</td>')
    keys = {"model": record["model"], "task": record["task"], "family": family_name(record)}
    data = " ".join(f'data-{key}="{escape(value)}"' for key, value in keys.items())
    return f"<tr {data}>{''.join(cells)}</tr>"


def _menu(key: str, choices: dict[str, str]) -> str:
    options = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in choices.items())
    return f'<label>{key} <select data-filter="{key}"><option value="">all</option>{options}</select></label>'


def _heat_map(one: NeedleMap) -> str:
    head = "".join(f"<th scope=col>{_length(length)}</th>" for length in one.lengths)
    rows = []
    for depth in one.depths:
        cells = []
        for length in one.lengths:
            score, count = one.cells.get((depth, length), (None, 0))
            if score is None:
                cells.append("<td></td>")
                continue
            title = f"{depth:.0%} deep in {length:,.0f} tokens: {score:.2f}, {_count(count, 'sample')}"
            cells.append(f'<td style="--score:{score:.3f}" title="{title}">{100 * score:.0f}</td>')
        rows.append(f"<tr><th scope=row>{depth:.0%}</th>{''.join(cells)}</tr>")
    caption = f"{cache_name(one.cache, one.family, one.method)} <small>{percent(one.ratio)}</small>"
    return (
        f'<table class="needle"><caption>{caption}</caption><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _length(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens % 512 == 0 and tokens >= 1024 else f"{tokens:,.0f}"


def _machine(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    threads = _count(record["threads"], "thread")
    return f"{record['hardware']}, {threads}; kernels: {record['isa']}; {versions}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
