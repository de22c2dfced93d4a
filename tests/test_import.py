"""What `import mikv` costs and offers."""

import subprocess
import sys
from importlib.metadata import distribution

import pytest

import mikv

# In a fresh interpreter: what tests have imported already must not count.
HEAVY = ("torch", "transformers", "triton", "numpy", "safetensors", "typer", "rich", "gguf")


def run(code: str) -> str:
    """Standard output of `code` in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_no_library() -> None:
    loaded = run(f"import sys, mikv; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_import_torch_loads_nothing_of_mikv() -> None:
    code = "import sys, torch, transformers; print([name for name in sys.modules if name.split('.')[0] == 'mikv'])"
    assert run(code).strip() == "[]"
    finders = "print([finder for finder in sys.meta_path if type(finder).__module__.startswith('mikv.')])"
    assert run(f"import sys, torch, transformers; {finders}").strip() == "[]"


def test_no_entry_point_of_mikv_runs_in_the_processes_of_others() -> None:
    entry_points = {(point.group, point.name) for point in distribution("mikv").entry_points}
    assert entry_points == {("console_scripts", "mikv"), ("lm_eval.models", "mikv")}


def test_looking_for_the_registry_does_not_keep_it_from_being_registered() -> None:
    code = (
        "import mikv, importlib.util; importlib.util.find_spec('transformers.quantizers.auto');"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; import sys;"
        "print('mikv_bcq' in known, [f for f in sys.meta_path if type(f).__module__.startswith('mikv.')])"
    )
    assert run(code).strip() == "True []"


def test_errors_version_and_names_are_there_without_libraries() -> None:
    code = "import sys, mikv; mikv.ConfigError; mikv.__version__; dir(mikv); print('torch' in sys.modules)"
    assert run(code).strip() == "False"


def test_the_configuration_class_loads_no_library() -> None:
    code = f"import sys, mikv; mikv.MiKVConfig; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("name", mikv.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(mikv, name) is not None


def test_public_names_are_few_and_all_listed() -> None:
    """What is reachable as `mikv.name` without an underscore, submodules aside, is what `__all__` says."""
    assert len(mikv.__all__) <= 17
    assert mikv.__all__ == sorted(mikv.__all__)
    assert dir(mikv) == sorted(mikv.__all__)
    code = "import types, mikv; print([n for n, v in vars(mikv).items() if not isinstance(v, types.ModuleType)])"
    helpers = {"import_module", "TYPE_CHECKING", "Any"}
    reachable = {name for name in eval(run(code)) if not name.startswith("_")} - helpers
    assert reachable <= set(mikv.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mikv' has no attribute 'MikvCache'"):
        mikv.MikvCache  # noqa: B018


def test_every_error_is_a_mikv_error() -> None:
    errors = [
        value for name in mikv.__all__ if isinstance(value := getattr(mikv, name), type) and name.endswith("Error")
    ]
    assert len(errors) == 7
    assert all(issubclass(error, mikv.MiKVError) for error in errors)
