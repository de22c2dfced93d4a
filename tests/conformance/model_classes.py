"""Tiny random models of the classes that transformers can generate text with, shrunk by rules from their configurations.

A configuration is shrunk field by field: what a field means is read off its name (layers, heads, experts, sizes, special
tokens), and sub-configurations are shrunk alike. Families that have rules of their own stand in one table.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
HIDDEN = HEADS * HEAD_DIM
VOCAB = 192
FIRST_WORD, FIRST_SPECIAL = 8, 128  # words are between the tokens for padding and those for images and sounds
WINDOW = 16
POSITIONS = 512
MOST_PARAMETERS = 12_000_000

_MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")


def model_classes() -> dict[str, str]:
    """Model types of transformers by the name of the class they are read as; a class stands there once."""
    names: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for model_type, found in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).items():
            for name in (found,) if isinstance(found, str) else found:
                names.setdefault(name, model_type)
    return dict(sorted(names.items()))


# Fields by name: the first pattern that fits the whole name decides. A value that is None, or no number, stays.
_RULES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input", VOCAB),
    (r"(max|n|left_max|right_max)_(\w+_)?position(s|_embeddings)|n_ctx|max_seq(uence)?_len(gth)?|seq_length", POSITIONS),
    (r"max_(source|target)_positions", POSITIONS),
    (r"(\w+_)?(num|n)_(hidden_|encoder_|decoder_|sparse_encoder_|sparse_decoder_|\w+_)?layers?", 2),
    (r"(encoder|decoder)_layers|n_layer|n_layers|depth|resampler_depth|num_hidden_blocks", 2),
    (r"(\w+_)?(num_)?(key_value|kv)_heads|num_kv_heads|num_query_groups|multi_query_group_num", KV_HEADS),
    (r"(\w+_)?attention_heads|(\w+_)?num_heads|n_heads?|(\w+_)?n_heads", HEADS),
    (r"(\w+_)?head_dim|d_kv|kv_channels|(\w+_)?dim_head|attention_head_size|d_head|attention_head_dim", HEAD_DIM),
    (r"n_routed_experts|(\w+_)?num_(local_)?experts|num_moe_experts", 4),
    (r"(num|n)_experts_per_tok(en)?|(\w+_)?top_?k|moe_topk|num_selected_experts", 2),
    (r"n_group|topk_group|n_shared_experts|(\w+_)?num_shared_experts", 1),
    (r"kv_lora_rank|q_lora_rank", 32),
    (r"(\w+_)?intermediate_(size|dim)(_mlp)?|(\w+_)?ffn_dim|d_ff|ffn_dim|mlp_dim|n_inner|d_inner|(ffn|\w+)_hidden_size", HIDDEN),
    (r"hidden_size|d_model|n_embd|(\w+_)?embed_dim|emb_dim|embedding_size|(\w+_)?embedding_(size|dim)|dim", HIDDEN),
    (r"(\w+_)?hidden_(size|dim)|projection_dim|output_dim|lru_width", HIDDEN),
    (r"(attention_)?(sliding_)?window(_size)?|sliding_window_size|attention_chunk_size|local_attention", WINDOW),
    (r"image_size|crop_size", 56),
)


def tiny_config(config_class: type[PreTrainedConfig], own: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A small configuration of that class; `own` are settings of the family, dotted for those of a part."""
    own = dict(own or {}) | {}
    default = _default(config_class, own)
    settings: dict[str, Any] = {}
    specials = iter(range(FIRST_SPECIAL, VOCAB))
    for name in _field_names(config_class):
        value = default.__dict__.get(name)
        if isinstance(value, PreTrainedConfig):
            parts = {key.partition(".")[2]: new for key, new in own.items() if key.startswith(f"{name}.")}
            settings[name] = tiny_config(type(value), _own_settings(type(value)) | parts)
        elif re.fullmatch(r"\w+_token_(id|index)", name) and isinstance(value, int):
            settings[name] = next(specials)
        elif (small := _shrunk(name, value)) is not None:
            settings[name] = small
    settings |= _kv_heads(default, settings) | _layer_kinds(default) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
    settings = {name: value for name, value in settings.items() if name in _field_names(config_class)}
    return config_class(**settings | {key: value for key, value in own.items() if "." not in key})


def _default(config_class: type[PreTrainedConfig], own: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return config_class()
    except Exception:  # some have no working defaults
        return config_class(**{key: value for key, value in own.items() if "." not in key})


def _field_names(config_class: type[PreTrainedConfig]) -> list[str]:
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return [field.name for field in dataclasses.fields(config_class) if field.name not in base]


def _shrunk(name: str, value: Any) -> Any:
    """A small value for the field, or None where it keeps its own."""
    if name == "rope_parameters" or name == "rope_scaling":
        return _shrunk_rope(value)
    if name in ("initializer_range", "init_std", "initializer_factor"):
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return None


def _shrunk_rope(value: Any) -> Any:
    """Sections of a rotary embedding over several axes have to fill half of a head."""
    if not isinstance(value, dict):
        return None
    value = copy.deepcopy(value)
    for part in (value, *(part for part in value.values() if isinstance(part, dict))):
        if "mrope_section" in part:
            part["mrope_section"] = [HEAD_DIM // 4, HEAD_DIM // 8, HEAD_DIM // 8]
    return value


def _kv_heads(default: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """As many as there are query heads, where that is so by default."""
    heads, kv_heads = (default.__dict__.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    return {"num_key_value_heads": settings["num_attention_heads"]} if heads and heads == kv_heads else {}


def _layer_kinds(default: PreTrainedConfig) -> dict[str, Any]:
    """Each kind of layer once, two if there is one kind."""
    found: dict[str, Any] = {}
    kinds = default.__dict__.get("layer_types")
    if kinds:
        few = list(dict.fromkeys(kinds))
        found["layer_types"] = few * 2 if len(few) == 1 else few
        found["num_hidden_layers"] = len(found["layer_types"])
    return found


# What a family needs besides.
_OWN: dict[str, dict[str, Any]] = {}


def _own_settings(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    return _OWN.get(config_class.__name__, {})


def tiny_model(class_name: str) -> PreTrainedModel:
    """A seeded random model of that class of transformers in float32, in eval mode. Raises what its parts raise."""
    model_type = model_classes()[class_name]
    model_class = getattr(transformers, class_name)
    config_class = model_class.config_class or CONFIG_MAPPING[model_type]
    config = tiny_config(config_class, _own_settings(config_class))
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise MemoryError(f"{size / 1e6:.0f} million parameters, {MOST_PARAMETERS / 1e6:.0f} allowed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class._from_config(config).float().eval()
    _move_weights(model)
    _never_stop(model)
    return model.requires_grad_(False)


def _move_weights(model: PreTrainedModel) -> None:
    """Weights large enough for attention to decide what comes next, and no parameter at a constant."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.numel() or not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.2 * noise
            elif parameter.dim() >= 2 and parameter.std() < 0.12:
                parameter.copy_(0.12 * noise)


def _never_stop(model: PreTrainedModel) -> None:
    generation = model.generation_config if model.generation_config is not None else GenerationConfig()
    generation.eos_token_id, generation.pad_token_id = None, 0
    if model.config.is_encoder_decoder:
        generation.decoder_start_token_id = 1
    model.generation_config = generation


def prompt(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Random words, padded on the left: input_ids and attention_mask (B, T)."""
    generator = torch.Generator().manual_seed(3)
    longest = max(lengths)
    ids = torch.randint(FIRST_WORD, FIRST_SPECIAL, (len(lengths), longest), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : longest - length], mask[row, : longest - length] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
