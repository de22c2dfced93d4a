"""What is said to a chat, one message after the other: typed with an editor, or the lines of a pipe."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.shortcuts import CompleteStyle


class Interrupts:
    """Ctrl-C outside of an answer: `early` counts those since the message came that is about to be answered."""

    def __init__(self) -> None:
        self.early, self._is_waiting = 0, False

    def __call__(self, *_: object) -> None:
        """What SIGINT does meanwhile; it interrupts nothing."""
        if self._is_waiting:
            say_how_to_leave()
        else:
            self.early += 1

    def begin(self) -> None:
        """From now on they are about the next message."""
        self.early = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the line of a pipe."""
        self._is_waiting = True
        try:
            yield
        finally:
            self.early, self._is_waiting = 0, False


def say(text: str) -> None:
    """A line straight to stderr: a signal may come in the middle of whatever a console does."""
    with suppress(RuntimeError, OSError, ValueError):
        print(f"\n{text}", file=sys.stderr, flush=True)


def say_how_to_leave() -> None:
    """Ctrl-C is not it."""
    say("Ctrl-D or /exit leaves")


def messages(commands: Iterable[str], interrupts: Interrupts) -> Iterator[str]:
    """From a person if stdin and stdout or stderr are a terminal, else from a pipe; until the end of either.

    What is pasted is one message, however many lines it has; a pipe has a message per line. Empty ones are skipped.
    What is no UTF-8 comes with surrogates. Ctrl-C discards what was typed.
    """
    is_typed = sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    for message in _typed(commands, interrupts) if is_typed else _piped(interrupts):
        if message.strip():
            yield message.strip()


def _piped(interrupts: Interrupts) -> Iterator[str]:
    while True:
        with interrupts.waiting():
            line = sys.stdin.buffer.readline()
        if not line:
            return
        yield line.decode("utf-8", "surrogateescape")


def _typed(commands: Iterable[str], interrupts: Interrupts) -> Iterator[str]:
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
            typed = session.prompt(pre_run=interrupts.begin)
        except EOFError:
            return
        except KeyboardInterrupt:
            say_how_to_leave()
            continue
        with _keys_wait(session.output):
            yield typed


@contextmanager
def _keys_wait(output: Output) -> Iterator[None]:
    """Meanwhile keys do not appear in the middle of an answer: they, and what is pasted, are for the next prompt."""
    try:
        import termios
    except ImportError:  # on Windows they wait anyway
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    waiting = [*before]
    waiting[3] &= ~(termios.ECHO | termios.ICANON)  # the local modes; Ctrl-C stays a signal
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, waiting)
    output.enable_bracketed_paste()
    output.flush()
    try:
        yield
    finally:
        output.disable_bracketed_paste()
        output.flush()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
