"""The fields of a config.json: which must be there, and what each may hold. Knows no shapes.

What lacks is refused by name (UnsupportedModelError: nothing is guessed), what is malformed too (CheckpointError).
"""

from collections.abc import Callable, Mapping
from typing import Any

from mikv.cache.settings import is_count
from mikv.choices import shown
from mikv.errors import CheckpointError, UnsupportedModelError
from mikv.plan.built import FAMILIES as BUILT

COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# fields that must be there besides the common ones; transformers' defaults for them are not derived from the others
REQUIRED = {
    "llama": ("intermediate_size",),
    "mistral": ("intermediate_size", "num_key_value_heads"),
    "qwen2": ("intermediate_size", "num_key_value_heads"),
    "qwen3": ("intermediate_size", "num_key_value_heads", "head_dim"),
    "opt": ("ffn_dim", "max_position_embeddings"),
    "gpt_neox": ("intermediate_size",),
    **dict.fromkeys(BUILT, ("intermediate_size", "num_key_value_heads", "head_dim")),
    "mixtral": ("intermediate_size", "num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
    "qwen3_moe": ("moe_intermediate_size", "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"),
}
_MOST_LAYERS = 10_000
_SIZES = (
    *COMMON,
    *("intermediate_size", "moe_intermediate_size", "ffn_dim", "word_embed_proj_dim", "max_position_embeddings"),
    *("num_key_value_heads", "head_dim", "num_local_experts", "num_experts", "num_experts_per_tok"),
    *("sliding_window", "decoder_sparse_step", "attention_chunk_size"),
)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


def require_fields(name: str, family: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for fields that lack, CheckpointError for those that cannot be meant."""
    required = (*COMMON, *REQUIRED[family])
    if any(config.get(field) is None for field in required):
        raise UnsupportedModelError(
            f"the configuration of {name} ({family}) lacks {missing(config, required)}; add it, nothing is guessed"
        )
    for field, value in config.items():
        if value is not None and (problem := _problem(field, value)):
            raise CheckpointError(f"the configuration of {name} is damaged: {field}={shown(value)} is not {problem}")
    _require_consistent(name, config)


def missing(config: Mapping[str, Any], fields: tuple[str, ...]) -> str:
    """The fields that are no positive whole number."""
    return ", ".join(field for field in fields if not (is_count(config.get(field)) and config[field]))


def _problem(field: str, value: object) -> str | None:
    """What the field must hold, if it does not."""
    if field == "num_hidden_layers" and is_count(value) and value > _MOST_LAYERS:  # type: ignore[operator]
        return f"a number of layers, {_MOST_LAYERS:,} at most"
    if field in _SIZES:
        return None if is_count(value) and value else "a positive whole number"
    if field == "max_window_layers":
        return None if is_count(value) else "a whole number, 0 or more"
    if field in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    expected = _OTHERS.get(field)
    return None if expected is None or expected[0](value) else expected[1]


def _is_list_of(kind: type) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)
    )


_OTHERS: dict[str, tuple[Callable[[object], bool], str]] = {
    "layer_types": (_is_list_of(str), "a list with the type of every layer"),
    "mlp_only_layers": (_is_list_of(int), "a list of layer numbers"),
    "dtype": (lambda value: isinstance(value, str), "the name of a dtype"),
    "torch_dtype": (lambda value: isinstance(value, str), "the name of a dtype"),
    "quantization_config": (lambda value: isinstance(value, Mapping), "an object"),
}


def _require_consistent(name: str, config: Mapping[str, Any]) -> None:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads") or heads
    types = config.get("layer_types")
    problem = None
    if heads % kv_heads:
        problem = f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
    elif config.get("head_dim") is None and config["hidden_size"] % heads:
        problem = f"hidden_size={config['hidden_size']} is not a multiple of num_attention_heads={heads}"
    elif types is not None and len(types) != layers:
        problem = f"layer_types has {len(types)} layers, num_hidden_layers={layers}"
    elif config.get("num_experts_per_tok") and _num_experts(config) < config["num_experts_per_tok"]:
        problem = f"num_experts_per_tok={config['num_experts_per_tok']} is more than the {_num_experts(config)} experts"
    if problem:
        raise CheckpointError(f"the configuration of {name} is damaged: {problem}")


def _num_experts(config: Mapping[str, Any]) -> int:
    return config.get("num_local_experts") or config.get("num_experts") or config["num_experts_per_tok"]
