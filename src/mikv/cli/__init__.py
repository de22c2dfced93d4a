"""The command `mikv`. Commands are imported when they are named, and PyTorch only when a command needs it."""

import logging
import os
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from mikv import __version__
from mikv.errors import MiKVError

# each is a function, or a group of commands, of that name in the module of that name
COMMANDS = ("generate", "chat", "demo", "bench", "eval", "check", "sweep", "report", "quantize", "plan", "info")


class Commands(TyperGroup):
    """The subcommands, imported on demand; their MiKVErrors become one red line and exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"mikv.cli.{cmd_name}"), cmd_name)
        if isinstance(command, typer.Typer):
            return typer.main.get_command(command)
        single = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
        single.command(cmd_name)(command)
        return typer.main.get_command(single)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except MiKVError as error:
            print_error(error)
            raise typer.Exit(2) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def print_error(error: MiKVError) -> None:
    """One red line on stderr."""
    line = " ".join(f"error: {error}".split())
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mikv {__version__}")
        raise typer.Exit


@app.callback()
def _mikv(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Run language models whose KV cache takes a quarter of the memory and forgets nothing."""


def main() -> None:
    """Entry point of the console script."""
    # transformers' own bars for reading files; downloads from the hub still show theirs
    os.environ.setdefault("TQDM_DISABLE", "1")
    # OpenMP threads that spin while they wait make everything 5 times slower when another program wants the same cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.getLogger("mikv").addFilter(_is_news)
    app()


def _is_news(record: logging.LogRecord) -> bool:
    """Here the switch of the model's attention is not news: the command exists for it."""
    return not record.getMessage().startswith("switching the model's attention")
