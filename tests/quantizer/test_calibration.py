"""Calibration that cannot work is refused by name before anything is changed; what can is right or names the layer."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, RobertaConfig

import mikv
from mikv.errors import ConfigError, NumericsError, UnsupportedModelError
from mikv.integrations.quantizer import QuantizationReport
from mikv.integrations.quantizer.calibrate import token_chunks
from mikv.weights.module import BCQModule
from mikv.weights.solve import METHODS, solve
from tiny import tiny_model


@pytest.fixture
def quantize(texts: list[str], tokenizer: Any) -> Callable[..., QuantizationReport]:
    def run(model: PreTrainedModel, calibration: Any = texts, **settings: Any) -> QuantizationReport:
        budget = settings.pop("budget_bits", None)
        config = mikv.BCQConfig(**{"bits": 3, "group_size": 32} | settings)
        return mikv.quantize(model, config, calibration, tokenizer=tokenizer, budget_bits=budget)

    return run


def changed(edit: Callable[[Any], object], dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    model = tiny_model(**settings).to(dtype)
    with torch.no_grad():
        edit(model.model)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["down_proj", "up_proj"])  # its weights, its inputs
def test_layers_of_zeros_have_no_error(quantize: Any, method: str, which: str) -> None:
    report = quantize(changed(lambda m: m.layers[0].mlp.get_submodule(which).weight.zero_()), method=method)
    errors = {layer.name: layer.output_error for layer in report.layers}
    assert all(math.isfinite(error) for error in errors.values())
    assert errors[f"model.layers.0.mlp.{which}"] == 0
    json.dumps(list(errors.values()), allow_nan=False)


@pytest.mark.parametrize("method", METHODS)
def test_16_bit_floats_that_overflow_name_the_layer_whose_inputs_do(quantize: Any, method: str) -> None:
    model = changed(lambda m: m.layers[0].mlp.down_proj.weight.fill_(6e4), torch.float16)
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs .*--dtype float32"):
        quantize(model, method=method)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("budget_bits", [None, 4])
def test_weights_that_are_not_finite_are_an_error_of_ours(quantize: Any, value: float, budget_bits: float) -> None:
    model = changed(lambda m: m.layers[1].mlp.up_proj.weight[0, 0].fill_(value))
    with pytest.raises(NumericsError, match="infinite"):
        quantize(model, budget_bits=budget_bits)


def test_layers_that_no_solver_can_code_are_named(quantize: Any) -> None:
    model = changed(lambda m: m.layers[1].mlp.up_proj.weight.mul_(1e8))
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj: a scale or offset does not fit"):
        quantize(model)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("method", ["rtn", "offset", "greedy"])
def test_weights_are_coded_as_well_as_larger_ones_or_refused(bits: int, method: str) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    exact = float((solve(weight, bits, 32, method).dequantize() - weight).norm() / weight.norm())
    errors = {}
    for exponent in range(-30, 1):
        with suppress(NumericsError):
            coded = solve(weight * 10**exponent, bits, 32, method)
            errors[exponent] = float((coded.dequantize() / 10**exponent - weight).norm() / weight.norm())
    assert all(error < 1.6 * exact + 0.06 for error in errors.values()), (exact, errors)
    assert set(range(-5, 1)) <= set(errors) <= set(range(-8, 1))
    with pytest.raises(NumericsError, match="weights are around 1e-09, too small for scales of 16 bits"):
        solve(weight * 1e-9, bits, 32, method)


def test_rows_that_are_next_to_nothing_do_not_count() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[3:9] *= 1e-9
    assert solve(weight, 4, 32, "offset").dequantize().isfinite().all()


def test_models_read_no_more_at_once_than_they_can(quantize: Any) -> None:
    config = GPT2Config(vocab_size=96, n_positions=16, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    assert len(quantize(AutoModelForCausalLM.from_config(config)).layers) == 8
    config = RobertaConfig(  # its positions begin at 2, so that 20 are 18
        vocab_size=96,
        max_position_embeddings=20,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=True,
    )
    with pytest.raises(ConfigError, match=r"cannot read 20 tokens at once .*use a smaller sequence_length"):
        quantize(AutoModelForCausalLM.from_config(config))


def test_a_tokenizer_of_another_model_is_refused(quantize: Any) -> None:
    with pytest.raises(ConfigError, match="the tokenizer gives token 95, but the model's embedding has 50 rows"):
        quantize(tiny_model(vocab_size=50))


@pytest.mark.parametrize("embeddings", [False, True])
def test_models_without_layers_are_quantized_as_far_as_there_is_something(quantize: Any, embeddings: bool) -> None:
    model = tiny_model(num_hidden_layers=0)
    if embeddings:
        assert len(quantize(model, quantize_embeddings=True).layers) == 2
    else:
        with pytest.raises(UnsupportedModelError, match="has no linear layers to quantize"):
            quantize(model)


@pytest.mark.parametrize("name", ["max_tokens", "sequence_length"])
def test_no_tokens_are_refused(texts: list[str], tokenizer: Any, name: str) -> None:
    limits: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name}=0 must be at least 1"):
        mikv.quantize(tiny_model(), mikv.BCQConfig(), texts, tokenizer=tokenizer, **limits)


def endless(texts: list[str]) -> Iterator[str]:
    while True:
        yield from texts


@pytest.mark.parametrize("budget_bits", [None, 4.5])
def test_generators_are_calibration_and_are_read_as_far_as_needed(
    quantize: Any, texts: list[str], tokenizer: Any, budget_bits: float | None
) -> None:
    model, other = tiny_model(), tiny_model()
    quantize(model, (text for text in texts), budget_bits=budget_bits)
    quantize(other, texts, budget_bits=budget_bits)
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert len(token_chunks(endless(texts), tokenizer, 5000, 500)) == 10


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (iter([]), "holds no text .or is a generator that was used up"),
        (b"bytes", "must be a list of texts, or None; it is of type bytes"),
        ({"text": "w5"}, "it is of type dict"),
        (5, "it is of type int"),
        ([{"text": "w5"}], "it holds a dict"),
        ([["w5"]], "it holds a list"),
        (["w5", None], "it holds a NoneType"),
    ],
)
def test_what_are_no_texts_is_named(quantize: Any, calibration: Any, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=message):
        quantize(model, calibration)
    assert not any(isinstance(module, BCQModule) for module in model.modules())


def test_only_the_beginning_of_a_long_text_is_tokenized(tokenizer: Any) -> None:
    seen: list[int] = []

    def counted(text: str, **options: Any) -> Any:
        seen.append(len(text))
        return tokenizer(text, **options)

    text = "w5 w61 w7 " * 2**20
    start = time.perf_counter()
    chunks = token_chunks([text], counted, 4096, 512)
    assert time.perf_counter() - start < 5
    assert sum(seen) < 2**17
    whole = tokenizer(text[: 2**16], verbose=False)["input_ids"]
    assert torch.cat(chunks, 1)[0].tolist() == whole[:4096]
    rare = "w5" + " " * 2**17 + "w6 " * 50  # more characters per token than is expected
    assert torch.cat(token_chunks([rare], tokenizer, 40, 20), 1)[0].tolist() == [5] + [6] * 39


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_experts_are_refused_by_name_or_kept(quantize: Any, family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"modules_to_not_convert=\['experts'\]"):
        quantize(tiny_model(family))
    assert len(quantize(tiny_model(family), modules_to_not_convert=["experts"]).layers) == 8


class RoutedMLP(torch.nn.Module):
    """Experts that are linear layers of their own: each sees the tokens that are routed to it."""

    def __init__(self, mlp: torch.nn.Module, reached: int) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))
        self.mlp, self.reached = mlp, reached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = (x[..., :4] * 100).argmax(-1) % self.reached
        out = self.mlp(x)
        for i, expert in enumerate(self.experts):
            if bool((chosen := choice == i).any()):
                out[chosen] = out[chosen] + expert(x[chosen])
        return out


@pytest.mark.parametrize("method", ["refined", "gptq"])
def test_experts_of_their_own_are_calibrated_on_their_tokens_or_named_first(quantize: Any, method: str) -> None:
    model = tiny_model()
    model.model.layers[1].mlp = RoutedMLP(model.model.layers[1].mlp, reached=4)
    report = quantize(model, method=method)
    assert all(math.isfinite(layer.output_error) for layer in report.layers)
    model = tiny_model()
    model.model.layers[1].mlp = RoutedMLP(model.model.layers[1].mlp, reached=3)
    with pytest.raises(ConfigError, match=r"reached model\.layers\.1\.mlp\.experts\.3; .*--modules-to-not-convert mod"):
        quantize(model, method=method)
    assert not any(isinstance(module, BCQModule) for module in model.modules())
