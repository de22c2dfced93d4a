"""While a prompt is read, layer by layer: a bar on stderr if it is long, and places where it can be stopped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mikv.cli.terminal import console

LONG_PROMPT = 1024  # tokens; shorter ones are read before a bar would be noticed


class Stopped(KeyboardInterrupt):
    """Reading was stopped between two layers, none of which is in the middle of anything."""


@contextmanager
def prefill_bar(
    model: Any, num_tokens: int, *, quiet: bool = False, stop: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Show how many layers have read a prompt of `num_tokens`, if it is long; gone as soon as the first token is there.

    The prompt is fed at once: fed in pieces, all but the first would attend to the packed cache. Raises Stopped out of
    the model, between two of its layers, as soon as `stop` says so.
    """
    err = console(stderr=True)
    layers = _decoder_layers(model)
    is_hidden = quiet or num_tokens <= LONG_PROMPT or not err.is_terminal
    if not layers or (is_hidden and stop is None):
        yield
        return
    columns = (TextColumn("reading {task.fields[tokens]:,} tokens", style="dim"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=err, transient=True, disable=is_hidden)
    task = bar.add_task("", total=len(layers), tokens=num_tokens)

    def advance(*_: Any) -> None:
        bar.advance(task)
        if bar.finished:
            finish()
        elif stop is not None and stop():
            raise Stopped

    handles = [layer.register_forward_hook(advance) for layer in layers]

    def finish() -> None:
        bar.stop()
        for handle in handles:
            handle.remove()

    bar.start()
    try:
        yield
    finally:
        finish()


def _decoder_layers(model: Any) -> list[Any]:
    get_decoder: Callable[[], Any] | None = getattr(model, "get_decoder", None)
    return list(getattr(get_decoder(), "layers", ())) if get_decoder else []
