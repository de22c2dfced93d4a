"""No tensor is made with the dtype or on the device that somebody else chose to be the default."""

import ast
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import mikv

PACKAGE = Path(mikv.__file__).parent
COVERED = [
    *(PACKAGE / name for name in ("formats.py", "packing.py", "reference.py", "transforms.py")),
    *(path for room in ("cache", "ops", "weights", "integrations") for path in sorted((PACKAGE / room).rglob("*.py"))),
]
# every function of PyTorch that a default device changes; those that only wrap what exists name theirs by it
FACTORIES = {function.__name__ for function in _device_constructors()} | {"Tensor", "FloatTensor"}


def faults(source: str) -> list[str]:
    """Calls of factories of `source` that leave dtype or device to the process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if not isinstance(function, ast.Attribute) or ast.unparse(function.value) != "torch":
            continue
        if function.attr in FACTORIES:
            missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
            if missing:
                found.append(f"line {node.lineno}: {ast.unparse(node)} names no {' and no '.join(sorted(missing))}")
    return found


@pytest.mark.parametrize("path", COVERED, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_factory_names_dtype_and_device(path: Path) -> None:
    assert not faults(path.read_text(encoding="utf-8"))


def test_a_factory_without_either_is_found() -> None:
    assert len(faults("torch.zeros(3)\ntorch.arange(3, dtype=torch.int64)\ntorch.ones(3, device=x.device)")) == 3
    assert not faults("torch.zeros(3, dtype=x.dtype, device=x.device)\ntorch.zeros_like(x)\nx.new_empty(3)")
