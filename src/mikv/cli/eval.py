"""`mikv eval`: tasks through caches, as a table and as one record per task and cache."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mikv.cache_names import spellings
from mikv.cli.measuring import bar, command_line, interruptible, on_sample
from mikv.cli.options import ModelOption
from mikv.cli.terminal import console
from mikv.models import BUNDLED_MODEL
from mikv.records import Record, require_writable

TASKS = (  # known without PyTorch
    *("line-retrieval", "passkey", "needle", "variable-tracking", "multi-key", "multi-turn", "system-prompt"),
    *("humaneval", "text"),
)
DEFAULT_CACHES = ("full", "mikv:balanced")


def eval(
    tasks: Annotated[
        list[str],
        typer.Argument(metavar="TASK...", help=f"NAME or NAME:option=value,option=value, of {', '.join(TASKS)}."),
    ],
    model: ModelOption = BUNDLED_MODEL,
    caches: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            help=f"A cache to measure; repeat it for more: {', '.join(spellings())}. "
            f"[default: {', '.join(DEFAULT_CACHES)}]",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Compare predictions with this model's, the one that --model was quantized from."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of each task.")] = 20,
    seed: Annotated[int, typer.Option(help="Makes other samples.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Add the records to this .jsonl file; what is in it already is not measured again."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    chunk: Annotated[int, typer.Option(help="Read given text so many tokens at a time through the cache.")] = 32,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each process; if not given, PyTorch's are divided among them.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Divide the samples over so many processes with a model each.")] = 1,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let tasks run code that the model has written.")
    ] = False,
) -> None:
    """Measure how well a model does its tasks through each cache, how far its predictions move, and the bytes."""
    require_writable(out, ".jsonl", "--out")
    from mikv.bench import machine
    from mikv.lab.evaluate import Evaluation, Plan, threads_each
    from mikv.lab.records import Ledger

    names = tuple(caches or DEFAULT_CACHES)
    options = {
        "--model": model,
        "--reference": reference,
        "--cache": names,
        "--samples": samples,
        "--seed": seed,
        "--dtype": dtype,
    }
    options |= {"--chunk": chunk, "--threads": threads, "--processes": processes if processes > 1 else None}
    options |= {"--allow-code-execution": allow_code_execution or None}
    with machine.threads(threads):
        plan = Plan(
            tuple(tasks),
            model,
            names,
            samples=samples,
            seed=seed,
            chunk=chunk,
            dtype=dtype,
            threads=threads or threads_each(processes),
            processes=processes,
            allow_code_execution=allow_code_execution,
            reference=reference,
        )
        evaluation = Evaluation(plan, command_line(["mikv", "eval", *tasks], options))
        with interruptible(out), Ledger(out) as ledger, bar(quiet=as_json) as show:
            records = evaluation.run(ledger, on_sample(show))
    if as_json:
        typer.echo(json.dumps({"records": records}))
    else:
        _print(records)


def _print(records: Sequence[Record]) -> None:
    """A table per task; then what was skipped and what the columns mean."""
    out = console()
    for task in dict.fromkeys(record["task"] for record in records):
        out.print(_table(task, [record for record in records if record["task"] == task]))
        out.print()
    for record in records:
        if record["skipped"] is not None:
            line = f"skipped: {record['task']} through {record['cache']}: {record['skipped']}"
            out.print(line, style="yellow", soft_wrap=True)
    reference = records[0]["reference"]
    against = "the full cache" if reference is None else f"{reference} with the full cache"
    out.print(
        "score: from 0 to 1 ± its standard error\n"
        "of fp16: all bytes of the cache as a share of the full cache in 16-bit floats\n"
        f"KL, top-1: distance to {against}, over given tokens read through the cache",
        style="dim",
    )


def _table(task: str, records: Sequence[Record]) -> Table:
    is_scored = any(record["score"] is not None for record in records)
    title = f"{task}, samples: {records[0]['samples']}, model: {records[0]['model']}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    table.add_column("cache", overflow="fold")
    for column in ("score" if is_scored else "perplexity", "of fp16", "KL mean", "KL p99", "top-1", "tokens/s"):
        table.add_column(column, justify="right")
    for record in records:
        if record["skipped"] is None:
            table.add_row(
                record["cache"],
                _score(record) if is_scored else _number(record["perplexity"], ".3f"),
                _number(record["ratio"], ".4f"),
                _number(record["kl_mean"], ".5f"),
                _number(record["kl_p99"], ".5f"),
                _number(record["top1_agreement"], ".1%"),
                _number(record["decode_tokens_per_second"], ".1f"),
            )
    return table


def _score(record: Record) -> str:
    error = record["score_stderr"]
    return f"{record['score']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
