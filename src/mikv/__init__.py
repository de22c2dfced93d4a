"""mikv shrinks what an LLM keeps in memory: a KV cache of mixed precision (arXiv 2402.18096) that forgets nothing, and
binary-coded weights (arXiv 2206.09557).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mikv.errors import (
    CacheStateError,
    CheckpointError,
    ConfigError,
    MiKVError,
    ModelNotFoundError,
    NumericsError,
    UnsupportedModelError,
)
from mikv.integrations.discovery import announce as _announce

if TYPE_CHECKING:
    from mikv.cache.config import MiKVConfig
    from mikv.cache.policies import register_policy
    from mikv.cache.policies.base import ImportancePolicy
    from mikv.integrations.quantizer import BCQConfig, quantize
    from mikv.integrations.transformers import MemoryReport, MiKVCache
    from mikv.integrations.transformers.attach import attach, detach

__version__ = "0.1.0"

__all__ = [
    "BCQConfig",
    "CacheStateError",
    "CheckpointError",
    "ConfigError",
    "ImportancePolicy",
    "MemoryReport",
    "MiKVCache",
    "MiKVConfig",
    "MiKVError",
    "ModelNotFoundError",
    "NumericsError",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "detach",
    "quantize",
    "register_policy",
]

# Loaded on first use, so that `import mikv` costs neither PyTorch nor transformers.
_HOMES = {
    "BCQConfig": "mikv.integrations.quantizer",
    "ImportancePolicy": "mikv.cache.policies.base",
    "MemoryReport": "mikv.integrations.transformers",
    "MiKVCache": "mikv.integrations.transformers",
    "MiKVConfig": "mikv.cache.config",
    "attach": "mikv.integrations.transformers",
    "detach": "mikv.integrations.transformers",
    "quantize": "mikv.integrations.quantizer",
    "register_policy": "mikv.cache.policies",
}

_announce()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mikv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
