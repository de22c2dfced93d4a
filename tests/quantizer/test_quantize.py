"""mikv.quantize with calibration: what is collected, in which order, what is reported."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantized_models import TOKENS, logits, quantized, reload
from torch import Tensor, nn
from transformers import PreTrainedModel

import mikv
from mikv.errors import ConfigError, UnsupportedModelError
from mikv.integrations.quantizer import LayerReport, set_bits
from mikv.integrations.quantizer.calibrate import find_blocks, in_one_pass, stages, token_chunks
from mikv.integrations.quantizer.modules import linear_names
from mikv.weights.linear import BCQLinear
from tiny import tiny_model

BITS = {"bits": 3, "group_size": 32}


def chunks(count: int = 6, length: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (1, length), generator=generator) for _ in range(count)]


def names_of(model: PreTrainedModel) -> list[str]:
    from mikv.integrations.quantizer.modules import fix_skipped

    config = mikv.BCQConfig()
    fix_skipped(model, config)
    return linear_names(model, config)


def whole_model_hessians(model: PreTrainedModel, names: list[str], inputs: list[Tensor]) -> dict[str, Tensor]:
    sums: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: sums[name].append(args[0].flatten(0, -2).double())
        )
        for name in names
    ]
    for x in inputs:
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: (rows := torch.cat(parts)).T @ rows / len(rows) for name, parts in sums.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "gpt-neox", "gemma3n", "phi3"])
def test_matrices_are_the_mean_of_the_outer_products_of_the_inputs(family: str) -> None:
    model = tiny_model(family)
    names, inputs = names_of(model), chunks()
    expected = whole_model_hessians(model, names, inputs)
    found: dict[str, Tensor] = {}
    for stage in stages(model, names, inputs, with_drift=False):
        assert stage.drift is None
        found |= dict.fromkeys(stage.names, stage.hessian)
    assert sorted(found) == sorted(names)
    for name in names:
        if name.startswith("model.layers") or ".layers." in name:
            assert torch.allclose(found[name].double(), expected[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize(("family", "has_blocks"), [("llama", True), ("gemma2", True), ("gemma3n", False)])
def test_blocks_are_found_where_one_hands_hidden_states_to_the_next(family: str, has_blocks: bool) -> None:
    blocks = find_blocks(tiny_model(family), chunks())
    assert (blocks is not None) == has_blocks
    if blocks is not None:
        assert (blocks.prefix, len(blocks.modules)) == ("model.layers", 2)


@pytest.mark.parametrize("with_drift", [False, True])
def test_layers_with_the_same_input_are_a_stage(with_drift: bool) -> None:
    model = tiny_model()
    found = [stage.names for stage in stages(model, names_of(model), chunks(), with_drift=with_drift)]
    parts = [[f"self_attn.{x}_proj" for x in "qkv"], ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
    parts.append(["mlp.down_proj"])
    assert found == [[f"model.layers.{i}.{name}" for name in part] for i in (0, 1) for part in parts]


def quantize_roughly(model: PreTrainedModel, names: list[str]) -> None:
    for name in names:
        model.get_submodule(name).weight.mul_(0.7)  # stands for quantization


def test_a_block_is_calibrated_on_what_the_quantized_blocks_before_it_say() -> None:
    model, inputs = tiny_model(), chunks()
    names = names_of(model)
    second = "model.layers.1.self_attn.q_proj"
    before = whole_model_hessians(model, [second], inputs)[second]
    for stage in stages(model, names, inputs, with_drift=False):
        if second in stage.names:
            assert not torch.allclose(stage.hessian.double(), before, rtol=0.05)
            now = whole_model_hessians(model, [second], inputs)[second]
            assert torch.allclose(stage.hessian.double(), now, rtol=1e-3, atol=1e-4)
        quantize_roughly(model, stage.names)


def inputs_of(model: PreTrainedModel, name: str, inputs: list[Tensor]) -> Tensor:
    rows: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: rows.append(x[0].flatten(0, -2).double()))
    for x in inputs:
        model(x)
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_drift_is_what_all_layers_before_have_changed_with_every_token_counting_alike(family: str) -> None:
    model, inputs = tiny_model(family), chunks()
    names = names_of(model)
    exact = {name: inputs_of(model, name, inputs) for name in names}
    checked = 0
    for stage in stages(model, names, inputs, with_drift=True):
        x = inputs_of(model, stage.names[0], inputs)
        size = x.norm(dim=1, keepdim=True)
        if stage.drift is not None:
            checked += 1
            now, change = x / size, (exact[stage.names[0]] - x) / size
            assert torch.allclose(stage.hessian.double(), now.T @ now / len(x), rtol=1e-3, atol=1e-5), stage.names
            assert torch.allclose(stage.drift.double(), change.T @ now / len(x), rtol=1e-3, atol=1e-5), stage.names
        quantize_roughly(model, stage.names)
    assert checked == 2 * 4  # both blocks


def test_a_layer_that_no_token_reaches_is_named() -> None:
    with pytest.raises(ConfigError, match="no calibration token reached lonely"):
        in_one_pass({"lonely": nn.Linear(4, 4)}, lambda x: x, [torch.ones(1, 4)])


@pytest.mark.parametrize("with_drift", [False, True])
def test_a_layer_of_a_block_that_no_token_reaches_is_named(with_drift: bool) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.lonely = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"no calibration token reached model\.layers\.1\.mlp\.lonely"):
        list(stages(model, [*names_of(model), "model.layers.1.mlp.lonely"], chunks(), with_drift=with_drift))


def test_calibration_lowers_the_error_of_what_the_model_says(texts: list[str], tokenizer: Any) -> None:
    exact = logits(tiny_model())
    errors = []
    for method, calibration in (("offset", None), ("refined", texts)):
        model = tiny_model()
        mikv.quantize(model, mikv.BCQConfig(bits=2, group_size=32, method=method), calibration, tokenizer=tokenizer)
        errors.append(float((logits(model) - exact).square().mean()))
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("tied", [False, True])
def test_calibrated_models_with_embeddings_survive_saving(tied: bool, texts: list[str], tokenizer: Any) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    config = mikv.BCQConfig(**BITS, quantize_embeddings=True, method="gptq-bcq")
    report = mikv.quantize(model, config, texts, tokenizer=tokenizer)
    assert report.method == "gptq-bcq"
    assert torch.equal(logits(reload(model)), logits(model))
    assert model.config.quantization_config.method == "gptq-bcq"


def test_every_layer_is_reported_as_it_is_done(texts: list[str], tokenizer: Any) -> None:
    calls: list[tuple[LayerReport, int, int]] = []
    config = mikv.BCQConfig(**BITS, module_settings={"model.layers.1.mlp.up_proj": {"bits": 4}})
    model = tiny_model()
    report = mikv.quantize(
        model, config, texts, tokenizer=tokenizer, on_progress=lambda *arguments: calls.append(arguments)
    )
    assert [layer for layer, _, _ in calls] == list(report.layers)
    assert [(done, total) for _, done, total in calls] == [(i, 14) for i in range(1, 15)]
    (up,) = [layer for layer in report.layers if layer.name == "model.layers.1.mlp.up_proj"]
    assert (up.bits, up.group_size, up.bits_per_weight) == (4, 32, 4 + 16 * 5 / 32)
    (gate,) = [layer for layer in report.layers if layer.name == "model.layers.1.mlp.gate_proj"]
    assert 0 < up.output_error < 0.5 * gate.output_error  # of the same input, with a bit less
    stored = [m for m in model.modules() if isinstance(m, BCQLinear)]
    num_weights = sum(m.in_features * m.out_features for m in stored)
    assert report.bits_per_weight == pytest.approx(8 * sum(m.num_bytes for m in stored) / num_weights)


def test_the_configuration_that_was_passed_is_not_changed() -> None:
    config = mikv.BCQConfig(**BITS)
    before = config.to_dict()
    mikv.quantize(tiny_model(), config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("calibration", "message"),
    [([], "holds no text"), ([""], "holds no text"), ("one text", "list of texts"), ([1, 2], "list of texts")],
)
def test_calibration_that_is_no_text_is_refused(calibration: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        mikv.quantize(tiny_model(), mikv.BCQConfig(**BITS), calibration, tokenizer=tokenizer)


def test_a_missing_tokenizer_is_asked_for(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="pass tokenizer="):
        mikv.quantize(tiny_model(), mikv.BCQConfig(**BITS), texts)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda m: setattr(m, "hf_device_map", {"model": "cpu", "lm_head": "disk"}), "several devices"),
        (lambda m: setattr(m.model.layers[0].mlp.up_proj, "weight", m.model.layers[0].mlp.gate_proj.weight), "share"),
    ],
)
def test_models_that_would_come_out_wrong_are_refused(prepare: Callable[[Any], None], message: str) -> None:
    model = tiny_model()
    prepare(model)
    with pytest.raises(UnsupportedModelError, match=message):
        mikv.quantize(model, mikv.BCQConfig(**BITS))


def test_chunks_are_of_one_length_and_stop_at_the_limit(tokenizer: Any, texts: list[str]) -> None:
    found = token_chunks(texts, tokenizer, max_tokens=100, sequence_length=30)
    assert [chunk.shape for chunk in found] == [(1, 30)] * 3
    assert token_chunks(["w5 w6"], tokenizer, 100, 30)[0].tolist() == [[5, 6]]


def test_nested_weights_are_read_with_fewer_bits_also_after_loading(texts: list[str], tokenizer: Any) -> None:
    exact, model = logits(tiny_model()), tiny_model()
    config = mikv.BCQConfig(bits=4, nested_bits=(2, 3), group_size=32, quantize_embeddings=True)
    report = mikv.quantize(model, config, texts, tokenizer=tokenizer)
    assert report.method == "refined"
    assert report.layers[0].bits_per_weight == 4 + 16 * (2 + 3 + 4 + 3) / 32
    again = reload(model)
    errors = []
    for bits in (2, 3, 4):
        set_bits(model, bits)
        set_bits(again, bits)
        assert torch.equal(logits(again), logits(model))
        errors.append(float((logits(model) - exact).square().mean()))
    assert errors == sorted(errors, reverse=True)
    set_bits(model, 2)
    assert torch.equal(logits(set_bits_of(reload(model), 2)), logits(model))
    assert "bits=2 of (2, 3, 4)" in repr(model.model.layers[0].mlp.up_proj)


def set_bits_of(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    set_bits(model, bits)
    return model


def test_set_bits_of_a_plain_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        set_bits(tiny_model(), 3)
    with pytest.raises(ConfigError, match="bits=3 is not one of 4"):
        set_bits(quantized(), 3)
    assert TOKENS.shape == (1, 40)
