"""`mikv check`: five minutes to know whether a preset is good enough for a model; the exit code tells."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from mikv.cache.config import PRESETS, MiKVConfig
from mikv.cli.measuring import bar
from mikv.cli.options import ModelOption, TrustOption, load_for_cli
from mikv.cli.terminal import console
from mikv.errors import ConfigError
from mikv.models import BUNDLED_MODEL

if TYPE_CHECKING:
    from mikv.lab.check import Report, Verdict

_WORST = 5  # layers that are named
_MOST_MINUTES = 10_000


def check(
    model: ModelOption = BUNDLED_MODEL,
    trust_remote_code: TrustOption = False,
    preset: Annotated[str, typer.Option(help=f"Is this one good enough? {', '.join(PRESETS)}.")] = "balanced",
    minutes: Annotated[float, typer.Option(help="Ask as much as fits into about so many minutes.")] = 4.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Check a preset on your own model. Exit code 0: it is good enough; 1: it is not; 2: it could not be checked."""
    if not 0 <= minutes <= _MOST_MINUTES:
        raise ConfigError(
            f"--minutes {minutes:g} must be 0 or more, and at most {_MOST_MINUTES:,}; with 0 every task is asked once"
        )
    MiKVConfig.preset(preset)
    from mikv.lab.check import Check

    prepared = Check(model, preset)
    loaded = load_for_cli(model, quiet=as_json, trust_remote_code=trust_remote_code)
    with bar(quiet=as_json) as show:
        report = prepared.run(loaded, minutes * 60, show)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        _print(report)
    if not report.verdict.passed:
        raise typer.Exit(1)


def _print(report: "Report") -> None:
    out = console()
    out.print(_findings_table(report))
    out.print("each: value / limit, compared with the full cache on the same samples", style="dim")
    out.print(_criteria(report), style="dim", soft_wrap=True)
    out.print()
    out.print(_bytes_table(report))
    for line in (*_notes(report), _conclusion(report)):
        out.print(line, soft_wrap=True)


def _findings_table(report: "Report") -> Table:
    title = f"{report.model}, samples of each task: {report.samples}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("")
    for verdict in report.verdicts:
        table.add_column(verdict.preset, justify="right")
    measured = [verdict for verdict in report.verdicts if verdict.skipped is None]
    for index, finding in enumerate(measured[0].findings if measured else ()):
        cells = [_cell(verdict, index) for verdict in report.verdicts]
        table.add_row(finding.task, finding.criterion, *cells)
    return table


def _criteria(report: "Report") -> str:
    from mikv.lab.check import criteria_of

    limits = criteria_of(report.preset)
    return (
        f"all presets are held to the criteria of {report.preset}: KL at most {limits.kl_mean:g}, the same prediction "
        f"(top-1) for {limits.top1_agreement:.0%} of the tokens, at most {limits.score_loss:.0%} of a score lost"
    )


def _cell(verdict: "Verdict", index: int) -> Text:
    """The value and its limit."""
    if verdict.skipped is not None:
        return Text("-")
    finding = verdict.findings[index]
    color = "green" if finding.passed else "red"
    if finding.criterion == "KL":
        return Text.assemble((f"{finding.value:.4f}", color), f" / {finding.limit:g}")
    return Text.assemble((f"{finding.value:.1%}", color), f" / {finding.limit:.0%}")


def _bytes_table(report: "Report") -> Table:
    table = Table("MiB at", box=None, pad_edge=False)
    for name in next(iter(report.bytes_at.values()), {}):
        table.add_column("full, fp16" if name == "full" else name, justify="right")
    for num_tokens, sizes in report.bytes_at.items():
        table.add_row(f"{num_tokens:,} tokens", *(f"{size / 2**20:.1f}" for size in sizes.values()))
    return table


def _notes(report: "Report") -> list[str]:
    """What a user should know besides."""
    lines = [f"{task} does not count: {reason}" for task, reason in report.left_out.items()]
    by_reason: dict[str, list[int]] = {}
    for layer, reason in report.uncompressed.items():
        by_reason.setdefault(reason, []).append(layer)
    lines += [
        f"{len(layers)} of {report.num_layers} layers stay uncompressed ({', '.join(map(str, layers))}): {reason}"
        for reason, layers in by_reason.items()
    ]
    return lines + _outlier_notes(report)


def _outlier_notes(report: "Report") -> list[str]:
    outliers = sorted((layer for layer in report.outliers if layer.is_outlier), key=lambda layer: -layer.raw)
    if not outliers:
        return []
    worst = ", ".join(f"{layer.layer} ({layer.raw:.0f} to {layer.transformed:.1f})" for layer in outliers[:_WORST])
    line = (
        f"warning: outlier keys in {len(outliers)} layers: a channel that is many times the median one; worst, raw to "
        f"transformed: {worst}"
    )
    wild = [layer for layer in outliers if not layer.is_tamed]
    if wild:
        at_risk = f"the transforms of {report.preset} leave {len(wild)} of them uneven: expect it to be at risk"
        return [line, f"warning: {at_risk} on other texts too; prefer a preset with more bits for keys"]
    return [line, f"the transforms of {report.preset} even them out: neither bytes nor quality are at risk"]


def _conclusion(report: "Report") -> str:
    verdict = report.verdict
    lines = []
    for one in report.verdicts:
        if one.skipped is not None:
            lines.append(f"{one.preset} was not measured: {one.skipped}")
    failed = [finding for finding in verdict.findings if not finding.passed]
    reasons = ", ".join(
        f"{finding.task} {finding.criterion} {finding.value:.4g} (limit {finding.limit:.4g})" for finding in failed
    )
    lines.append(
        f"PASS: {verdict.preset} meets all of its criteria" if verdict.passed else f"FAIL: {verdict.preset}: {reasons}"
    )
    if report.recommended is None:
        lines.append(f"recommended: none of these presets meets the criteria of {report.preset}; keep the full cache")
    else:
        lines.append(f"recommended: {report.recommended}, the smallest that meets the criteria of {report.preset}")
    return "\n".join(lines)
