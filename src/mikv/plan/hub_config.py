"""A model's configuration, as the hub has it, becomes a ModelShape. What is not known for certain is refused.

Reads the plain dictionary, because transformers fills fields that are missing with defaults of another model.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mikv.cache.geometry import FULL_ATTENTION, CacheGeometry, refuse_latent_attention
from mikv.errors import CheckpointError, UnsupportedModelError
from mikv.plan.built import FAMILIES, built_shape
from mikv.plan.hub_fields import COMMON, REQUIRED, missing, require_fields
from mikv.plan.shapes import ModelShape

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_MIXTURES = ("mixtral", "qwen3_moe")
_UNGATED = ("opt", "gpt_neox")
# the text parts of models that see are those of other families
_TEXT = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe"}
_OF_THE_WHOLE = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
_OF_THE_CACHE = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("layer_types", "sliding_window", "attention_chunk_size", "model_type", "dtype"),
)
_ELSEWHERE = ("vision_config", "audio_config")


def shape_of_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a configuration describes, of the text part if the model also sees or hears.

    Raises UnsupportedModelError for architectures that are not in REQUIRED, naming what is missing, CheckpointError for
    fields that cannot be meant.
    """
    others = [field for field in _ELSEWHERE if config.get(field)]
    config = _text_part(name, config)
    family = _known_family(name, config)
    common: dict[str, Any] = {
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "float16").removeprefix("torch."),
        "quantization": config.get("quantization_config"),
        "left_out": ", ".join(field.removesuffix("_config") for field in others),
    }
    if family in FAMILIES:
        return replace(built_shape(name, config), **common)
    geometry = _geometry(family, config)
    num_experts = config["num_experts"] if family in _MIXTURES else 0
    return ModelShape(
        name=name,
        hidden_size=config["hidden_size"],
        intermediate_size=config[_inner_field(family)],
        num_heads=config["num_attention_heads"],
        num_kv_heads=geometry.layers[0].num_kv_heads,
        head_dim=geometry.layers[0].head_dim,
        vocab_size=config["vocab_size"],
        is_gated=family not in _UNGATED,
        is_tied=bool(_or_else(config.get("tie_word_embeddings"), family == "opt")),
        small_parameters=_small_parameters(family, config, geometry, num_experts),
        layers=geometry.layers,
        context_length=config.get("max_position_embeddings"),
        num_experts=num_experts,
        experts_per_token=config["num_experts_per_tok"] if num_experts else 0,
        **common,
    )


def _text_part(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's fields of a model that also sees or hears, with what only the whole says."""
    own = _or_else(config.get("text_config"), config)
    if not isinstance(own, Mapping):
        raise CheckpointError(f"the configuration of {name} is damaged: text_config={own!r} is not an object")
    outer = {field: config[field] for field in _OF_THE_WHOLE if own.get(field) is None and field in config}
    family = own.get("model_type")
    if isinstance(family, str):
        outer["model_type"] = _TEXT.get(family.removesuffix("_text"), family)
    if own.get("num_experts") is None and "num_local_experts" in own:  # transformers writes either
        outer["num_experts"] = own["num_local_experts"]
    return {**own, **outer}


def _known_family(name: str, config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    refuse_latent_attention(SimpleNamespace(**{str(field): value for field, value in config.items()}))
    if family not in _MIXTURES and any(config.get(field) for field in _EXPERTS):
        raise UnsupportedModelError(
            f"{name} ({family}) has a mixture of experts, of which each token reads a part; "
            f"those of {' and '.join(_MIXTURES)} are supported"
        )
    if not isinstance(family, str) or family not in REQUIRED:
        lacking = missing(config, (*COMMON, "num_key_value_heads", "head_dim", "intermediate_size"))
        raise UnsupportedModelError(
            f"model_type {family!r} of {name} is not one of {', '.join(REQUIRED)}"
            + (f", and its configuration lacks {lacking}" if lacking else "")
            + "; plan for a named shape of the same size instead"
        )
    require_fields(name, family, config)
    if family == "opt" and _or_else(config.get("word_embed_proj_dim"), config["hidden_size"]) != config["hidden_size"]:
        raise UnsupportedModelError(f"{name} projects its embeddings (word_embed_proj_dim); not supported")
    if config.get("per_layer_config") and family not in FAMILIES:
        raise UnsupportedModelError(f"{name} has layers that differ (per_layer_config); not supported")
    if config.get("mlp_only_layers") or _or_else(config.get("decoder_sparse_step"), 1) != 1:
        raise UnsupportedModelError(f"{name} has experts in some layers only (decoder_sparse_step); not supported")
    return family


def _geometry(family: str, config: Mapping[str, Any]) -> CacheGeometry:
    """Windows as transformers reads them: of Qwen's layers from `max_window_layers` on, and only where switched on."""
    changes: dict[str, Any] = {}
    if family.startswith("qwen"):
        switched_on = bool(config.get("use_sliding_window"))
        changes["sliding_window"] = config.get("sliding_window", 4096) if switched_on else None
        if family != "qwen3_moe" and config.get("layer_types") is None:
            first = _or_else(config.get("max_window_layers"), 28)
            windowed = changes["sliding_window"] is not None
            changes["layer_types"] = [
                "sliding_attention" if windowed and i >= first else FULL_ATTENTION
                for i in range(config["num_hidden_layers"])
            ]
    elif family == "mistral" and "sliding_window" not in config:
        changes["sliding_window"] = 4096
    fields = {field: config[field] for field in _OF_THE_CACHE if field in config}
    return CacheGeometry.from_model_config(SimpleNamespace(**{**fields, **changes}))


def _small_parameters(family: str, config: Mapping[str, Any], geometry: CacheGeometry, num_experts: int) -> int:
    """Norms, biases, learned positions, and the routers of experts."""
    hidden, layers, layer = config["hidden_size"], config["num_hidden_layers"], geometry.layers[0]
    queries, keys = config["num_attention_heads"] * layer.head_dim, layer.num_kv_heads * layer.head_dim
    if family in _UNGATED:  # layer norms have two vectors; every matrix has a bias
        positions = config["max_position_embeddings"] + 2 if family == "opt" else 0
        return layers * (9 * hidden + config[_inner_field(family)]) + (2 + positions) * hidden
    per_layer = 2 * hidden + num_experts * hidden
    if family == "qwen2" or config.get("attention_bias"):
        per_layer += queries + 2 * keys + (0 if family == "qwen2" else hidden)
    if config.get("mlp_bias"):
        per_layer += 2 * config["intermediate_size"] + hidden
    if family in ("qwen3", "qwen3_moe"):
        per_layer += 2 * layer.head_dim
    return layers * per_layer + hidden


def _inner_field(family: str) -> str:
    return {"opt": "ffn_dim", "qwen3_moe": "moe_intermediate_size"}.get(family, "intermediate_size")


def _or_else(value: Any, default: Any) -> Any:
    return default if value is None else value
