"""Makes transformers find mikv's quantizer in a saved model, without importing transformers for it.

transformers has no plugins: a `quant_method` that it does not know is skipped with a warning. So `import mikv` leaves a
note, which is read as soon as transformers' registry is there. Without `import mikv` the folder is refused by the shape
of a tensor, see `BCQQuantizer`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

QUANT_METHOD = "mikv_bcq"
_REGISTRY = "transformers.quantizers.auto"
_HOME = "mikv.integrations.quantizer"


def announce() -> None:
    """Register with transformers now, or when it is imported. Idempotent."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and hasattr(registry, "AUTO_QUANTIZER_MAPPING"):
        _register(registry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Lets the others find the registry, and registers once it has been executed; a mere look changes nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


class _Configuration:
    """Stands in for BCQConfig in the registry until a model needs it: importing it there would be circular."""

    @staticmethod
    def from_dict(settings: dict[str, Any], **kwargs: Any) -> Any:
        return import_module(_HOME).BCQConfig.from_dict(settings, **kwargs)


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    return import_module(_HOME).BCQQuantizer(*args, **kwargs)


def _register(registry: ModuleType) -> None:
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, _Configuration)
    registry.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, _quantizer)
