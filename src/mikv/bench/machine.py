"""What a measurement ran on: processor, kernels in use, threads, versions. The circumstances of every record."""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch

from mikv.errors import ConfigError
from mikv.ops import native
from mikv.processor import cpu_model

_PACKAGES = ("mikv", "torch", "transformers", "optimum-quanto", "hqq", "llama-cpp-python", "onnxruntime")


def circumstances(command: str) -> dict[str, Any]:
    """Threads, hardware, instruction set, versions and the command, as JSON types."""
    return {
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "isa": instruction_set(),
        "versions": {"python": platform.python_version()} | _versions(),
        "command": command,
    }


def hardware() -> str:
    """The processor's name and how many cores this machine sees."""
    return f"{cpu_model()}, {os.cpu_count() or '?'} cores"


def instruction_set() -> str:
    """The instruction set of mikv's kernels, or that of PyTorch if those are what computes."""
    kernels = native_kernels()
    fallback = f"PyTorch reference, {torch.backends.cpu.get_cpu_capability()}"
    return fallback if kernels is None else str(kernels.isa())


def native_kernels() -> ModuleType | None:
    """The module with the native kernels, or None if PyTorch computes attention."""
    return native.module


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """PyTorch, and the kernels that follow it, on `count` threads; None leaves them. Raises ConfigError."""
    former = torch.get_num_threads()
    cores = os.cpu_count()
    if count is not None and (count < 1 or (cores and count > cores)):
        raise ConfigError(f"--threads {count} must be between 1 and the {cores} cores of this machine")
    torch.set_num_threads(count or former)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def command_line(command: str, options: Mapping[str, Any]) -> str:
    """`mikv bench generate --contexts 64,4096`: the command with all options that are not None."""
    given = [f"--{name} {value}" for name, value in options.items() if value is not None]
    return " ".join([f"mikv bench {command}", *given])


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
