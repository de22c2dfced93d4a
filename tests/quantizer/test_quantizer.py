"""Quantized models through transformers: on the fly, saved, loaded, moved, refused."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import TOKENS, edit_config, logits, quantized, reload
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import mikv
from mikv.errors import CheckpointError, ConfigError, MiKVError, NumericsError, UnsupportedModelError
from mikv.integrations.transformers.versions import as_argument
from mikv.models import load_model
from mikv.weights.embedding import BCQEmbedding, TiedHead
from mikv.weights.linear import BCQLinear
from tiny import tiny_model

FAMILIES = ["llama", "qwen2", "phi3", "gemma3", "gpt-neox"]
Damage = Callable[[Callable[[dict[str, Tensor]], object]], Path]
LAYER = "model.layers.0.mlp.down_proj"


def linears(model: nn.Module) -> dict[str, BCQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BCQLinear)}


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_gives_back_the_saved_model_bit_for_bit(embeddings: bool, tied: bool, dtype: torch.dtype) -> None:
    model = reload(tiny_model(tie_word_embeddings=tied), dtype=dtype)
    mikv.quantize(model, mikv.BCQConfig(bits=3, group_size=32, quantize_embeddings=embeddings))
    again = reload(model)
    assert again.dtype == model.dtype == dtype
    assert len(linears(again)) == 14 + (embeddings and not tied)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(reload(again)), logits(model))


@pytest.mark.parametrize("method", ["rtn", "greedy", "alternating"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_form_of_scales_survives_saving_with_embeddings(method: str, tied: bool) -> None:
    model = quantized(settings={"tie_word_embeddings": tied}, method=method, quantize_embeddings=True)
    assert torch.equal(logits(reload(model)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_models_are_quantized_saved_and_loaded(family: str) -> None:
    model = quantized(family, method="rtn")
    assert linears(model)
    assert torch.equal(logits(reload(model)), logits(model))


def test_gpt2_is_quantized_although_its_matrices_are_transposed() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4)).eval()
    before = logits(model)
    mikv.quantize(model, mikv.BCQConfig(bits=8, group_size=32))
    assert len(linears(model)) == 8
    assert (logits(model) - before).norm() < 0.05 * before.norm()
    assert torch.equal(logits(reload(model)), logits(model))


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_quantizing_on_the_fly_equals_quantizing_a_loaded_model(tmp_path: Path, embeddings: bool, tied: bool) -> None:
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    config = mikv.BCQConfig(bits=4, group_size=32, quantize_embeddings=embeddings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    mikv.quantize(loaded, config)
    on_the_fly = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", quantization_config=config)
    assert torch.equal(logits(on_the_fly), logits(loaded))
    assert torch.equal(logits(reload(on_the_fly)), logits(loaded))


def test_a_calibrated_method_on_the_fly_points_to_quantize(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"needs calibration.*mikv\.quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=mikv.BCQConfig(method="gptq"))


def test_weights_that_are_not_finite_stop_loading_on_the_fly(tmp_path: Path) -> None:
    model = tiny_model()
    model.get_submodule(LAYER).weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericsError, match=rf"{LAYER}.*NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=mikv.BCQConfig(group_size=32))


def test_a_tied_embedding_is_quantized_once() -> None:
    model = quantized(settings={"tie_word_embeddings": True}, quantize_embeddings=True)
    assert isinstance(model.model.embed_tokens, BCQEmbedding)
    assert isinstance(model.lm_head, TiedHead)
    model.tie_weights()
    names = model.state_dict()
    assert "model.embed_tokens.planes" in names
    assert not [name for name in names if name.startswith("lm_head")]
    assert isinstance(reload(model).lm_head, TiedHead)


def test_settings_of_single_layers_and_exceptions_hold_and_are_saved() -> None:
    model = quantized(module_settings={LAYER: {"bits": 2, "group_size": 64}}, modules_to_not_convert=["k_proj"])
    for present in (model, reload(model)):
        assert present.get_submodule(LAYER).shape.bits == 2
        assert present.get_submodule(LAYER).shape.group_size == 64
        assert present.model.layers[1].mlp.down_proj.shape.bits == 4
        assert type(present.model.layers[0].self_attn.k_proj) is nn.Linear


def test_configuration_in_the_folder_is_versioned(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["version"]) == ("mikv_bcq", 2, mikv.__version__)
    assert (config["method"], config["uniform"], config["offset"]) == ("offset", False, True)


def test_dequantized_model_says_the_same() -> None:
    model = quantized(settings={"tie_word_embeddings": True}, quantize_embeddings=True)
    before = logits(model)
    model.dequantize()
    assert not linears(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (logits(model) - before).norm() < 0.05 * before.norm()
    assert torch.equal(logits(reload(model)), logits(model))


def test_load_model_loads_a_quantized_folder_and_generates_with_a_packed_cache(saved: Path) -> None:
    model = load_model(str(saved)).model
    assert len(linears(model)) == 14
    cache = mikv.MiKVCache(model.config, mikv.MiKVConfig.preset("balanced"))
    generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False, **as_argument(cache))
    assert generated.shape == (1, 44)
    assert model.hf_quantizer.is_trainable is False


@pytest.mark.parametrize(
    "order", ["import mikv, transformers", "import transformers.modeling_utils, mikv", "import transformers, mikv"]
)
def test_transformers_knows_quantized_models_once_mikv_is_imported(saved: Path, order: str) -> None:
    code = (
        f"{order}; m = transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r});"
        "print(type(m.model.layers[0].mlp.down_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "BCQLinear"


DAMAGES: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda t: t.pop(f"{LAYER}.planes"), rf"no {LAYER}\.planes"),
    (lambda t: t.pop(f"{LAYER}.scales"), rf"no {LAYER}\.scales"),
    (lambda t: t.pop(f"{LAYER}.offset"), rf"no {LAYER}\.offset"),
    (lambda t: t.update({f"{LAYER}.scales": -t[f"{LAYER}.scales"]}), f"{LAYER}.*negative"),
    (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"] * torch.inf}), f"{LAYER}.*not finite"),
    (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].float()}), f"{LAYER}.scales is F32, but F16"),
    (lambda t: t.update({f"{LAYER}.planes": t[f"{LAYER}.planes"].char()}), f"{LAYER}.planes is I8, but U8"),
    (lambda t: t.update({f"{LAYER}.planes": t[f"{LAYER}.planes"][:, :, 1:].contiguous()}), f"{LAYER}.planes is"),
    (lambda t: t.update({f"{LAYER}.planes": t[f"{LAYER}.planes"][:3].contiguous()}), f"{LAYER}"),
    (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:, :, 0].contiguous()}), f"{LAYER}"),
]


def test_without_mikv_transformers_refuses_the_folder_and_names_what_is_missing(saved: Path) -> None:
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Unknown quantization type, got mikv_bcq" in done.stderr
    assert "write `import mikv` before from_pretrained" in done.stderr
    assert "RuntimeError" in done.stderr


def test_tensors_for_readers_without_mikv_are_not_reported_to_those_with_it(saved: Path, caplog: Any) -> None:
    AutoModelForCausalLM.from_pretrained(saved)
    assert "LOAD REPORT" not in caplog.text


def test_a_folder_of_format_1_is_read_with_a_warning(saved: Path, damage: Damage, caplog: Any) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(saved))
    caplog.clear()
    again = AutoModelForCausalLM.from_pretrained(damage(lambda tensors: None))
    assert torch.equal(logits(again), expected)
    assert "wrote no checksums" in caplog.text
    caplog.clear()
    assert torch.equal(logits(reload(again)), expected)
    assert "checksums" not in caplog.text


def test_format_2_without_checksums_is_refused(saved: Path, damage: Damage) -> None:
    damage(lambda tensors: None)
    edit_config(saved, format=2)
    with pytest.raises(CheckpointError, match="the checksums of the weights are missing"):
        load_model(str(saved))


def test_a_model_in_several_files_has_one_set_of_checksums(tmp_path: Path) -> None:
    model = quantized()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(CheckpointError, match=f"has no {first.name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_head_of_its_own_is_quantized_as_such_whatever_the_configuration_says(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    config = mikv.BCQConfig(bits=8, group_size=32, quantize_embeddings=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = logits(plain)
    mikv.quantize(plain, config)
    on_the_fly = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    for model in (plain, on_the_fly, reload(plain), reload(on_the_fly)):
        assert type(model.lm_head) is BCQLinear
        assert (logits(model) - before).norm() < 0.05 * before.norm()


def test_dequantize_after_saving(tmp_path: Path) -> None:
    model = quantized()
    before = logits(model)
    model.save_pretrained(tmp_path)
    model.dequantize()
    assert (logits(model) - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_embeddings_say_that_they_cannot_be_resized(tied: bool) -> None:
    model = quantized(settings={"tie_word_embeddings": tied}, quantize_embeddings=True)
    with pytest.raises(UnsupportedModelError, match=r"token embedding is quantized.*dequantize\(\) first"):
        model.resize_token_embeddings(100)
    assert logits(model).isfinite().all()
    model.dequantize()
    model.resize_token_embeddings(100)
    assert logits(model).shape[-1] == 100


@pytest.mark.parametrize("token", [-1, 96, 97, 2**40])
def test_a_token_beyond_the_vocabulary_is_an_error_and_no_other_row(token: int) -> None:
    model = quantized(quantize_embeddings=True)
    with pytest.raises(IndexError, match=f"token {token} is not in the vocabulary of 96"):
        model(torch.tensor([[3, token]]))


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_body_of_a_saved_model_is_loaded_without_its_head(tmp_path: Path, embeddings: bool) -> None:
    model = quantized(quantize_embeddings=embeddings, module_settings={LAYER: {"bits": 2}})
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path, dtype="auto")
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


def test_another_head_than_the_saved_one_is_refused_by_its_name(saved: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="holds a LlamaForCausalLM; load it as that"):
        AutoModelForSequenceClassification.from_pretrained(saved)


@pytest.mark.parametrize("entry", ["k_prj", "model.layer.0", "(a+)+$", "lm_head.weight", ".*"])
def test_modules_to_keep_that_are_not_there_are_named(entry: str) -> None:
    with pytest.raises(ConfigError, match=rf"modules_to_not_convert names '{re.escape(entry)}', which is no module"):
        quantized(modules_to_not_convert=[entry])


def test_a_prefix_of_a_number_is_not_the_number() -> None:
    model = tiny_model(num_hidden_layers=11)
    mikv.quantize(model, mikv.BCQConfig(group_size=32, modules_to_not_convert=["model.layers.1"]))
    assert len(linears(model)) == 10 * 7


def test_a_model_with_adapters_is_told_to_merge_them() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"has adapters.*merge_and_unload\(\)"):
        mikv.quantize(model, mikv.BCQConfig(group_size=32))
    merged = model.merge_and_unload()
    mikv.quantize(merged, mikv.BCQConfig(group_size=32))
    assert len(linears(merged)) == 14


def test_a_vision_model_is_not_said_to_have_experts() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    vision = ViTForImageClassification(
        ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    )
    mikv.quantize(vision, mikv.BCQConfig(group_size=32))
    assert linears(vision)


@pytest.mark.parametrize(("edit", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_damaged_files_are_refused(damage: Damage, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    folder = damage(edit)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(folder))


def test_a_truncated_file_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(str(saved))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"format": 3}, CheckpointError),
        ({"bits": 3}, CheckpointError),
        ({"uniform": True}, CheckpointError),
        ({"group_size": 64}, CheckpointError),
        ({"x": 1}, ConfigError),
    ],
)
def test_a_configuration_that_is_not_of_the_file_is_refused(
    saved: Path, settings: dict[str, Any], error: type[MiKVError]
) -> None:
    edit_config(saved, **settings)
    with pytest.raises(error):
        load_model(str(saved))


def test_a_quantized_model_is_not_quantized_again() -> None:
    model = quantized()
    with pytest.raises(UnsupportedModelError, match=r"quantized already \(mikv_bcq\)"):
        mikv.quantize(model, mikv.BCQConfig())


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gpt-oss", "qwen3-next"])
def test_stacked_experts_are_refused_with_the_way_out_which_works(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=r"experts.*modules_to_not_convert=\['experts'\]"):
        mikv.quantize(model, mikv.BCQConfig(group_size=32))
    mikv.quantize(model, mikv.BCQConfig(group_size=32, method="rtn", modules_to_not_convert=["experts"]))
    assert linears(model)
    assert torch.equal(logits(reload(model)), logits(model))


def test_embeddings_that_scale_are_refused() -> None:
    model = tiny_model("gemma3")
    with pytest.raises(UnsupportedModelError, match="quantize_embeddings=False"):
        mikv.quantize(model, mikv.BCQConfig(quantize_embeddings=True))


def test_settings_of_a_layer_that_is_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'model.layers.9.x', which is no quantized layer; those are model.layers.0"):
        quantized(module_settings={"model.layers.9.x": {"bits": 2}})


def test_compiled_model_has_no_graph_break_from_quantized_layers() -> None:
    model = quantized()
    explanation = torch._dynamo.explain(model.model.layers[0].mlp)(torch.randn(1, 3, 64))
    assert explanation.graph_break_count == 0, explanation.break_reasons
    compiled = torch.compile(model.model.layers[0].mlp, backend="eager", fullgraph=True)
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        assert torch.equal(compiled(x), model.model.layers[0].mlp(x))
