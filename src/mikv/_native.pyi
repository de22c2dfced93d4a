"""The native kernels (csrc/bindings.cpp). Tensors are passed as DLPack capsules; `mikv.ops.cpu` is the only user."""

from collections.abc import Sequence
from typing import Any

_Array = Any
_Tier = tuple[list[_Array], _Array, _Array, list[int]]
_Transforms = tuple[_Array | None, _Array | None, _Array | None, int, int]

LEVELS: tuple[list[int], list[int], list[int]]
STEPS: tuple[float, float, float]

def attend(
    queries: _Array,
    keys: _Array,
    values: _Array,
    mask: _Array | None,
    high: _Tier,
    low: _Tier | None,
    transforms: _Transforms,
    scale: float,
    softcap: float,
    sinks: _Array | None,
    query_weight: _Array | None,
    exact: bool,
    num_threads: int,
    output: _Array,
    received_high: _Array | None,
    received_new: _Array | None,
) -> None: ...
def pack(
    tier: _Tier,
    row: int,
    first_slot: int,
    keys: _Array,
    values: _Array,
    transforms: _Transforms,
    num_threads: int,
) -> int: ...
def append(
    high: _Tier,
    score: _Array,
    position: _Array,
    keys: _Array,
    values: _Array,
    scores: _Array,
    first_positions: list[int],
    transforms: _Transforms,
    num_threads: int,
) -> int: ...
def unpack(tier: _Tier, row: int, slots: _Array, keys: _Array, values: _Array, num_threads: int) -> None: ...
def demote(
    high: _Tier,
    low: _Tier | None,
    score: _Array,
    position: _Array,
    row: int,
    slots: _Array,
    head_dim: int,
    transforms: _Transforms,
    num_threads: int,
) -> int: ...
def score_prompt(
    queries: _Array,
    keys: _Array,
    mask: _Array | None,
    scale: float,
    softcap: float,
    sinks: _Array | None,
    query_weight: _Array | None,
    stride: int,
    distance: int,
    num_threads: int,
    received: _Array,
) -> None: ...
def matmul(
    inputs: _Array,
    codes: _Array,
    scales: _Array,
    bias: _Array | None,
    sizes: Sequence[int],
    path: int,
    num_threads: int,
    output: _Array,
) -> None: ...
def stream(data: _Array, num_threads: int) -> int: ...
def isa() -> str: ...
def isas_compiled() -> list[str]: ...
def isas_available() -> list[str]: ...
def use_isa(name: str) -> None: ...
def thread_provider() -> str: ...
