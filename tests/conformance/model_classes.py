"""Tiny random models of the classes with which transformers generates text, shrunk by rules from their configurations.

A configuration is shrunk field by field: what a field means is read off its name (layers, heads, experts, sizes,
special tokens), and sub-configurations are shrunk alike. Families that have rules of their own stand in one table.
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
MOST_PARAMETERS = 40_000_000

_MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")


def model_classes() -> dict[str, str]:
    """Model types of transformers by the name of the class they are read as; a class stands there once."""
    names: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for model_type, found in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).items():
            for name in (found,) if isinstance(found, str) else found:
                names.setdefault(name, model_type)
    return dict(sorted(names.items()))


# Fields by name: the first pattern that fits the whole name decides. A number becomes no larger than this.
_RULES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab_size|vocab_size_per_layer_input|mel_vocab_size", VOCAB),
    (r"(\w+_)?position(s|_embeddings)|n_ctx|max_seq(uence)?_len(gth)?|seq_length", POSITIONS),
    (r"num_sparse_\w+_layers|num_global_layers|num_mtp_layers|num_adapter_layers", 1),
    (r"(\w+_)?(num|n)_(\w+_)?layers?|(en|de)coder_layers|depth|resampler_depth|num_hidden_blocks", 2),
    (r"(\w+_)?(num_)?(key_value|kv)_heads|num_kv_heads|kv_n_heads", KV_HEADS),
    (r"(\w+_)?attention_heads|(\w+_)?num_heads|(\w+_)?n_heads?", HEADS),
    (r"rotary_dim|qk_rope_head_dim", HEAD_DIM // 2),
    (r"(\w+_)?head_dim|d_kv|kv_channels|(\w+_)?dim_head|attention_head_size|d_head|attention_head_dim", HEAD_DIM),
    (r"n_routed_experts|(\w+_)?num_(local_)?experts|num_moe_experts|zero_expert_num", 4),
    (r"index_topk|index_block_size", WINDOW),
    (r"(num|n)_experts_per_tok(en)?|(\w+_)?top_?k|moe_topk|moe_k|num_selected_experts|index_topk_blocks", 2),
    (r"n_group|topk_group|n_shared_experts|(\w+_)?num_shared_experts|num_codebooks", 1),
    (r"(\w+_)?lora_rank|\w+_rank|d_rel", 32),
    (r"(\w+_)?intermediate_(size|dim)(_mlp)?|(\w+_)?ffn_dim|d_ff|mlp_dim|n_inner|d_inner", HIDDEN),
    (r"(\w+_)?hidden_(size|dim|dimension)|d_model|n_embd|(\w+_)?embed(s|ding)?_(dim|size)|emb_dim|dim", HIDDEN),
    (r"projection_dim|output_dim|lru_width|(projector|pooler)_(in|out)put_\w+|hidden_size_global", HIDDEN),
    (r"hidden_size_per_layer_input|codevector_dim|index_head_dim", HEAD_DIM),
    (r"(\w+_)?(sliding_)?window(_size)?|attention_chunk_size|local_attention", WINDOW),
    (r"(\w+_)?image_size|crop_size", 56),
)
# What some models cannot do without although it is None by default.
_FILLED: dict[str, int] = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": KV_HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}


def tiny_config(config_class: type[PreTrainedConfig], own: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A small configuration of that class; `own` are settings of the family, dotted for those of a part."""
    own = {**_OWN.get(config_class.__name__, {}), **(own or {})}
    default = _default(config_class, own)
    settings: dict[str, Any] = {}
    specials = iter(range(FIRST_SPECIAL, VOCAB))
    for name in _field_names(config_class):
        value = _stored(default, name)
        if isinstance(value, PreTrainedConfig):
            prefix = f"{name}."
            parts = {key.removeprefix(prefix): new for key, new in own.items() if key.startswith(prefix)}
            settings[name] = tiny_config(type(value), parts)
        elif re.fullmatch(r"\w+_token_(id|index)", name) and isinstance(value, (int, list)):
            settings[name] = next(specials)
        elif (small := _shrunk(name, value)) is not None:
            settings[name] = small
    settings |= _kv_heads(default) | _few_layers(default)
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1}
    settings = {name: value for name, value in settings.items() if name in _field_names(config_class)}
    return _without_windows(config_class, settings | {key: new for key, new in own.items() if "." not in key})


def _without_windows(config_class: type[PreTrainedConfig], settings: dict[str, Any]) -> PreTrainedConfig:
    """With full attention where a model has it only without a window (Mistral)."""
    config = config_class(**settings)
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        try:
            return config_class(**settings | {"sliding_window": None})
        except Exception:  # it insists on a window
            return config
    return config


def _default(config_class: type[PreTrainedConfig], own: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return config_class()
    except Exception:  # some have no working defaults
        return config_class(**{key: value for key, value in own.items() if "." not in key})


def _field_names(config_class: type[PreTrainedConfig]) -> list[str]:
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"is_decoder"}
    return [field.name for field in dataclasses.fields(config_class) if field.name not in base]


def _stored(config: PreTrainedConfig, name: str) -> Any:
    """The field's value; not by getattr, which refuses what may differ from layer to layer."""
    return config.__dict__.get(config.attribute_map.get(name, name))


def _shrunk(name: str, value: Any) -> Any:
    """A small value for the field, or None where it keeps its own."""
    if value is None:
        return _FILLED.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return None


def _kv_heads(default: PreTrainedConfig) -> dict[str, Any]:
    """As many as there are query heads, where that is so by default."""
    heads, kv_heads = (_stored(default, name) for name in ("num_attention_heads", "num_key_value_heads"))
    return {"num_key_value_heads": HEADS} if heads and heads == kv_heads else {}


def _few_layers(default: PreTrainedConfig) -> dict[str, Any]:
    """The first layer of each kind, two if there is one kind: of every field that lists something per layer."""
    num_layers = _stored(default, "num_hidden_layers")
    lists = {
        name: value
        for name, value in default.__dict__.items()
        if isinstance(value, (list, tuple)) and num_layers and len(value) == num_layers and num_layers > 4
    }
    names = [name for name in lists if all(isinstance(kind, str) for kind in lists[name])]
    if not names:
        return {}
    first: dict[Any, int] = {}
    for index, kind in enumerate(zip(*(lists[name] for name in names), strict=True)):
        first.setdefault(kind, index)
    chosen = sorted(first.values())[:4] if len(first) > 1 else [0, 1]
    return {name: [value[i] for i in chosen] for name, value in lists.items()} | {"num_hidden_layers": len(chosen)}


def _mrope(rotary: int = HEAD_DIM) -> dict[str, Any]:
    """Rotary embeddings over three axes, which have to fill half of what is rotated."""
    sections = [rotary // 2 - 2 * (rotary // 8), rotary // 8, rotary // 8]
    partial = {} if rotary == HEAD_DIM else {"partial_rotary_factor": rotary / HEAD_DIM}
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections} | partial


# What a family needs besides.
_OWN: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 64},
    "ChameleonConfig": {"vocabulary_map": {"<image>": FIRST_SPECIAL}},
    "BltConfig": {"encoder_hash_byte_group_vocab": VOCAB},
    "Cosmos3EdgeTextConfig": {"rope_parameters": _mrope()},
    "DbrxConfig": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _mrope()}},
    "DoryConfig": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "Emu3Config": {"vocabulary_map": {"<|extra_200|>": FIRST_SPECIAL, "<image>": FIRST_SPECIAL + 1}},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "intermediate_size": [HIDDEN] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "Glm4vTextConfig": {"rope_parameters": _mrope()},
    "Glm4vMoeTextConfig": {"rope_parameters": _mrope(HEAD_DIM // 2)},
    "Glm46VTextConfig": {"rope_parameters": _mrope()},
    "GlmOcrTextConfig": {"rope_parameters": _mrope()},
    "GraniteConfig": {"attention_multiplier": 0.15},
    "Gemma4TextConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
    },
    "Gemma4UnifiedTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
    },
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 4},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashConfig": {"qk_head_dim": HEAD_DIM + HEAD_DIM // 2, "head_dim": HEAD_DIM // 2},
    "MiniMaxM3VLTextConfig": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": KV_HEADS},
    "MinistralConfig": {"layer_types": ["sliding_attention", "full_attention"]},
    "MoonshineConfig": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "NemotronHConfig": {"n_groups": 1, "mamba_num_heads": 8},
    "Mamba2Config": {"num_heads": 8},
    "PaddleOCRTextConfig": {"rope_parameters": _mrope()},
    "Qwen2_5OmniTextConfig": {"rope_parameters": _mrope()},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": FIRST_SPECIAL + 30},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": FIRST_SPECIAL + 30},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 4,
    },
    "Qwen2VLTextConfig": {"rope_parameters": _mrope()},
    "Qwen2_5_VLTextConfig": {"rope_parameters": _mrope()},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {"is_decoder": True, "axial_pos_shape": (16, 32), "axial_pos_embds_dim": (32, 96)},
    "Step3p7TextConfig": {"sliding_window": WINDOW},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
}


def tiny_model(class_name: str) -> PreTrainedModel:
    """A seeded random model of that class of transformers in float32, in eval mode. Raises what its parts raise."""
    model_type = model_classes()[class_name]
    model_class = getattr(transformers, class_name)
    config_class = model_class.config_class or CONFIG_MAPPING[model_type]
    config = tiny_config(config_class)
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
            constant = parameter.flatten()[0]
            if bool((parameter == constant).all()):
                parameter += 0.2 * noise * (constant if constant else 1)
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
