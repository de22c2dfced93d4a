"""Tasks by name, one per file: `parse_task("needle:length=500+1000,depths=5")`."""

from dataclasses import fields
from typing import Any, get_type_hints

from mikv.choices import did_you_mean
from mikv.errors import ConfigError
from mikv.lab.tasks.base import Task
from mikv.lab.tasks.humaneval import HumanEval
from mikv.lab.tasks.line_retrieval import LineRetrieval
from mikv.lab.tasks.multi_key import MultiKey
from mikv.lab.tasks.multi_turn import MultiTurn
from mikv.lab.tasks.needle import Needle
from mikv.lab.tasks.passkey import Passkey
from mikv.lab.tasks.system_prompt import SystemPrompt
from mikv.lab.tasks.text import Text
from mikv.lab.tasks.variable_tracking import VariableTracking

_TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        LineRetrieval,
        Passkey,
        Needle,
        VariableTracking,
        MultiKey,
        MultiTurn,
        SystemPrompt,
        HumanEval,
        Text,
    )
}


def task_names() -> tuple[str, ...]:
    """The names of all tasks."""
    return tuple(_TASKS)


def parse_task(spec: str, *, allow_code_execution: bool = False) -> Task:
    """The task `NAME` or `NAME:option=value,option=value`; several numbers are joined with `+`.

    Raises ConfigError for an unknown name or option, a value that cannot work, and a task that runs code if that is
    not allowed.
    """
    name, colon, settings = spec.partition(":")
    if name not in _TASKS:
        raise ConfigError(f"unknown task {name!r}; the tasks are {', '.join(_TASKS)}{did_you_mean(name, _TASKS)}")
    task = _TASKS[name]
    if task.runs_code and not allow_code_execution:
        raise ConfigError(f"task {name!r} runs code that the model has written; allow it with --allow-code-execution")
    if colon and not settings:
        raise ConfigError(f"task {spec!r} ends in a colon; write {name}, or {name}:option=value")
    try:
        return task(**_options(task, settings))
    except ConfigError as error:
        raise ConfigError(f"task {spec!r}: {error}") from error


def _options(task: type[Task], settings: str) -> dict[str, Any]:
    types = get_type_hints(task)
    known = [option.name for option in fields(task)]
    options: dict[str, Any] = {}
    for setting in settings.split(",") if settings else ():
        option, equals, value = setting.partition("=")
        if option not in known:
            near = did_you_mean(option, known)
            raise ConfigError(f"unknown option {option!r}; the options are {', '.join(known)}{near}")
        if not equals:
            raise ConfigError(f"option {option!r} has no value; write {option}=VALUE")
        if option in options:
            raise ConfigError(f"option {option!r} is given twice")
        options[option] = _value(option, value, types[option])
    return options


def _value(option: str, value: str, type_: Any) -> Any:
    if type_ is str:
        return value
    try:
        return int(value) if type_ is int else tuple(int(number) for number in value.split("+"))
    except ValueError as error:
        expected = "a whole number" if type_ is int else "whole numbers joined with +"
        raise ConfigError(f"{option}={value!r} is not {expected}") from error
