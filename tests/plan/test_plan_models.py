"""Shapes from configurations: the same number of weights as the real model; what is not known is refused."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mikv.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from mikv.integrations.quantizer.config import BCQConfig
from mikv.plan.hub_config import shape_of_config
from mikv.plan.hub_fields import REQUIRED
from mikv.plan.models import NAMED, model_shape
from mikv.plan.quantized import stored_format

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
GATED = COMMON | {"intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS = {
    "llama": GATED,
    "llama, biases": GATED | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, tied": GATED | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": GATED | {"sliding_window": 32},
    "qwen2": GATED,
    "qwen3": GATED | {"head_dim": 32},
    "gemma": GATED | {"head_dim": 32},
    "gemma2": GATED | {"head_dim": 32, "sliding_window": 32},
    "gemma3_text": GATED | {"head_dim": 32, "sliding_window": 32},
    "gemma4_text": GATED
    | {"head_dim": 16, "global_head_dim": 32, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
    "gemma4_text, shared": GATED
    | {
        **{"model_type": "gemma4_text", "head_dim": 16, "global_head_dim": 32, "num_kv_shared_layers": 1},
        **{"num_global_key_value_heads": 1, "attention_k_eq_v": True, "use_double_wide_mlp": True},
        **{"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "mixtral": GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": GATED | {"head_dim": 32, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "opt": COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": COMMON | {"intermediate_size": 96},
}
TINY = GATED | {"model_type": "llama"}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_as_transformers_makes_them(name):
    config = {"model_type": name} | CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    saved = model.config.to_dict()
    assert shape_of_config(name, config).num_parameters == sum(p.numel() for p in model.parameters())
    assert shape_of_config(name, saved).num_parameters == sum(p.numel() for p in model.parameters())


def test_every_family_is_compared_with_transformers():
    assert {({"model_type": name} | config)["model_type"] for name, config in CONFIGS.items()} == set(REQUIRED)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_named_models_have_as_many_parameters_as_their_cards_say(name, parameters):
    assert model_shape(name).num_parameters == parameters


def test_windows_that_are_switched_off_do_not_count():
    config = TINY | {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}
    assert all(layer.num_cached(100) == 100 for layer in shape_of_config("x", config).layers)
    windowed = shape_of_config("x", TINY | {"model_type": "mistral", "sliding_window": 16})
    assert all(layer.num_cached(100) == 15 for layer in windowed.layers)


def test_a_file_and_its_folder_are_the_same_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert model_shape(str(tmp_path / "config.json")) == model_shape(str(tmp_path))
    assert model_shape(str(tmp_path)).name == tmp_path.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba", "num_attention_heads": None},
            "'mamba' of x is not one of .*lacks num_attention_heads",
        ),
        ({"hidden_size": None, "vocab_size": 0}, r"\(llama\) lacks hidden_size, vocab_size"),
        ({"model_type": "qwen3"}, "lacks head_dim"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32}, "projects its embeddings"),
        ({"model_type": None}, "model_type None"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        shape_of_config("x", TINY | changes)


def test_misspelt_models_are_told_what_is_near(tmp_path):
    with pytest.raises(ModelNotFoundError, match="did you mean llama-3-8b"):
        model_shape("./llama-3-8")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        model_shape(str(tmp_path / "config.json"))


def quantized(**settings):
    return shape_of_config("x", TINY | {"quantization_config": BCQConfig(**settings).to_dict()})


def test_a_quantized_checkpoint_tells_its_own_format():
    weights = quantized(bits=3, group_size=64, method="offset").quantization
    assert weights["bits"] == 3
    found = stored_format(quantized(bits=3, group_size=64, method="offset"))
    assert (found.name, found.bits, found.numbers, found.group_size) == ("bcq3", 3, 4, 64)
    assert stored_format(quantized(bits=4, method="rtn")).numbers == 2


def test_layers_with_other_bits_count_with_theirs():
    plain = quantized(bits=3, group_size=None)
    mixed = quantized(bits=3, group_size=None, module_settings={"model.layers.1.mlp.down_proj": {"bits": 4}})
    rows, columns = plain.matrices[-1]
    more = rows * (columns / 8 + 2)
    usual = sum(stored_format(plain).matrix_bytes(*size) for size in plain.matrices) * 3
    bits = stored_format(mixed).bits
    assert bits * mixed.matrix_parameters / 8 == pytest.approx(usual + more)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'.*--weights"),
        (BCQConfig(module_settings={"model.vision.proj": {"bits": 3}}).to_dict(), "'model.vision.proj', whose size"),
    ],
)
def test_foreign_and_partial_quantization_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        stored_format(shape_of_config("x", TINY | {"quantization_config": settings}))


def test_names_are_lower_case():
    assert all(name == name.lower() for name in NAMED)
    assert model_shape("OPT-175B") == model_shape("opt-175b")
