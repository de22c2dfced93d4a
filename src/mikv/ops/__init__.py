"""The operations on packed tiers and weights, one signature for every backend: native kernels for the CPU, PyTorch for
the rest."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from mikv.arithmetic import own_arithmetic
from mikv.ops import cpu, fallback, matmul, native
from mikv.ops.matmul import MatmulShape, arrange, restore
from mikv.ops.segments import AttentionOptions, attend_unpacked, visible
from mikv.ops.views import TierView

__all__ = [
    "AttentionOptions",
    "MatmulShape",
    "TierView",
    "append",
    "arrange",
    "attend",
    "attend_unpacked",
    "demote",
    "lut_matmul",
    "pack",
    "restore",
    "score_prompt",
    "unpack",
    "visible",
]

P = ParamSpec("P")
R = TypeVar("R")


def _by_device(compiled: Callable[P, R], twin: Callable[P, R], has_gradients: bool = False) -> Callable[P, R]:
    """The operation that suits the device of its first argument, a tensor or a tier."""
    reference = own_arithmetic(twin if has_gradients else torch.no_grad()(twin))
    if native.module is None:
        return reference

    @functools.wraps(reference)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        where = args[0]
        assert hasattr(where, "device")
        return compiled(*args, **kwargs) if where.device.type == "cpu" else reference(*args, **kwargs)

    return chosen


attend = _by_device(cpu.attend, fallback.attend)
append = _by_device(cpu.append, fallback.append)
pack = _by_device(cpu.pack, fallback.pack)
unpack = _by_device(cpu.unpack, fallback.unpack)
demote = _by_device(cpu.demote, fallback.demote)
score_prompt = _by_device(cpu.score_prompt, fallback.score_prompt)
lut_matmul = _by_device(cpu.lut_matmul, matmul.lut_matmul, has_gradients=True)
