"""`mikv quantize`: a model with binary-coded weights in a new folder, which every command takes as --model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikv.cli.measuring import bar, command_line
from mikv.cli.quantize_order import Order
from mikv.cli.quantize_place import Place, workplace
from mikv.cli.quantize_stop import note, saying_what_is_kept
from mikv.errors import ConfigError
from mikv.records import require_writable

if TYPE_CHECKING:
    from mikv.integrations.quantizer import BCQConfig


def quantize(
    model: Annotated[
        str, typer.Argument(help="What to quantize: smollm2 (bundled), a folder, a .gguf file or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; --model OUT then works everywhere.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight, from 1 to 8.")] = 4,
    group_size: Annotated[
        str | None,
        typer.Option(
            help="Inputs that share scales, a multiple of 32, or `row` for all. [default: 128, imports: their own]"
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How codings are found: auto (refined with calibration, offset without), rtn, greedy, alternating, "
            "offset, gptq, gptq-bcq, refined, refined-uniform; or import: those of a GGUF file's Q4_0 and Q4_1 "
            "matrices, or of a folder quantized by GPTQ or AWQ."
        ),
    ] = "auto",
    calibration: Annotated[
        str | None,
        typer.Option(help="A text file that shows what the model will read, or `none`. [default: English and Python]"),
    ] = None,
    budget_bits: Annotated[
        float | None,
        typer.Option(help="Give each layer as many bits as it needs, this many on average, scales included."),
    ] = None,
    embeddings: Annotated[
        bool,
        typer.Option("--embeddings/--no-embeddings", help="Also quantize the token embedding and the output head."),
    ] = False,
    skipped: Annotated[
        list[str] | None,
        typer.Option(
            "--modules-to-not-convert",
            "--skip-modules",
            help="Layers that stay as they are, separated by commas: full names with all below them, or ends of names, "
            "such as model.vision_tower or experts.",
        ),
    ] = None,
    nested: Annotated[
        bool, typer.Option("--nested", help="Also keep scales for reading the same weights with fewer bits, down to 2.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Compute, and keep what is not quantized, in float32, bfloat16 or float16. [default: own]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the error of every layer into this .png file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in OUT if there is one.")] = False,
) -> None:
    """Quantize a model's weights to a few bits, and write it as a folder.

    What is finished is kept beside OUT until the model stands: after an interruption the same command goes on.
    """
    from mikv.bench import machine

    group_size = group_size or ("32" if method == "import" else "128")
    options = {"--bits": bits, "--group-size": group_size, "--method": method, "--calibration": calibration}
    options |= {"--budget-bits": budget_bits, "--embeddings": embeddings or None, "--nested": nested or None}
    options |= {"--modules-to-not-convert": ",".join(skipped or []) or None, "--dtype": dtype}
    config = _config(bits, nested, group_size, skipped or [], method=method, quantize_embeddings=embeddings)
    order = Order(model, config, calibration, budget_bits, dtype)
    source = order.require_possible()
    place = Place.open(out, source if isinstance(source, Path) else None, overwrite=overwrite)
    _require_plot(plot)
    with machine.threads(threads):
        command = command_line(["mikv", "quantize", model, str(out)], options | {"--threads": threads})
        fingerprint = order.fingerprint(source)
        work = place.work(fingerprint)
        order.require_room(source, place, work)
        with saying_what_is_kept(work), bar(quiet=as_json) as show, workplace(place, fingerprint):
            result = machine.circumstances(command) | order.carry_out(work, place, show)
            place.publish(work, overwrite=overwrite)
    for other in place.others(work):
        note(
            f"{other} has unfinished work for {out} with other settings; delete it if you do not want to go on with it"
        )
    if plot is not None:
        from mikv.cli.quantize_page import draw

        draw(result, plot)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        from mikv.cli.quantize_page import show_tables

        show_tables(result)


def _config(bits: int, nested: bool, group_size: str, skipped: list[str], **settings: Any) -> "BCQConfig":
    """Raises ConfigError."""
    from mikv.integrations.quantizer import BCQConfig
    from mikv.plan.weight_formats import parse_group_size
    from mikv.weights.nested import PRECISIONS

    if nested and bits != PRECISIONS[-1]:
        raise ConfigError(
            f"--nested weights are read with {PRECISIONS[0]} to {PRECISIONS[-1]} bits; use --bits {PRECISIONS[-1]}"
        )
    return BCQConfig(
        bits=bits,
        group_size=parse_group_size(group_size),
        modules_to_not_convert=[name.strip() for names in skipped for name in names.split(",")] or None,
        nested_bits=PRECISIONS[:-1] if nested else (),
        **settings,
    )


def _require_plot(plot: Path | None) -> None:
    """Find out now, not after minutes of quantizing, that there will be no picture."""
    require_writable(plot, ".png", "--plot")
    if plot is not None:
        from mikv.bench.plots import require_matplotlib

        require_matplotlib()
