"""`mikv plan`: what a deployment will take, for one choice of weights and cache or several side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mikv.cli import terminal
from mikv.errors import ConfigError

if TYPE_CHECKING:
    from mikv.plan.plan import Plan

_GAP = 2  # between two columns


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="A named shape (opt-175b, llama-3-8b), a config.json, a folder, a .gguf file or a hub id."),
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="a100-80, h100, ... or this: this machine, measured for a second.")
    ] = "this",
    gpus: Annotated[int | None, typer.Option(help="Devices; the fewest that have room if not given.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="fp16, int4, bcq3, ... or bits per weight (3.375); the model's own if not given."),
    ] = None,
    group_size: Annotated[
        str | None, typer.Option(help="Columns that share scales, or row; the model's own if not given, else 128.")
    ] = None,
    cache: Annotated[str, typer.Option(help="full, balanced, small, lossless, fp8, ... or bits per number.")] = "full",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 2048,
    compare: Annotated[
        str | None, typer.Option(help="Options side by side, each WEIGHTS or WEIGHTS+CACHE: fp16,bcq3+balanced.")
    ] = None,
    quantize_embeddings: Annotated[
        bool, typer.Option("--quantize-embeddings", help="Token embedding and output head are quantized, too.")
    ] = False,
    efficiency: Annotated[
        str | None, typer.Option(help="Constants in place of those of --constants: lut=0.7,layer_us=80.")
    ] = None,
    watts: Annotated[float | None, typer.Option(help="Design power of a device, in place of the table's.")] = None,
    claims: Annotated[
        bool, typer.Option("--claims", help="Take nuQmm's 14.4x and 93 % apart, and compare with LUT-GEMM's tables.")
    ] = False,
    constants: Annotated[bool, typer.Option("--constants", help="List what is assumed, with sources.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw time against batch, and memory, into this .png file.")] = None,
) -> None:
    """Estimate memory, devices, time and energy per token of a model on some hardware."""
    _require_plot(plot)
    if claims:
        _show_claims(model, plot, as_json)
        return
    if model is None:
        raise ConfigError("MODEL is missing; for example mikv plan opt-175b --hardware a100-80 --compare fp16,bcq3")
    from mikv.plan.options import Request

    request = Request(
        model=model,
        hardware=hardware,
        gpus=gpus,
        weights=weights,
        group_size=group_size,
        cache=cache,
        batch=batch,
        context=context,
        compare=compare,
        quantize_embeddings=quantize_embeddings,
        efficiency=efficiency,
        watts=watts,
    )
    plans = request.plans()
    facts = request.facts(plans[0].deployment.hardware)
    if plot is not None:
        from mikv.plan.plots import draw

        draw(plans, plot)
    if as_json:
        typer.echo(json.dumps(facts | {"rows": [one.to_dict() for one in plans]}))
    else:
        _print(facts, plans, constants)


def _require_plot(plot: Path | None) -> None:
    if plot is None:
        return
    from mikv.bench.plots import require_matplotlib
    from mikv.records import require_writable

    require_writable(plot, ".png", "--plot")
    require_matplotlib()


def _print(facts: Mapping[str, Any], plans: Sequence["Plan"], with_constants: bool) -> None:
    """The devices, a column per plan, notes, constants."""
    from mikv.plan.tables import plan_rows

    console = terminal.console()
    console.print(
        f"{facts['model']} on {facts['device']}: {facts['memory_bytes_per_gpu'] / 2**30:.0f} GiB, "
        f"{facts['gbps']:,.0f} GB/s, {facts['tflops']:.3g} TFLOPS\n"
        f"batch {facts['batch']}, {facts['context']:,} tokens each; every number is an estimate",
        markup=False,
    )
    columns, rows = ("", *(one.name for one in plans)), plan_rows(plans)
    for part in _parts(columns, rows, console.width):
        console.print(_table([columns[i] for i in part], [[row[i] for i in part] for row in rows]))
    for note in dict.fromkeys(note for one in plans for note in one.notes()):
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    if with_constants:
        console.print(_constants_table(facts["constants"]))
    else:
        console.print("--constants lists what is assumed, with sources; --efficiency changes it", style="dim")


def _parts(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Which columns stand side by side in `width` characters; the first one, of names, stands in each part."""
    widths = [max(map(len, (column, *(row[i] for row in rows)))) for i, column in enumerate(columns)]
    parts: list[list[int]] = []
    for i, own in enumerate(widths[1:], 1):
        if not parts or sum(widths[j] + _GAP for j in parts[-1]) + own > width:
            parts.append([0])
        parts[-1].append(i)
    return parts


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """The first column to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _constants_table(constants: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("constant", "value", "unit", "source", box=None, pad_edge=False)
    for name, constant in constants.items():
        table.add_row(name, f"{constant['value']:g}", constant["unit"], constant["source"])
    return table


def _show_claims(model: str | None, plot: Path | None, as_json: bool) -> None:
    if model is not None or plot is not None:
        raise ConfigError("--claims is about GPT-3 175B and OPT-175B on A100-80; leave MODEL and --plot out")
    from mikv.plan.claims import comparisons, findings
    from mikv.plan.published import published_rows
    from mikv.plan.tables import claim_record, claim_table, published_record, published_table

    found, published = comparisons(), published_rows()
    if as_json:
        records = [claim_record(one) for one in found] + [published_record(row) for row in published]
        typer.echo(json.dumps({"estimate": True, "rows": records, "findings": findings(found)}))
        return
    console = terminal.console()
    console.print(_table(*claim_table(found), "nuQmm's claim, GPT-3 175B on A100-80: how many times less"))
    for finding in findings(found):
        console.print(f"- {finding}", markup=False)
    console.print(_table(*published_table(published), "LUT-GEMM's tables, ms per token on A100-80"))
