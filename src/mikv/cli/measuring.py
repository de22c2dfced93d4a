"""What commands that measure for minutes share: the bar, the command in their records, what Ctrl-C leaves."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mikv.cli.terminal import console, visible

if TYPE_CHECKING:
    from mikv.lab.evaluate import Finished, OnSample

_INTERRUPTED = 130  # what shells call a command that Ctrl-C has ended

Show = Callable[[str, int, int], None]


def command_line(words: Sequence[str], options: Mapping[str, Any]) -> str:
    """The command with all options that are not None; True is an option without a value, tuples repeat theirs."""
    words = list(words)
    for option, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [] if one is None else [option] if one is True else [option, str(one)]
    return shlex.join(words)


@contextmanager
def bar(quiet: bool) -> Iterator[Show]:
    """A bar on stderr, if anyone is watching: what is done, how much there is, how long it will take."""
    err = console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=err, transient=True)
    progress.disable = quiet or not err.is_terminal
    with progress:
        row = progress.add_task("loading the model", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(row, description=visible(what), completed=done, total=total)

        yield show


def on_sample(show: Show) -> "OnSample":
    """Shows what an evaluation has just finished."""

    def show_finished(finished: "Finished", done: int, total: int) -> None:
        show(f"{finished.task} · sample {finished.sample + 1} · {finished.cache}", done, total)

    return show_finished


@contextmanager
def interruptible(out: Path | None) -> Iterator[None]:
    """Ctrl-C ends the command and says how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        how = "nothing was kept; with --out FILE.jsonl a run can be continued"
        if out is not None:
            how = "the same command continues where it stopped"
        console(stderr=True).print(f"interrupted: {how}", style="yellow", soft_wrap=True)
        raise typer.Exit(_INTERRUPTED) from None
