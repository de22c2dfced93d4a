"""The process that asks the candidate what the tests ask, and tells by its exit status whether they pass."""

import builtins
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from mikv.lab.tasks.sandbox import candidate
from mikv.lab.tasks.sandbox.confine import forbid_files, forbid_the_machine, limit
from mikv.lab.tasks.sandbox.messages import UnsendableError, receive, send

# exit statuses, none of which an interpreter ends with by itself
PASSED, FAILED, UNFIT = 80, 81, 82


def main(requests: int, answers: int, cpu_seconds: int) -> NoReturn:
    """Judge the program on stdin, a JSON object with `program`, `given`, `tests` and `entry_point`."""
    case = json.load(sys.stdin)
    candidate.silence()
    limit(cpu_seconds)
    forbid_the_machine()
    candidate.load_imports_of(case["given"] + case["tests"])
    forbid_files()
    os._exit(_judge(requests, answers, case))


def _judge(requests: int, answers: int, case: dict[str, str]) -> int:
    """Run the tests where the program is not. `given` are the functions of the task's own that they may call."""
    try:
        send(requests, case["program"])
        _value(receive(answers))
        if case["tests"]:
            asked = _remote(requests, answers, case["entry_point"])
            namespace: dict[str, Any] = {"__name__": "tests"}
            exec(compile(case["given"], "given", "exec"), namespace)
            namespace[case["entry_point"]] = asked
            exec(compile(case["tests"], "tests", "exec"), namespace)
            namespace["check"](asked)
    except UnsendableError:
        return UNFIT
    except BaseException:
        return FAILED
    return PASSED


def _remote(requests: int, answers: int, name: str) -> Callable[..., Any]:
    """The candidate's function of that name."""

    def call(*arguments: Any, **named: Any) -> Any:
        send(requests, (name, arguments, named))
        return _value(receive(answers))

    return call


def _value(answer: object) -> Any:
    match answer:
        case ("value", value):
            return value
        case ("raised", str(name)):
            kind = getattr(builtins, name, None)
            raise kind() if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError(name)
    raise ValueError("this is no answer")
