"""`mikv sweep`: a grid of configurations on given texts; what is best within each budget, as a table and a page."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mikv.cache.config import HIGH_FORMATS
from mikv.cli.measuring import bar, command_line, interruptible, on_sample
from mikv.cli.options import ModelOption
from mikv.cli.terminal import console
from mikv.errors import ConfigError
from mikv.models import BUNDLED_MODEL
from mikv.records import Record, require_writable

if TYPE_CHECKING:
    from mikv.cli.measuring import Show
    from mikv.lab.evaluate import Finished, OnSample
    from mikv.lab.sweep import Arm, Choice, Outcome, Sweep

POLICIES = ("far", "h2o", "key_norm", "normalized", "random", "recency", "snapkv", "window")  # known without PyTorch
_ESTIMATE_AFTER = 10.0  # seconds of measuring, and five results
_LEAST_RESULTS = 5


def sweep(
    model: ModelOption = BUNDLED_MODEL,
    ratios: Annotated[str, typer.Option(help="Importance ratios; uniform caches, with 0, are added.")] = (
        "0.05,0.08,0.12,0.2"
    ),
    high: Annotated[str, typer.Option(help=f"Formats of the high tier, of {', '.join(HIGH_FORMATS)}.")] = "int8,int4",
    low: Annotated[str, typer.Option(help="Bits of keys and values in the low tier.")] = "K4V4,K4V3,K3V3,K3V2,K2V2",
    transforms: Annotated[
        str | None, typer.Option(help="Of all, no-centering, no-balancer, no-hadamard, none. [default: as --base]")
    ] = None,
    roundings: Annotated[str | None, typer.Option(help="Of feedback, nearest. [default: as --base]")] = None,
    policies: Annotated[
        str | None, typer.Option(help=f"Importance policies, of {', '.join(POLICIES)}. [default: as --base]")
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Of uniform; first-last: one bit more in the first and last two layers; sensitivity: bits moved "
            "between layers, in the same bytes, by how much each one's rounding is measured to matter."
        ),
    ] = "uniform",
    base: Annotated[str, typer.Option(help="The cache that has all other settings.")] = "mikv:balanced",
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="What to measure on, such as text:kind=code (mikv eval --help lists all); repeat it for more. "
            "[default: prose and code, split tune]",
        ),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option("--cache", help="A cache to measure besides, such as kivi2; repeat it for more.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of each task.")] = 2,
    seed: Annotated[int, typer.Option(help="Makes other samples.")] = 0,
    tokens: Annotated[int, typer.Option(help="Compare bytes at a prompt of so many tokens.")] = 3000,
    budgets: Annotated[
        str, typer.Option(help="Shares of the fp16 bytes to find the best cache for.")
    ] = "0.20,0.27,0.33",
    out: Annotated[
        Path | None,
        typer.Option(help="Add the records to this .jsonl file; what is in it already is not measured again."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write a .md page, of all models that --out has the same caches of.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each process; if not given, PyTorch's are divided among them.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Divide the samples over so many processes with a model each.")] = 1,
) -> None:
    """Measure a grid of cache settings and find the best within each budget of bytes."""
    require_writable(out, ".jsonl", "--out")
    require_writable(page, ".md", "--page")
    from mikv.bench import machine
    from mikv.lab.evaluate import threads_each
    from mikv.lab.grid import Grid
    from mikv.lab.records import Ledger
    from mikv.lab.sweep import TASKS, Sweep, SweepPlan

    options: dict[str, Any] = {"--model": model, "--ratios": ratios, "--high": high, "--low": low}
    options |= {"--transforms": transforms, "--roundings": roundings, "--policies": policies, "--layers": layers}
    options |= {
        "--base": base,
        "--cache": tuple(also or ()),
        "--task": tuple(tasks or TASKS),
        "--samples": samples,
        "--seed": seed,
    }
    options |= {"--tokens": tokens, "--budgets": budgets}
    command = command_line(("mikv", "sweep"), options)
    grid = Grid(
        ratios=_numbers("--ratios", ratios),
        high=_words("--high", high),
        low=_words("--low", low),
        transforms=None if transforms is None else _words("--transforms", transforms),
        roundings=None if roundings is None else _words("--roundings", roundings),
        policies=None if policies is None else _words("--policies", policies),
        layers=_words("--layers", layers),
        base=base,
    )
    with machine.threads(threads):
        plan = SweepPlan(
            grid,
            model,
            tuple(tasks or TASKS),
            samples=samples,
            seed=seed,
            tokens=tokens,
            budgets=_numbers("--budgets", budgets),
            threads=threads or threads_each(processes),
            processes=processes,
            also=tuple(also or ()),
        )
        prepared = Sweep(plan, command)
        with Ledger(out) as ledger, bar(quiet=as_json) as show, interruptible(out):
            records = prepared.run(ledger, _announced(prepared, show, quiet=as_json))
    outcome = prepared.outcome(records)
    if page is not None:
        _write_page(page, prepared, outcome, out)
    if as_json:
        typer.echo(json.dumps(_to_dict(outcome, tokens, records)))
    else:
        _print(outcome, tokens, records)


def _words(option: str, text: str) -> tuple[str, ...]:
    """What is between commas, each once."""
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise ConfigError(f"{option} {text!r} names nothing; leave it away for the default")
    return found


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, _words(option, text)))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} must be numbers with commas between them, such as 0.05,0.1") from error


def _announced(prepared: "Sweep", show: "Show", quiet: bool) -> "OnSample":
    """Say how much there is to measure, and how long it will take as soon as that is known; then only the bar."""
    err = console(stderr=True, quiet=quiet)
    err.print(prepared.extent, soft_wrap=True)
    show_finished = on_sample(show)
    started = 0.0
    is_said = False

    def estimate(finished: "Finished", done: int, total: int) -> None:
        nonlocal started, is_said
        show_finished(finished, done, total)
        now = time.monotonic()
        if done == 1:
            started, is_said = now, False
        elif not is_said and done > _LEAST_RESULTS and now - started > _ESTIMATE_AFTER:
            seconds = (now - started) / (done - 1) * (total - done)
            err.print(f"{total:,} readings to do; about {ceil(seconds / 60)} min more at this speed", soft_wrap=True)
            is_said = True

    return estimate


def _write_page(path: Path, prepared: "Sweep", own: "Outcome", out: Path | None) -> None:
    """With all models whose records are in `out`."""
    from mikv.lab.report.records import read_eval_records
    from mikv.lab.sweep_page import page

    others, left_out = prepared.other_outcomes([] if out is None else read_eval_records([out]).records, own)
    for model, reason in left_out.items():
        console(stderr=True).print(f"{path} leaves out {model}: {reason}", style="yellow", soft_wrap=True)
    path.write_text(page(prepared.plan, [own, *others], prepared.command), encoding="utf-8")


def _to_dict(outcome: "Outcome", tokens: int, records: Sequence[Record]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "model": outcome.model,
        "arms": [asdict(arm) | {"on_front": arm.cache in outcome.front} for arm in outcome.arms],
        "budgets": [asdict(choice) | {"uniform_kl_by_best_kl": choice.gain} for choice in outcome.choices],
        "records": list(records),
    }


def _print(outcome: "Outcome", tokens: int, records: Sequence[Record]) -> None:
    out = console()
    out.print(_arms_table(outcome, tokens))
    out.print()
    out.print(_choices_table(outcome.choices))
    best = [arm for choice in outcome.choices for arm in (choice.best, choice.uniform) if arm is not None]
    for label, cache in {arm.label: arm.cache for arm in best}.items():
        out.print(f"{label}: {cache}", style="dim", soft_wrap=True)
    for reason in sorted({record["skipped"] for record in records if record["skipped"] is not None}):
        out.print(f"skipped: {reason}", style="yellow", soft_wrap=True)


def _arms_table(outcome: "Outcome", tokens: int) -> Table:
    table = Table(title=f"{outcome.model}; *: none is both smaller and closer", title_justify="left", box=None)
    table.add_column("configuration", overflow="fold")
    for column in (f"at {tokens:,}", "measured", "KL mean", "KL p99", "top-1"):
        table.add_column(column, justify="right")
    for arm in outcome.arms:
        star = "* " if arm.cache in outcome.front else "  "
        table.add_row(
            star + arm.label,
            f"{arm.ratio:.4f}",
            f"{arm.measured_ratio:.4f}",
            f"{arm.kl_mean:.5f}",
            f"{arm.kl_p99:.4f}",
            f"{arm.top1_agreement:.1%}",
        )
    return table


def _choices_table(choices: "Sequence[Choice]") -> Table:
    table = Table("budget", title="best within each budget", title_justify="left", box=None)
    table.add_column("configuration", overflow="fold")
    for column in ("of fp16", "KL mean", "uniform KL / KL"):
        table.add_column(column, justify="right")
    for choice in choices:
        gain = "" if choice.gain is None else f"{choice.gain:.2f}"
        table.add_row(f"{choice.budget:g}", *_cells(choice.best, "no cache of two tiers fits"), gain)
        table.add_row("", *_cells(choice.uniform, "no uniform cache fits"), "")
    return table


def _cells(arm: "Arm | None", otherwise: str) -> tuple[str, str, str]:
    return (otherwise, "", "") if arm is None else (arm.label, f"{arm.ratio:.4f}", f"{arm.kl_mean:.5f}")
