"""Watches what PyTorch allocates: the size of every tensor storage that comes into being inside a `with` block."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationRecorder(TorchDispatchMode):
    """`largest` and `total` are bytes of new storages; views and in-place results are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.total = 0, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for address, nbytes in _storages(result).items():
            if address not in known:
                self.largest = max(self.largest, nbytes)
                self.total += nbytes
        return result


def largest_allocation(call: Callable[[], object]) -> int:
    """Bytes of the largest storage that `call` allocates."""
    with AllocationRecorder() as recorder:
        call()
    return recorder.largest


def total_allocation(call: Callable[[], object]) -> int:
    """Bytes of all storages that `call` allocates together."""
    with AllocationRecorder() as recorder:
        call()
    return recorder.total


def _storages(values: object) -> dict[int, int]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
