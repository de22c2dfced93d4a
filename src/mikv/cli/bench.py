"""`mikv bench`: how fast attention and products with weights are, how fast a model decodes, and pictures of them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mikv.cache.config import PRESETS
from mikv.cache_names import spellings, split_names
from mikv.cli.options import ModelOption
from mikv.cli.terminal import console, spinner
from mikv.models import BUNDLED_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable

    from mikv.bench.pages import Page

bench = typer.Typer(name="bench", no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads to compute with; as many as PyTorch takes if not given.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Write the rows as JSON lines to this .jsonl file, and their table as .md beside it."),
]
PlotOption = Annotated[Path | None, typer.Option(help="Draw the result into this .png file.")]


@bench.callback()
def _bench() -> None:
    """Measure attention kernels, products with weights, and models that decode with one cache or another."""


@bench.command()
def attention(
    tokens: Annotated[int, typer.Option(help="Tokens in the cache of each row.")] = 32768,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads; they divide the query heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    preset: Annotated[str, typer.Option(help=f"mikv's cache: {', '.join(PRESETS)}.")] = "balanced",
    threads: ThreadsOption = None,
    seconds: Annotated[float, typer.Option(help="Seconds of attention per kernel.")] = 3.0,
    steps: Annotated[
        int,
        typer.Option(help="Also run this many whole steps per layer: what appending and demotion add."),
    ] = 0,
    as_json: JsonOption = False,
    out: OutOption = None,
    plot: PlotOption = None,
) -> None:
    """Time one decode step's attention over caches that must come from memory."""
    from mikv.bench import machine
    from mikv.bench.attention import Effort, run
    from mikv.bench.tokens import AttentionShape

    _require_destinations(out, plot)
    shape, effort = AttentionShape(tokens, heads, kv_heads, head_dim, batch), Effort(seconds, steps)
    options: dict[str, Any] = {
        "tokens": tokens,
        "heads": heads,
        "kv-heads": kv_heads,
        "head-dim": head_dim,
        "batch": batch,
    }
    options |= {"preset": preset, "threads": threads, "seconds": f"{seconds:g}", "steps": steps or None}
    with machine.threads(threads), _spinner(as_json) as show:
        facts = machine.circumstances(machine.command_line("attention", options))
        result = facts | run(shape, preset, effort, show)
    _present("attention", result, as_json, out, plot)


@bench.command()
def matmul(
    m: Annotated[int, typer.Option(help="Outputs: rows of the weights.")] = 4096,
    k: Annotated[int, typer.Option(help="Inputs: columns of the weights.")] = 4096,
    rows: Annotated[str, typer.Option(help="Rows of activations, separated by commas.")] = "1,4,8,128",
    bits: Annotated[str, typer.Option(help="Bits of the weights, separated by commas.")] = "2,3,4",
    group_size: Annotated[int, typer.Option(help="Inputs that share scales; all of them if there are fewer.")] = 128,
    threads: ThreadsOption = None,
    seconds: Annotated[float, typer.Option(help="Seconds per kernel and number of rows.")] = 1.0,
    as_json: JsonOption = False,
    out: OutOption = None,
    plot: PlotOption = None,
) -> None:
    """Time products with weights in few bits, mikv's and others', that must come from memory or need not."""
    from mikv.bench import machine
    from mikv.bench.matmul import run
    from mikv.bench.matmul_plan import MatmulPlan, parse_counts

    plan = MatmulPlan(m, k, parse_counts("--rows", rows), parse_counts("--bits", bits), group_size, seconds)
    _require_destinations(out, plot)
    options = {"m": m, "k": k, "rows": rows, "bits": bits, "group-size": group_size, "threads": threads}
    with machine.threads(threads), _spinner(as_json) as show:
        facts = machine.circumstances(machine.command_line("matmul", options | {"seconds": f"{seconds:g}"}))
        result = facts | run(plan, show)
    _present("matmul", result, as_json, out, plot)


@bench.command()
def generate(
    model: ModelOption = BUNDLED_MODEL,
    contexts: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "64,1024,4096",
    caches: Annotated[
        str, typer.Option(help=f"Caches to compare, separated by commas: {', '.join(spellings())}, llama.cpp:TYPE.")
    ] = "full,quanto4,mikv:balanced",
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after each prompt.")] = 32,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")
    ] = None,
    threads: ThreadsOption = None,
    repeats: Annotated[int, typer.Option(help="Run everything this often and take medians.")] = 1,
    as_json: JsonOption = False,
    out: OutOption = None,
    plot: PlotOption = None,
) -> None:
    """Time a model that reads a prompt and decodes, and what its cache takes, for several caches."""
    from mikv.bench.generate import Plan, parse_contexts, run

    names, lengths = split_names(caches), parse_contexts(contexts)
    _require_destinations(out, plot)
    from mikv.bench import machine

    with machine.threads(threads), _spinner(as_json) as show:
        options: dict[str, Any] = {"model": model, "contexts": contexts, "caches": caches, "new-tokens": new_tokens}
        options |= {"dtype": dtype, "threads": threads, "repeats": repeats}
        facts = machine.circumstances(machine.command_line("generate", options))
        plan = Plan(model, lengths, names, new_tokens, dtype, facts["threads"], repeats)
        result = facts | run(plan, show)
    _present("generate", result, as_json, out, plot)


@bench.command("plot")
def plot_records(
    records: Annotated[Path, typer.Argument(help="A .jsonl file that --out has written.")],
    picture: Annotated[
        Path | None, typer.Argument(help="The .png file to draw; beside the records if not given.")
    ] = None,
) -> None:
    """Draw records again, and write their table."""
    from mikv.bench.pages import page_of
    from mikv.bench.plots import draw
    from mikv.bench.records import read_records
    from mikv.records import require_writable

    found = read_records(records)
    target = picture or records.with_suffix(".png")
    require_writable(target, ".png", "PICTURE")
    draw(found, target)
    _write_page(page_of(found), records)
    typer.echo(f"{target} and {records.with_suffix('.md')}")


def _require_destinations(out: Path | None, plot: Path | None) -> None:
    """Find out now, not after minutes of measuring, that a result cannot be written."""
    from mikv.bench.plots import require_matplotlib
    from mikv.records import require_writable

    require_writable(out, ".jsonl", "--out")
    require_writable(plot, ".png", "--plot")
    if plot is not None:
        require_matplotlib()


def _present(name: str, result: Mapping[str, Any], as_json: bool, out: Path | None, plot: Path | None) -> None:
    """Files first, then the JSON object or the table."""
    from mikv.bench.pages import page_of
    from mikv.bench.records import records_of
    from mikv.records import write_lines

    records = records_of(name, result)
    if plot is not None:
        from mikv.bench.plots import draw

        draw(records, plot)
    if out is not None:
        write_lines(out, records)
        _write_page(page_of(records), out)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print_page(page_of(records))


def _write_page(page: "Page", records: Path) -> None:
    picture = records.with_suffix(".png")
    text = page.to_markdown(picture if picture.is_file() else None)
    records.with_suffix(".md").write_text(text, encoding="utf-8")


def _print_page(page: "Page") -> None:
    out = console()
    table = Table(title=page.title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    table.add_column(page.columns[0], no_wrap=True)
    for column in page.columns[1:]:
        table.add_column(column, justify="right")
    for row in page.rows:
        table.add_row(*row)
    if page.rows:
        out.print(table)
    for line in page.skipped:
        out.print(f"skipped: {line}", style="yellow")
    out.print(f"{page.circumstances}\n{page.meaning}", style="dim")


@contextmanager
def _spinner(quiet: bool) -> "Iterator[Callable[[str], None]]":
    """What is being measured, on stderr, if anyone is watching."""
    with spinner(quiet=quiet) as show:
        yield lambda what: show(f"measuring {what}")
