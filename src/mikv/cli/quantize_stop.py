"""How `mikv quantize` ends early: by Ctrl-C, by the system's request to stop, or by an error. What is kept is said."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType

import typer
from rich.console import Console

from mikv.cli.quantize_place import kept_in

_REQUESTS = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


class _StopRequest(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end the command as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def saying_what_is_kept(work: Path) -> Iterator[None]:
    """After an interruption or an error, one line on stderr says what `work` holds and how to go on."""
    try:
        with _requests_as_errors():
            yield
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, _StopRequest) else signal.SIGINT
        note(f"interrupted: {_left(work) or 'no layer was finished, nothing was kept'}")
        raise typer.Exit(128 + number) from None
    except BaseException:
        if left := _left(work):
            note(f"kept: {left}")
        raise


def _left(work: Path) -> str:
    kept = kept_in(work)
    return kept and f"{work} has {kept}; the same command goes on from there, and deleting the folder forgets it"


def note(line: str) -> None:
    """One yellow line on stderr."""
    Console(stderr=True).print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _requests_as_errors() -> Iterator[None]:
    if current_thread() is not main_thread():  # only there can handlers be set, and only there do they run
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise _StopRequest(number)

    with ExitStack() as stack:
        for number in _REQUESTS:
            stack.callback(signal.signal, number, signal.signal(number, stop))
        yield
