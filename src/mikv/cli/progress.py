"""What a person sees on stderr while a long prompt is read: a bar that counts layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LONG_PROMPT = 1024  # tokens; shorter ones are read before a bar would be noticed


@contextmanager
def prefill_bar(model: Any, num_tokens: int, *, quiet: bool = False) -> Iterator[None]:
    """Show how many layers have read a prompt of `num_tokens`, if it is long; gone as soon as the first token is there.

    The prompt is fed at once: fed in pieces, all but the first would attend to the packed cache.
    """
    console = Console(stderr=True)
    layers = _decoder_layers(model)
    if quiet or num_tokens <= LONG_PROMPT or not layers or not console.is_terminal:
        yield
        return
    columns = (TextColumn("[dim]reading {task.fields[tokens]:,} tokens"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=len(layers), tokens=num_tokens)

    def advance(*_: Any) -> None:
        bar.advance(task)
        if bar.finished:
            finish()

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
