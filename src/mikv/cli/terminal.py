"""What commands show: control characters of a model, a file or a user never reach the terminal, they are spelled out.

All output that is not JSON goes through `console` or `writer`. Knows nothing of commands.
"""

import codecs
import io
import logging
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats (bidirectional, zero width), surrogates, separators
_JOINERS = "\u200c\u200d"  # after a letter, mark or symbol they spell words of Persian and Hindi, and families of emoji
_WITHOUT_UNICODE = {"·": "-", "…": "...", "±": "+-", "×": "x", "✓": "+", "✗": "x", "–": "-", "→": "->"}
_ENCODING_ERRORS = "mikv.plain"


def visible(text: str, before: str = "") -> str:
    """`text` with its control characters, newline and tab excepted, spelled out: `\\x1b`, `\\u202e`.

    Goes character by character, so no sequence passes in two pieces; `before` is the piece in front of this one.
    """
    if text.isprintable():
        return text
    shown = []
    for character in text:
        shown.append(_spell(character) if _is_hidden(character, before[-1:]) else character)
        before = character
    return "".join(shown)


def _is_hidden(character: str, before: str) -> bool:
    if character in "\n\t" or unicodedata.category(character) not in _HIDDEN:
        return False
    is_joining = character in _JOINERS and before > "\x7f" and unicodedata.category(before)[0] in "LMS"
    return not is_joining


def _spell(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class _Terminal(Console):
    """Strings are text and not markup; a `Text` is the program's own."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where tables and notes are printed. Square brackets have no meaning there: style with `style=` or a `Text`."""
    return _Terminal(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


def writer() -> Callable[[str], None]:
    """Writes the pieces of a stream to stdout as they come."""
    before = ""

    def write(text: str) -> None:
        nonlocal before
        typer.echo(visible(text, before), nl=False)
        before = text or before

    return write


@contextmanager
def spinner(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is being done, if that is a terminal and `quiet` is False."""
    err = console(stderr=True)
    if quiet or not err.is_terminal:
        yield lambda what: None
        return
    with err.status("") as status:
        yield lambda what: status.update(Text(visible(what)))


@contextmanager
def plain_where_unicode_ends() -> Iterator[None]:
    """Meanwhile stdout and stderr spell out what their encoding lacks, such as ASCII or a file name that is no text."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    former = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_ENCODING_ERRORS)
    try:
        yield
    finally:
        for stream, errors in zip(streams, former, strict=True):
            with suppress(ValueError):  # closed meanwhile
                stream.reconfigure(errors=errors or "strict")


def _without_unicode(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_WITHOUT_UNICODE.get(character) or _spell(character) for character in text), error.end


codecs.register_error(_ENCODING_ERRORS, _without_unicode)


def log_visibly() -> None:
    """From now on log records of all libraries, which name tensors and files, are spelled out too."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        made.msg, made.args = visible(made.getMessage()), ()
        return made

    logging.setLogRecordFactory(record)
