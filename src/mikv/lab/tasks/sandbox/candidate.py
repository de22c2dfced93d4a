"""The process that runs a program and answers calls of its functions. Nothing in it is secret, or believed."""

import ast
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import ModuleType

from mikv.lab.tasks.sandbox.confine import forbid_files, forbid_the_machine, limit
from mikv.lab.tasks.sandbox.messages import receive, send

# what the standard library imports only when it is used
_USED_LATER = (
    *("encodings.ascii", "encodings.idna", "encodings.latin_1", "encodings.utf_16", "encodings.utf_32"),
    *("_strptime", "linecache", "unicodedata"),
)


def main(requests: int, answers: int, cpu_seconds: int) -> None:
    """Give up all rights, run the program that comes first, then answer calls until there are no more."""
    silence()
    limit(cpu_seconds)
    forbid_the_machine()
    program = receive(requests)
    load_imports_of(program)
    forbid_files()
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    _answer(answers, lambda: exec(compile(program, "program", "exec"), module.__dict__))
    while True:
        _answer(answers, partial(_call, module, *receive(requests)))


def _call(module: ModuleType, function: str, arguments: tuple[object, ...], named: dict[str, object]) -> object:
    return module.__dict__[function](*arguments, **named)


def silence() -> None:
    """Point the standard streams nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def load_imports_of(program: str) -> None:
    """Import what a program imports of the standard library: afterwards it can open no file."""
    for name in (*_USED_LATER, *_imported(program)):
        # anything that an import raises, the program will raise again, or not need
        with suppress(BaseException):
            importlib.import_module(name)


def _imported(program: str) -> Iterator[str]:
    try:
        nodes = list(ast.walk(ast.parse(program)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # __import__("math")
            names = [node.value]
        yield from (name for name in names if name.partition(".")[0] in sys.stdlib_module_names)


def _answer(answers: int, call: Callable[[], object]) -> None:
    try:
        message: tuple[str, object] = ("value", call())
        send(answers, message)
    except BaseException as error:
        send(answers, ("raised", type(error).__name__))
