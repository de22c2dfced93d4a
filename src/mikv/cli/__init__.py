"""The command `mikv`. Commands are imported when they are named, and PyTorch only when a command needs it."""

import logging
import os
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mikv import __version__
from mikv.choices import did_you_mean
from mikv.cli.terminal import console, log_visibly, plain_where_unicode_ends
from mikv.errors import MiKVError

# each is a function, or a group of commands, of that name in the module of that name
COMMANDS = ("generate", "chat", "demo", "bench", "eval", "check", "sweep", "report", "quantize", "plan", "info")

# all but the usage errors of the command line itself, which typer shows
_UNEXPECTED = (OSError, MemoryError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError)
_BUGS = (AttributeError, AssertionError, ImportError)


class Commands(TyperGroup):
    """The subcommands, imported on demand. Their errors become one red line: a MiKVError exit code 2, any other 1."""

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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first argument names."""
        if args[0] not in COMMANDS:
            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        with plain_where_unicode_ends():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except MiKVError as error:
            print_error(str(error))
            raise typer.Exit(2) from error
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (*_UNEXPECTED, *_BUGS) as error:
            if os.environ.get("MIKV_TRACEBACK"):
                raise
            print_error(f"{type(error).__name__}: {error}; with MIKV_TRACEBACK=1 in the environment you see where")
            raise typer.Exit(1) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)


def print_error(error: str) -> None:
    """One red line on stderr."""
    line = " ".join(f"error: {error}".split())
    console(stderr=True).print(line, style="red", soft_wrap=True)


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
    log_visibly()
    logging.getLogger("mikv").addFilter(_is_news)
    app()


def _is_news(record: logging.LogRecord) -> bool:
    """Here the switch of the model's attention is not news: the command exists for it."""
    return not record.getMessage().startswith("switching the model's attention")
