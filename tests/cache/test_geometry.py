"""Every layer's heads, dims and tokens are what the models of the installed transformers really cache.

Hybrids, sliding and shared layers, layers of their own dims (Gemma 4), values of other dims than keys (MiMo): every
class of causal models that can be built tiny is built, fed, and asked.
"""

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mikv import MiKVCache, MiKVConfig
from mikv.cache.accounting import cache_bytes
from mikv.cache.geometry import CacheGeometry, LayerGeometry
from mikv.errors import MiKVError, UnsupportedModelError
from mikv.integrations.transformers.cache import MiKVLayer
from mikv.integrations.transformers.versions import as_argument

NUM_TOKENS = 100  # more than a warm-up and than a window
_MOST_PARAMETERS = 20_000_000
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "block_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "dense_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_attention_heads"), 4),
    **dict.fromkeys(("n_head", "num_heads", "n_heads", "num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "linear_num_key_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("head_dim", "sliding_window", "sliding_window_size", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "state_size", "mamba_d_state", "swa_head_dim"), 8),
    **dict.fromkeys(("attention_head_dim", "v_head_dim"), 24),
    **dict.fromkeys(("swa_num_key_value_heads", "swa_num_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **{"mamba_expand": 2, "time_step_rank": 4, "attention_hidden_size": 128, "bos_token_id": 1, "eos_token_id": 2},
    **{"pad_token_id": 0, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
}
_OWN: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        **{"num_kv_shared_layers": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}
# what these cache cannot be read from a configuration; mikv refuses them or they keep no keys
_UNREADABLE = ("cpmant", "openai-gpt", "xlnet")


def tiny(model_type: str) -> PreTrainedConfig:
    """The class's configuration, small. Raises whatever the class does if it cannot be so."""
    config_class = CONFIG_MAPPING[model_type]
    own = _OWN.get(model_type, {})
    names = {field.name for field in fields(config_class)} if is_dataclass(config_class) else set()
    extra = ("global_head_dim", "num_global_key_value_heads") if model_type.startswith("gemma4") else ()
    small = {name: value for name, value in _SMALL.items() if name in names or name in extra}
    return config_class(**{**small, **own, "dtype": torch.float32})


def built(model_type: str) -> PreTrainedModel | None:
    """The model with random weights, or None if it is too large or cannot be built or read with a plain cache."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny(model_type))
        if sum(parameter.numel() for parameter in model.parameters()) > _MOST_PARAMETERS:
            return None
        return AutoModelForCausalLM.from_config(tiny(model_type)).eval()
    except Exception:  # whatever a class wants that a tiny configuration does not have
        return None


def fill(model: PreTrainedModel, cache: Any) -> None:
    token_ids = torch.arange(NUM_TOKENS)[None] % 90 + 3
    with torch.no_grad():
        model(token_ids, **as_argument(cache), use_cache=True)


def stored(layer: Any) -> tuple[int, ...] | None:
    """(G, T, key dim, value dim) of a plain layer, None if it has no keys."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.dim() != 4:
        return None
    return (*keys.shape[1:], values.shape[3])


def predicted(layer: LayerGeometry) -> tuple[int, ...] | None:
    num_cached = layer.num_cached(NUM_TOKENS)
    value_dim = layer.head_dim if layer.value_dim is None else layer.value_dim
    return (layer.num_kv_heads, num_cached, layer.head_dim, value_dim) if num_cached else None


def held_bytes(cache: MiKVCache) -> int:
    """Bytes of keys and values; states of linear attention and convolutions are no part of the geometry."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MiKVLayer):
            total += sum(layer.tokens.bytes_by_part().values())
        elif isinstance(getattr(layer, "keys", None), Tensor):
            total += layer.keys.nbytes + layer.values.nbytes
            total += layer._sliding_window_tensor.nbytes if hasattr(layer, "_sliding_window_tensor") else 0
    return total


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.filterwarnings("ignore")
def test_every_class_of_models_caches_what_its_configuration_says(capsys: pytest.CaptureFixture[str]) -> None:
    wrong, checked, packed, differing = {}, [], [], []
    for model_type in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *_OWN}):
        model = None if model_type in _UNREADABLE else built(model_type)
        if model is None:
            continue
        cache = DynamicCache(config=model.config)
        try:
            fill(model, cache)
        except Exception:
            continue
        try:
            geometry = CacheGeometry.from_model_config(model.config)
        except UnsupportedModelError:
            continue
        expected = [stored(layer) for layer in cache.layers]
        found = [predicted(layer) for layer in geometry.layers]
        if found[: len(expected)] != expected or any(found[len(expected) :]):
            wrong[model_type] = (expected, found)
        checked.append(model_type)
        differing += [model_type] if len(set(found)) > 1 else []
        if (sizes := packed_bytes(model, geometry)) is not None:
            packed.append(model_type)
            if sizes[0] != sizes[1]:
                wrong[model_type] = sizes
    with capsys.disabled():
        print(f"\n{len(checked)} classes, {len(differing)} of differing layers, {len(packed)} packed")
    assert not wrong
    assert {"falcon", "gemma4_text", "gemma3n_text", "mimo_v2_flash", "jamba", "nemotron_h"} <= set(checked)
    assert len(checked) > 100


def packed_bytes(model: PreTrainedModel, geometry: CacheGeometry) -> tuple[int, int] | None:
    """Bytes that a MiKVCache holds and that were predicted, None if mikv does not serve the model."""
    config = MiKVConfig()
    try:
        cache = MiKVCache(model.config, config)
        fill(model, cache)
        return held_bytes(cache), cache_bytes(config, geometry, NUM_TOKENS).bytes
    except Exception:  # which models are served, and how others are refused, is tested elsewhere
        return None


@pytest.mark.parametrize("num_tokens", [5, 40, 100, 333])
@pytest.mark.parametrize("preset", ["lossless", "balanced", "small"])
def test_gemma_4_is_sized_layer_by_layer(preset: str, num_tokens: int) -> None:
    """Sliding layers of 2 heads of 16 channels, full ones of 1 head of 32."""
    model = built("gemma4_text")
    assert model is not None
    geometry = CacheGeometry.from_model_config(model.config)
    assert {(layer.num_kv_heads, layer.head_dim) for layer in geometry.layers} == {(2, 16), (1, 32)}
    config = MiKVConfig.preset(preset)
    cache = MiKVCache(model.config, config)
    with torch.no_grad():
        model(torch.arange(num_tokens)[None] % 90 + 3, **as_argument(cache))
    assert cache.memory().bytes == cache_bytes(config, geometry, num_tokens).bytes


def test_gemma_4_is_saved_loaded_and_fitted_to_a_budget(tmp_path: Any) -> None:
    model = built("gemma4_text")
    assert model is not None
    cache = MiKVCache(model.config)
    fill(model, cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = MiKVCache.load(tmp_path / "cache.safetensors", model.config)
    assert loaded.memory().bytes == cache.memory().bytes
    half = tiny("gemma4_text")
    half.dtype = torch.float16
    assert MiKVConfig.for_budget(1, half, 100_000) == MiKVConfig.preset("lossless")


def test_unknown_kinds_of_layers_and_missing_heads_are_refused_by_name() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "full_attention"])
    config.layer_types = ["full_attention", "telepathy"]
    with pytest.raises(MiKVError, match="'telepathy'"):
        CacheGeometry.from_model_config(config)
