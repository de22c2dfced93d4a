"""`mikv report`: one page, and pictures, from records of `mikv eval` and the tokens of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mikv.cache.config import MiKVConfig
from mikv.cache_names import parse_cache
from mikv.errors import ConfigError
from mikv.models import BUNDLED_MODEL, find_model
from mikv.records import require_writable

if TYPE_CHECKING:
    from mikv.lab.precision_map import PrecisionMap


def report(
    records: Annotated[list[Path], typer.Argument(help="Files that `mikv eval --out` has written.")],
    html: Annotated[Path, typer.Option(help="Write the page to this .html file; it needs nothing else to be read.")],
    png: Annotated[Path | None, typer.Option(help="Write the curves and the precision map to this folder.")] = None,
    map_prompt: Annotated[
        Path | None, typer.Option(help="Show in which precision each token of this text file is kept.")
    ] = None,
    map_model: Annotated[
        str | None, typer.Option(help=f"The model that reads it, as for --model. [default: {BUNDLED_MODEL}]")
    ] = None,
    map_cache: Annotated[
        str | None,
        typer.Option(help="The cache that keeps it, one of mikv:... [default: mikv:balanced]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Show records of `mikv eval` as one page: curves, tables, needle heat maps and the precision map."""
    from mikv.lab.report.page import page, require_plotly
    from mikv.lab.report.pictures import draw, picture_files, require_matplotlib
    from mikv.lab.report.records import read_eval_records

    plan = _map_plan(map_prompt, map_model, map_cache)
    require_plotly()
    require_writable(html, ".html", "--html")
    if png is not None:
        require_matplotlib()
        _require_folder(png)
    found = read_eval_records(records)
    pictures = [] if png is None else picture_files(found, plan is not None, png)
    if not overwrite:
        _require_new([html, *pictures])
    map_of = None if plan is None else _read_prompt(plan)
    # a name that is not UTF-8 can be in a record, and of a file
    html.write_bytes(page(found, map_of, [path.name for path in records], date.today()).encode("utf-8", "replace"))
    if png is not None:
        draw(found, map_of, png)
    typer.echo("\n".join(map(str, [html, *pictures])))


@dataclass(frozen=True)
class _MapPlan:
    """A text, the model that reads it and the configuration of the cache that keeps it."""

    text: str
    model: str
    config: MiKVConfig


def _map_plan(prompt: Path | None, model: str | None, cache: str | None) -> _MapPlan | None:
    """What --map-prompt, --map-model and --map-cache ask for. Raises ConfigError if that cannot be."""
    if prompt is None:
        for option, value in (("--map-model", model), ("--map-cache", cache)):
            if value is not None:
                raise ConfigError(f"{option} {value} needs a text to read: --map-prompt FILE")
        return None
    try:
        text = prompt.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read --map-prompt {prompt}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--map-prompt {prompt} is not UTF-8 text: {error}") from error
    cache = cache or "mikv:balanced"
    config = parse_cache(cache).config
    if config is None:
        raise ConfigError(f"--map-cache {cache} has no tiers to show; name one of mikv's, such as mikv:balanced")
    model = model or BUNDLED_MODEL
    find_model(model)
    return _MapPlan(text, model, config)


def _read_prompt(plan: _MapPlan) -> "PrecisionMap":
    from mikv.cache.geometry import context_length
    from mikv.cli.options import load_for_cli
    from mikv.lab.precision_map import precision_map

    loaded = load_for_cli(plan.model)
    tokens = loaded.tokenizer.encode(plan.text)
    longest = context_length(loaded.model.config)
    if longest is not None and len(tokens) > longest:
        raise ConfigError(
            f"the text of --map-prompt has {len(tokens):,} tokens, more than the {longest:,} that {plan.model} was "
            "trained for; shorten it"
        )
    return precision_map(loaded, plan.config, tokens)


def _require_new(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists; pass --overwrite to replace it")


def _require_folder(path: Path) -> None:
    if path.is_file() or not path.parent.is_dir():
        raise ConfigError(f"--png {path} must be a folder, or a new one in a folder that exists")
