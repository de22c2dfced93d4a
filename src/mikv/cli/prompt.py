"""What is said to a chat, one message after the other: typed with an editor, or the lines of a pipe."""

import sys
from collections.abc import Callable, Iterable, Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle


def messages(commands: Iterable[str], on_interrupt: Callable[[], None]) -> Iterator[str]:
    """From a person if stdin and stdout or stderr are a terminal, else from a pipe; until the end of either.

    What is pasted is one message, however many lines it has; a pipe has a message per line. Empty ones are skipped.
    What is no UTF-8 comes with surrogates. `on_interrupt` is called for a Ctrl-C that discards what was typed.
    """
    is_typed = sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    for message in _typed(commands, on_interrupt) if is_typed else _piped():
        if message.strip():
            yield message.strip()


def _piped() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "surrogateescape")


def _typed(commands: Iterable[str], on_interrupt: Callable[[], None]) -> Iterator[str]:
    session: PromptSession[str] = PromptSession(
        "> ",
        output=create_output(always_prefer_tty=True),  # stderr, if the answers go to a file
        completer=WordCompleter(list(commands), sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        prompt_continuation="  ",
    )
    while True:
        try:
            yield session.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            on_interrupt()
