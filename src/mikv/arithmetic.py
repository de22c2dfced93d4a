"""Arithmetic of our own: float32 means float32, whatever a process asks of its models. Knows nothing about numbers.

Autocast turns products of float32 matrices into 16-bit ones, a matmul precision below "highest" does so on some
processors. A layer may want that of its weights; statistics, transforms and attention over what is stored do not.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")
# PyTorch 2.9 asks each backend for its precision; before, there was one for all
_MATMULS: tuple[Any, ...] = tuple(
    backend.matmul
    for backend in (torch.backends.mkldnn, torch.backends.cuda)
    if hasattr(getattr(backend, "matmul", None), "fp32_precision")
)


def own_arithmetic(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function multiply float32 as float32."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _INSIDE.own:
            return function(*args, **kwargs)
        _INSIDE.own = True  # asking costs as much as a small operation
        try:
            with _own_settings():
                return function(*args, **kwargs)
        finally:
            _INSIDE.own = False

    return exact


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Compute a tensor once per arguments, as if nothing were traced, faked or inferred: it serves all later calls."""

    @functools.lru_cache(maxsize=64)
    @functools.wraps(function)
    def computed(*args: Any, **kwargs: Any) -> R:
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            return function(*args, **kwargs)

    return computed  # type: ignore[return-value]


class _Inside(threading.local):
    """Whether this thread is in a function of ours already."""

    own = False


_INSIDE = _Inside()


class _Borrowed:
    """The process's precision while functions of ours run, in any number of threads."""

    lock = threading.Lock()
    users: ClassVar[int] = 0
    before: ClassVar[list[str]] = []


def _own_settings() -> ExitStack:
    stack = ExitStack()
    for device in _DEVICES:
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    if any(precision not in ("ieee", "none", "highest") for precision in _precision()):
        stack.enter_context(_full_precision())
    return stack


@contextmanager
def _full_precision() -> Iterator[None]:
    """Ask for whole float32 products; the last function to end gives back what was before the first."""
    with _Borrowed.lock:
        if not _Borrowed.users:
            _Borrowed.before = _precision()
            _set_precision(["ieee"] * len(_MATMULS) or ["highest"])
        _Borrowed.users += 1
    try:
        yield
    finally:
        with _Borrowed.lock:
            _Borrowed.users -= 1
            if not _Borrowed.users:
                _set_precision(_Borrowed.before)


def _precision() -> list[str]:
    return [matmul.fp32_precision for matmul in _MATMULS] or [torch.get_float32_matmul_precision()]


def _set_precision(precision: list[str]) -> None:
    if not _MATMULS:
        torch.set_float32_matmul_precision(precision[0])
    for matmul, each in zip(_MATMULS, precision, strict=False):
        matmul.fp32_precision = each
