"""`mikv demo`: one fact, one document, six caches."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mikv.cli.options import ModelOption, TrustOption, load_for_cli
from mikv.cli.terminal import console
from mikv.models import BUNDLED_MODEL, find_model

if TYPE_CHECKING:
    from mikv.lab.demo import DemoRow


def demo(
    model: ModelOption = BUNDLED_MODEL,
    trust_remote_code: TrustOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Hide a fact in a document of 3,000 tokens and ask for it through six caches."""
    find_model(model)

    from mikv.lab.demo import FACT, FORCED_TOKENS, QUESTION, run_demo

    loaded = load_for_cli(model, quiet=as_json, trust_remote_code=trust_remote_code)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
        disable=as_json,
    )
    with progress:
        task = progress.add_task("", total=FORCED_TOKENS)

        def show(cache: str, tokens: int) -> None:
            doing = "reading the document and answering" if tokens == 0 else "reading on, token by token"
            progress.update(task, description=f"{cache}: {doing}", completed=tokens)

        result = run_demo(loaded.name, loaded.model, loaded.tokenizer, on_progress=show)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    out = console()
    out.print(f"\n{result.model}, a prompt of {result.prompt_tokens:,} tokens. Early in it:")
    out.print(f"  {FACT}", style="italic")
    out.print("Asked at its end:", Text(QUESTION, "italic"), end="\n\n")
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    out.print(_answers(result.rows))
    out.print(_table(result.rows))
    out.print(
        "MiB: all that is allocated, scales and bookkeeping included.\n"
        "of fp16: its share of what the same keys and values take in 16-bit floats;\n"
        f"         the full cache is in the model's own {dtype}.\n"
        f"tokens/s, KL, top-1: over the {FORCED_TOKENS} tokens that follow, read one by one through the cache."
    )
    if not all(row.correct for row in result.rows if row.cache in ("full", "balanced")):
        raise typer.Exit(1)


def _answers(rows: "tuple[DemoRow, ...]") -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        mark = Text("✓", "green") if row.correct else Text("✗", "red")
        table.add_row(row.cache, mark, " ".join(row.answer.split()))
    return table


def _table(rows: "tuple[DemoRow, ...]") -> Table:
    table = Table("cache")
    for name in ("MiB", "of fp16", "tokens/s", "KL to full", "top-1"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.cache,
            f"{row.bytes / 2**20:.1f}",
            f"{row.ratio:.1%}",
            f"{row.decode_tokens_per_second:.1f}",
            f"{row.kl_to_full:.4f}",
            f"{row.top1_agreement:.1%}",
        )
    return table
