"""Runs programs that a model has written in confined processes (sandbox/), which this one never reads from."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from mikv.errors import ConfigError
from mikv.lab.tasks import sandbox
from mikv.lab.tasks.sandbox.judge import PASSED, UNFIT

# Imports sandbox/ and the standard library alone: empty packages stand in the place of ours, which import much more.
_BOOT = """
import sys, types
for name in ("mikv", "mikv.lab", "mikv.lab.tasks"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1]]
from mikv.lab.tasks.sandbox import {part}
{part}.main(*map(int, sys.argv[2:]))
"""
_STARTING_SECONDS = 3  # of two interpreters, on a busy machine


def require_sandbox() -> None:
    """Raise ConfigError if this machine cannot confine a program."""
    machine = f"{platform.system()} {platform.machine()}"
    if sys.platform != "linux" or platform.machine() not in sandbox.ALLOWED:
        raise ConfigError(f"code can be confined on Linux x86_64 and aarch64 only, and this is {machine}")
    if not succeeds("", seconds=10):
        raise ConfigError(
            f"code cannot be confined: the kernel of this machine ({machine}) does not filter system calls (seccomp)"
        )


def succeeds(program: str, seconds: int) -> bool:
    """Whether a Python program comes to its end: no exception, no exit, and within `seconds` of time and 1 GiB.

    It may import the standard library; it cannot open files or sockets, or start processes. A program that is out to
    deceive can claim its end before it is there. Where that matters, let `passes_tests` ask for results.
    """
    return _judged({"program": program, "given": "", "tests": "", "entry_point": ""}, seconds) == PASSED


def passes_tests(program: str, given: str, tests: str, entry_point: str, seconds: int) -> bool:
    """Whether a program's function `entry_point` passes `check(candidate)`, which `tests` define.

    The tests run in a process that the program cannot reach, with the functions of `given` beside them; the program
    gets arguments, and answers with values. Raises ConfigError for tests that pass more than data to the function.
    """
    case = {"program": program, "given": given, "tests": tests, "entry_point": entry_point}
    status = _judged(case, seconds)
    if status == UNFIT:
        raise ConfigError(f"the tests of {entry_point} call it with a value that cannot be sent to another process")
    return status == PASSED


def _judged(case: dict[str, str], seconds: int) -> int | None:
    """The judge's exit status; None if there was none in time."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        their_requests, requests = os.pipe()
        answers, their_answers = os.pipe()
        try:
            _start(stack, "candidate", (their_requests, their_answers), seconds, folder)
            judge = _start(stack, "judge", (requests, answers), seconds, folder)
        finally:
            for descriptor in (their_requests, requests, answers, their_answers):
                os.close(descriptor)
        with suppress(subprocess.TimeoutExpired):
            judge.communicate(json.dumps(case).encode(), timeout=seconds + _STARTING_SECONDS)
        return judge.poll()


def _start(stack: ExitStack, part: str, pipes: tuple[int, int], seconds: int, folder: str) -> subprocess.Popen[bytes]:
    """Start the judge or the candidate; it is killed when the stack is left."""
    # isolated, without site-packages, and without writing bytecode
    command = [sys.executable, "-I", "-S", "-B", "-c", _BOOT.format(part=part)]
    process = subprocess.Popen(
        [*command, str(Path(sandbox.__file__).parents[1]), *map(str, pipes), str(seconds)],
        stdin=subprocess.PIPE if part == "judge" else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        pass_fds=pipes,
        start_new_session=True,
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process
