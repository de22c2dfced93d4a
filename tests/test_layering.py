"""Imports inside mikv point downwards only: numbers < ops < cache < integrations < app."""

import ast
from pathlib import Path

import pytest

import mikv

PACKAGE = Path(mikv.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# The layer of every file or folder directly under mikv. A layer may import itself and what is below it.
ROOMS = (
    {"arithmetic", "errors", "choices", "atomic_file", "processor", "_native"},
    {"formats", "packing", "transforms", "reference"},
    {"ops"},
    {"cache", "weights"},
    {"integrations"},
    {"bench", "cache_names", "chat_template", "lab", "models", "model_folder", "gguf_model", "plan", "records", "cli"},
)
LAYERS = {room: layer for layer, rooms in enumerate(ROOMS) for room in rooms}
TOP = len(ROOMS) - 1


def room_of(path: Path) -> str:
    """`cache/tiers.py` is in the room `cache`."""
    return path.parts[0].removesuffix(".py")


def layer_of(module: str) -> int:
    """The layer of `mikv.cache.tiers` is that of `cache`; the public names of `mikv` itself lead anywhere."""
    room = module.split(".")[1:2]
    return LAYERS.get(room[0], TOP) if room else TOP


def imported_modules(source: str, package: str = "mikv") -> set[str]:
    """Modules of mikv that a source imports anywhere: at the top, in functions, and for annotations only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from mikv import formats` imports the module mikv.formats
            found |= {
                f"{node.module}.{alias.name}" if node.module == package else str(node.module) for alias in node.names
            }
    return {name for name in found if name.split(".")[0] == package}


def upward_imports(path: Path, source: str) -> list[str]:
    """The imports of a file, given relative to the package, that do not point downwards."""
    return sorted(name for name in imported_modules(source) if layer_of(name) > LAYERS[room_of(path)])


@pytest.mark.parametrize("path", [path for path in MODULES if path != Path("__init__.py")], ids=str)
def test_imports_point_downwards(path: Path) -> None:
    assert room_of(path) in LAYERS, f"{path} is in no layer: add it to the table in this test"
    upward = upward_imports(path, (PACKAGE / path).read_text(encoding="utf-8"))
    assert not upward, f"mikv/{path} imports {', '.join(upward)}, which is above it"


@pytest.mark.parametrize(
    ("path", "source", "upward"),
    [
        ("formats.py", "from mikv.ops import attend", ["mikv.ops"]),
        ("ops/cpu.py", "def f():\n    import mikv.cache.tiers", ["mikv.cache.tiers"]),
        ("cache/tiers.py", "if TYPE_CHECKING:\n    from mikv.integrations import x", ["mikv.integrations"]),
        ("cache/tiers.py", "from mikv import MiKVConfig, lab", ["mikv.MiKVConfig", "mikv.lab"]),
        ("integrations/vllm.py", "from mikv.lab.tasks import x", ["mikv.lab.tasks"]),
        ("errors.py", "import mikv.errors, mikv.packing", ["mikv.packing"]),
        ("cache/config.py", "def f():\n    from mikv.cache.accounting import g\n    import torch", []),
        ("packing.py", "import mikv", ["mikv"]),
        ("cli/main.py", "import mikv.lab, mikv.errors\nfrom mikv import __version__, formats", []),
    ],
)
def test_the_check_sees_every_way_to_import(path: str, source: str, upward: list[str]) -> None:
    assert upward_imports(Path(path), source) == upward


@pytest.mark.parametrize("room", ["formats", "packing", "transforms", "reference", "ops", "cache", "weights"])
def test_transformers_is_imported_by_integrations_only(room: str) -> None:
    for path in MODULES:
        if room_of(path) != room:
            continue
        tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] == "transformers"}, path
