"""Whether a model can be served, asked of its configuration and of the classes written for it before any work is done.

What these signs cannot tell is caught in the first step: keys and values in a cache refuse to be computed with, and
the model's own attention is compared with what the tiers compute.
"""

import inspect
import sys
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from mikv.cache.geometry import refuse_latent_attention, text_config
from mikv.errors import ConfigError, UnsupportedModelError
from mikv.integrations.transformers.versions import CACHE_ARGUMENT

_OWN_CACHE = "use transformers' own cache"


def configuration(model: Any) -> PreTrainedConfig:
    """The configuration of a model, or the configuration itself. Raises ConfigError for anything else."""
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(f"{type(model).__name__} is not a transformers configuration; pass model.config")
    return config


def require_supported(model_config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for a model that MiKVCache would get wrong, naming what it is about."""
    text = text_config(model_config)
    name = model_config.model_type or type(model_config).__name__
    if model_config.is_encoder_decoder or text.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} has an encoder, whose states its decoder attends to, too; {_OWN_CACHE}")
    refuse_latent_attention(text)
    if getattr(text, "cross_attention_layers", None) or getattr(text, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} has layers of cross-attention, which mikv does not support; {_OWN_CACHE}")
    classes = _classes_of(text)
    if any(not cls._supports_default_dynamic_cache() for cls in classes if hasattr(cls, "generate")):
        raise UnsupportedModelError(f"{name} keeps a cache of its own kind, which mikv cannot replace")
    if classes and not any(map(_has_interface, classes)):
        raise UnsupportedModelError(
            f"{name} computes its attention itself, not by way of transformers' attention interface; {_OWN_CACHE}"
        )


def require_attachable(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model whose `generate` would not use the cache that it is given."""
    require_supported(model.config)
    name = type(model).__name__
    if not model._supports_default_dynamic_cache():
        raise UnsupportedModelError(f"{name} keeps a cache of its own kind, which mikv cannot replace")
    if not {"past_key_values", CACHE_ARGUMENT} & set(inspect.signature(model.forward).parameters):
        raise UnsupportedModelError(f"the forward of {name} takes no cache, so there is nothing to compress")


def _has_interface(cls: Any) -> bool:
    # either flag alone is also found on classes that never look the function up
    return (cls._supports_attention_backend or cls._supports_sdpa) and cls._can_set_attn_implementation()


def _classes_of(config: PreTrainedConfig) -> list[Any]:
    """The model classes of transformers that are written for a configuration; none for code that comes with a model."""
    for base in type(config).__mro__:
        if ".configuration_" not in base.__module__ or not base.__module__.startswith("transformers."):
            continue
        name = base.__module__.replace(".configuration_", ".modeling_")
        try:
            module = sys.modules.get(name) or import_module(name)
        except ImportError:
            continue
        own: list[Any] = [value for value in vars(module).values() if isinstance(value, type)]
        own = [cls for cls in own if cls.__module__ == name and issubclass(cls, PreTrainedModel)]
        if found := [cls for cls in own if cls.config_class is base]:
            return found
    return []
