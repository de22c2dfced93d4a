"""A model's configuration, as the hub has it, becomes a ModelShape. What is not known for certain is refused.

Reads the plain dictionary, because transformers fills fields that are missing with defaults of another model.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from mikv.cache.geometry import CacheGeometry, refuse_latent_attention
from mikv.errors import UnsupportedModelError
from mikv.plan.shapes import ModelShape

_COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# fields that must be there besides the common ones; transformers' defaults for them are not derived from the others
REQUIRED = {
    "llama": ("intermediate_size",),
    "mistral": ("intermediate_size", "num_key_value_heads"),
    "qwen2": ("intermediate_size", "num_key_value_heads"),
    "qwen3": ("intermediate_size", "num_key_value_heads", "head_dim"),
    "opt": ("ffn_dim", "max_position_embeddings"),
    "gpt_neox": ("intermediate_size",),
}
_UNGATED = ("opt", "gpt_neox")


def shape_of_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a configuration describes.

    Raises UnsupportedModelError for architectures that are not in REQUIRED, experts among them, naming what is missing.
    """
    family = _known_family(name, config)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    geometry = _geometry(config)
    return ModelShape(
        name=name,
        hidden_size=hidden,
        intermediate_size=config["ffn_dim" if family == "opt" else "intermediate_size"],
        num_heads=heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=config["vocab_size"],
        is_gated=family not in _UNGATED,
        is_tied=bool(config.get("tie_word_embeddings", family == "opt")),
        small_parameters=_small_parameters(family, config, geometry),
        layers=geometry.layers,
        context_length=config.get("max_position_embeddings"),
        dtype=_dtype(config),
        quantization=config.get("quantization_config"),
    )


def _known_family(name: str, config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    refuse_latent_attention(SimpleNamespace(**config))
    if any(config.get(field) for field in _EXPERTS):
        raise UnsupportedModelError(f"{name} has a mixture of experts, of which each token reads a part; not supported")
    if family not in REQUIRED:
        missing = _missing(config, (*_COMMON, "num_key_value_heads", "head_dim", "intermediate_size"))
        raise UnsupportedModelError(
            f"model_type {family!r} of {name} is not one of {', '.join(REQUIRED)}"
            + (f", and its configuration lacks {missing}" if missing else "")
            + "; plan for a named shape of the same size instead"
        )
    if missing := _missing(config, (*_COMMON, *REQUIRED[family])):
        raise UnsupportedModelError(
            f"the configuration of {name} ({family}) lacks {missing}; add it, nothing is guessed"
        )
    if family == "opt" and config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
        raise UnsupportedModelError(f"{name} projects its embeddings (word_embed_proj_dim); not supported")
    return str(family)


def _missing(config: Mapping[str, Any], fields: tuple[str, ...]) -> str:
    """The fields that are no positive whole number."""
    return ", ".join(
        field
        for field in fields
        if isinstance(config.get(field), bool) or not isinstance(config.get(field), int) or config[field] < 1
    )


def _geometry(config: Mapping[str, Any]) -> CacheGeometry:
    windowless = {"sliding_window": None} if config.get("use_sliding_window") is False else {}
    return CacheGeometry.from_model_config(SimpleNamespace(**{**config, **windowless}))


def _small_parameters(family: str, config: Mapping[str, Any], geometry: CacheGeometry) -> int:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    queries = config["num_attention_heads"] * geometry.head_dim
    keys = geometry.num_kv_heads * geometry.head_dim
    if family in _UNGATED:  # layer norms have two vectors; every matrix has a bias
        inner = config["ffn_dim" if family == "opt" else "intermediate_size"]
        positions = config["max_position_embeddings"] + 2 if family == "opt" else 0
        return layers * (9 * hidden + inner) + (2 + positions) * hidden
    per_layer = 2 * hidden
    if family == "qwen2" or config.get("attention_bias"):
        per_layer += queries + 2 * keys + (0 if family == "qwen2" else hidden)
    if config.get("mlp_bias"):
        per_layer += 2 * config["intermediate_size"] + hidden
    if family == "qwen3":
        per_layer += 2 * geometry.head_dim
    return layers * per_layer + hidden


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float16").removeprefix("torch.")
