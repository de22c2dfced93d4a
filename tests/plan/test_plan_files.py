"""Files and folders as they are found: GGUF, quantized by mikv, models that see; damaged configurations are refused."""

import json
import random
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from mikv import quantize
from mikv.cache.geometry import CacheGeometry
from mikv.errors import CheckpointError, ConfigError, MiKVError, UnsupportedModelError
from mikv.integrations.quantizer.config import BCQConfig
from mikv.models import bundled_model_file
from mikv.plan.hub_config import shape_of_config
from mikv.plan.memory import embedding_bytes, layer_bytes
from mikv.plan.models import NAMED, model_shape
from mikv.plan.options import Request
from mikv.plan.quantized import stored_format
from tiny import tiny_model
from tiny_chat import write_gguf


def planned(path: Any, **options: Any) -> Any:
    [found] = Request(model=str(path), hardware="h100", context=64, **options).plans()
    return found


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.bundled
def test_a_gguf_file_is_planned_with_the_bits_of_its_own_tensors(monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    path.symlink_to(bundled_model_file())
    monkeypatch.setattr("mikv.gguf_model.convert_once", None)  # nothing is converted
    found = planned(path).deployment
    assert found.weights.name == "q4_1 5.00"
    tensors = gguf.GGUFReader(path).tensors
    matrices = sum(int(one.n_bytes) for one in tensors if len(one.shape) > 1)
    norms = found.shape.small_parameters * 2
    assert layer_bytes(found) + embedding_bytes(found) == pytest.approx(matrices + norms, rel=1e-6)
    known = model_shape("smollm2-135m")
    assert (found.shape.num_parameters, found.shape.layers) == (known.num_parameters, known.layers)


def test_a_gguf_of_floats_is_as_large_as_its_tensors(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    found = planned(path).deployment
    assert (found.weights.kernel, found.weights.bits, found.shape.is_tied) == ("dense32", 32, False)
    assert planned(path, weights="bcq3").deployment.weights.name == "bcq3"


def test_a_gguf_that_is_damaged_or_of_another_kind_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    generator = random.Random(7)
    for _ in range(60):
        cut = bytearray(data[: generator.randrange(8, len(data))])
        for _ in range(generator.randrange(4)):
            cut[generator.randrange(4, len(cut))] = generator.randrange(256)
        (tmp_path / "cut.gguf").write_bytes(cut)
        with pytest.raises((CheckpointError, UnsupportedModelError)):
            planned(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(CheckpointError, match="does not begin with the letters GGUF"):
        planned(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="architecture 'mamba'"):
        planned(tmp_path / "other.gguf")


# --- quantized by mikv ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_not_convert": ["model.layers.0"]},
        {"modules_to_not_convert": ["down_proj"]},
        {"module_settings": {"model.layers.1.mlp.up_proj": {"bits": 2}}},
        {"quantize_embeddings": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_folder_that_mikv_quantized_is_as_large_as_its_files(family, settings, tmp_path):
    model = tiny_model(family) if family != "opt" else opt()
    if family == "opt":
        settings = json.loads(json.dumps(settings).replace("model.layers", "model.decoder.layers"))
        settings = json.loads(json.dumps(settings).replace("mlp.up_proj", "fc1").replace("down_proj", "fc2"))
    quantize(model, BCQConfig(bits=3, group_size=32, method="offset", **settings))
    model.save_pretrained(tmp_path)
    found = planned(tmp_path).deployment
    matrices = 0
    for name, tensor in model.state_dict().items():
        is_small = "norm" in name or name.endswith((".bias",))
        matrices += tensor.nbytes if ".layers." in name and not is_small else 0
    assert matrices
    planned_bytes = layer_bytes(found) - found.shape.small_parameters * found.dtype_bytes
    assert planned_bytes == pytest.approx(matrices, rel=1e-6)


def opt():
    settings = {"ffn_dim": 96, "word_embed_proj_dim": 64, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model("opt", num_attention_heads=4, max_position_embeddings=128, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# --- windows, and models that see -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "llama"])
def test_windows_are_those_that_transformers_reads(family):
    base = {"model_type": family, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    base |= {"vocab_size": 96, "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 32}
    base |= (
        {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        if "mi" in family or "moe" in family
        else {}
    )
    if family == "mistral":
        base = {name: value for name, value in base.items() if "expert" not in name}
    unset = object()
    for windowed in (unset, True, False):
        for window in (unset, None, 16):
            for first in (unset, 0, 2, 4, 9):
                fields = {"use_sliding_window": windowed, "sliding_window": window, "max_window_layers": first}
                config = base | {name: value for name, value in fields.items() if value is not unset}
                real = AutoConfig.for_model(**config)
                expected = CacheGeometry.from_model_config(real).layers
                for form in (config, json.loads(real.to_json_string(use_diff=False))):
                    assert shape_of_config("x", form).layers == expected, fields


def test_a_model_that_sees_is_planned_by_its_text_part(tmp_path):
    text = NAMED["llama-3-8b"]
    whole = {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 8}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    found = model_shape(str(tmp_path))
    assert found.num_parameters == model_shape("llama-3-8b").num_parameters
    assert found.dtype == "bfloat16"
    assert any("vision comes on top" in note for note in planned(tmp_path, weights="fp16").notes())
    flat = NAMED["qwen2.5-7b"] | {"model_type": "qwen2_vl", "vision_config": {"depth": 2}}
    assert shape_of_config("x", flat).num_parameters == model_shape("qwen2.5-7b").num_parameters


def test_gemma_4_is_planned_layer_by_layer(tmp_path):
    whole = {"model_type": "gemma4", "text_config": GEMMA_4, "vision_config": {"hidden_size": 8}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    found = planned(tmp_path, cache="balanced")
    kv = 15 * 2 * 16 * 2 + 64 * 2 * 32 * 2  # numbers: a window of 15 tokens, and all 64
    assert found.deployment.shape.geometry(1, 2).fp16_bytes(64) == 2 * kv
    assert planned(tmp_path).memory.kv_cache == 2 * kv


# --- malformed --------------------------------------------------------------------------------------------------------

GEMMA_4: dict[str, Any] = {
    **{"model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "vocab_size": 96},
    **{"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    **{"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
}
HOSTILE = (None, 0, -1, 1.5, "4", "", [], {}, [1], True, False, 10**30, 10**400, float("nan"), float("inf"), 1e30)
MUTATED = {
    "llama": NAMED["llama-3-8b"],
    "qwen2": NAMED["qwen2.5-7b"] | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 4},
    "qwen3_moe": NAMED["qwen3-30b-a3b"] | {"mlp_only_layers": [], "decoder_sparse_step": 1, "layer_types": None},
    "opt": NAMED["opt-6.7b"] | {"word_embed_proj_dim": 4096},
    "vision": {"model_type": "llava", "text_config": NAMED["llama-3-8b"], "vision_config": {"depth": 2}},
    "gemma4_text": GEMMA_4,
    "quantized": NAMED["llama-3-8b"] | {"quantization_config": BCQConfig(bits=3, method="offset").to_dict()},
}
OTHERS = ("dtype", "torch_dtype", "layer_types", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias")
OTHERS += ("quantization_config", "kv_lora_rank", "attention_chunk_size", "sliding_window", "per_layer_config")


def mutants(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Every field removed, and with every hostile value; the same below `text_config` and `quantization_config`."""
    found = []
    for field in (*config, *OTHERS):
        found.append({name: value for name, value in config.items() if name != field})
        found += [config | {field: value} for value in HOSTILE]
        if isinstance(config.get(field), dict):
            found += [config | {field: inner} for inner in mutants(config[field])]
    return found


@pytest.mark.parametrize("kind", MUTATED)
def test_a_damaged_configuration_is_planned_or_refused_by_name(kind):
    tried, refused, longest = 0, 0, 0
    for config in mutants(MUTATED[kind]):
        tried += 1
        try:
            shape = shape_of_config("x", config)
            weights = None if shape.quantization is None else stored_format(shape)
            assert shape.num_parameters > 0
            assert weights is None or weights.matrix_bytes(*shape.matrices[0]) > 0
            shape.geometry(1, 2).fp16_bytes(100)
        except MiKVError as error:
            refused += 1
            longest = max(longest, len(str(error)))
    assert longest < 2000
    assert tried > 150
    assert refused > tried / 3


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"hidden_size": ' + "9" * 5000 + "}", "[" * 100_000, "\0", '"x"'])
def test_a_file_that_is_no_configuration_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError):
        model_shape(str(path))
    with pytest.raises(CheckpointError):
        model_shape(str(tmp_path))


@pytest.mark.parametrize("option", ["batch", "context", "gpus", "watts"])
@pytest.mark.parametrize("value", [0, -1, 10**30, float("nan"), float("inf"), 1e30])
def test_hostile_numbers_are_refused_by_the_option(option, value):
    if option != "watts" and isinstance(value, float):
        pytest.skip("typer takes whole numbers only")
    with pytest.raises(ConfigError, match=f"--{option}"):
        Request(model="opt-6.7b", hardware="a100-80", **{option: value}).plans()
