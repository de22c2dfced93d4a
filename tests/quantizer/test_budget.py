"""Bits by budget: they go where rounding hurts, what is stored keeps the budget, and the model is left as it was."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import mikv
from mikv import BCQConfig, ConfigError
from mikv.integrations.quantizer import budget, modules
from mikv.integrations.quantizer.budget import bits_for_budget, num_bytes, offers_of, with_hessians, within_budget
from mikv.integrations.quantizer.config import ModuleSettings
from tiny import tiny_model

SETTINGS = ModuleSettings(bits=4, group_size=64, uniform=False, offset=True)
SIZE = (64, 128)


def allocated(costs: Sequence[float], budget_bits: float) -> list[int]:
    """Bits of layers of one size."""
    offers = {f"layer{i}": offers_of(SIZE, SETTINGS, cost) for i, cost in enumerate(costs)}
    return list(within_budget(offers, len(costs) * 64 * 128, budget_bits).values())


def average(bits: Sequence[int]) -> float:
    return 8 * sum(num_bytes(SIZE, SETTINGS, own) for own in bits) / (len(bits) * 64 * 128)


def chunks(vocabulary: int = 64) -> list[Tensor]:
    return [torch.randint(vocabulary, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def test_bytes_of_a_matrix_are_all_that_is_stored() -> None:
    assert num_bytes((64, 100), SETTINGS, 3) == 64 * (13 * 3 + 2 * 4 * 2)  # 13 bytes a plane; 2 groups of 3 + 1 scales
    uniform = ModuleSettings(bits=4, group_size=None, uniform=True, offset=True)
    assert num_bytes((64, 100), uniform, 3) == 64 * (13 * 3 + 2 * 2)


@pytest.mark.parametrize("budget_bits", [2.75, 3.2, 4.0, 5.1])
def test_a_budget_is_used_and_kept(budget_bits: float) -> None:
    bits = allocated([1.7**i for i in range(20)], budget_bits)
    one_more = (average([3]) - average([2])) / 20
    assert budget_bits - one_more < average(bits) <= budget_bits


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.001, 30.0]), min_size=1, max_size=12), st.floats(2.75, 8))
def test_what_costs_more_gets_no_fewer_bits_and_what_costs_the_same_the_same(
    costs: list[float], budget_bits: float
) -> None:
    bits = allocated(costs, budget_bits)
    assert average(bits) <= budget_bits + 1e-9
    assert bits == allocated(costs, budget_bits)
    by_cost = {cost: {own for other, own in zip(costs, bits, strict=True) if other == cost} for cost in costs}
    assert all(len(own) == 1 for own in by_cost.values())
    if len(set(costs)) == len(costs):
        assert [own for _, own in sorted(zip(costs, bits, strict=True))] == sorted(bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_layers_that_cost_the_same_get_the_bits_that_the_budget_is_made_for(bits: int) -> None:
    assert allocated([1.0] * 30, average([bits])) == [bits] * 30
    nearly = [1 + i * 1e-6 for i in range(30)]
    assert allocated(nearly, average([bits])) == [bits] * 30


def test_a_budget_below_two_bits_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ConfigError, match=r"a budget of 2 bits per weight is less than .* use 2\.75 or more"):
        allocated([1.0], 2.0)
    assert allocated([1.0], 2.75) == [2]


def test_layers_that_do_nothing_get_the_fewest_bits_and_the_model_stays_as_it_is() -> None:
    model = tiny_model("llama")
    idle = "model.layers.0.mlp.up_proj"
    model.get_submodule("model.layers.0.mlp.down_proj").weight.data.zero_()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    bits = bits_for_budget(model, BCQConfig(group_size=32), 4.5, chunks())
    assert bits[idle] == bits["model.layers.0.mlp.gate_proj"] == 2 < max(bits.values())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_a_tied_embedding_is_one_of_the_layers_if_it_is_quantized() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    names = set(bits_for_budget(model, BCQConfig(group_size=32), 4.5, chunks()))
    with_embedding = set(bits_for_budget(model, BCQConfig(group_size=32, quantize_embeddings=True), 4.5, chunks()))
    assert with_embedding - names == {"model.embed_tokens"}


@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_probed_with_what_the_method_knows_of_their_inputs(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    config = BCQConfig(group_size=32, quantize_embeddings=True).resolved(calibrated=True)
    modules.fix_skipped(model, config)
    names = [*modules.linear_names(model, config), "model.embed_tokens"]
    hessians = dict(with_hessians(model, names, config, chunks()))
    assert sorted(hessians) == sorted(names)
    for name, hessian in hessians.items():
        if name == "model.embed_tokens" and not tied:
            assert hessian is None
        else:
            assert hessian is not None
            assert hessian.shape == (modules.sizes(model.get_submodule(name))[1],) * 2
    config.method = "offset"
    assert set(dict(with_hessians(model, names, config, chunks())).values()) == {None}


def test_an_impossible_budget_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_log_probabilities", lambda *args: pytest.fail("something was measured"))
    with pytest.raises(ConfigError, match=r"use 3\.50 or more"):
        bits_for_budget(tiny_model("llama"), BCQConfig(group_size=32), 1.0, chunks())


@pytest.mark.parametrize("method", ["auto", "gptq", "offset"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_what_is_stored_keeps_the_budget_and_is_saved_and_loaded(
    tmp_path: Path, texts: list[str], tokenizer: Any, method: str, embeddings: bool
) -> None:
    own = {"model.layers.1.self_attn.q_proj": {"bits": 5}, "model.layers.1.self_attn.k_proj": {"group_size": 64}}
    config = BCQConfig(bits=3, group_size=32, method=method, quantize_embeddings=embeddings, module_settings=own)
    model, tokens, measured = tiny_model("llama"), chunks()[0], []
    report = mikv.quantize(
        model, config, texts, tokenizer=tokenizer, budget_bits=4.6, on_measured=lambda *of: measured.append(of)
    )
    assert 4.3 < report.bits_per_weight <= 4.6
    bits = {layer.name: layer.bits for layer in report.layers}
    assert bits["model.layers.1.self_attn.q_proj"] == 5
    assert len(set(bits.values())) > 1
    assert len(measured) == len(bits) - 1, "the layer whose bits are given was measured"
    assert config.module_settings == own
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.hf_quantizer.quantization_config.of_module("model.layers.1.self_attn.k_proj").group_size == 64
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("budget_bits", "settings", "calibrated", "message"),
    [
        (3.2, {}, False, "budget_bits measures .* needs calibration texts"),
        (3.2, {"nested_bits": (2, 3)}, True, "budget_bits and nested precision exclude each other"),
        (9, {}, True, "budget_bits 9 must be between 0 and 8"),
        (float("nan"), {}, True, "budget_bits nan must be between"),
    ],
)
def test_a_budget_that_goes_with_nothing_is_refused(
    texts: list[str], tokenizer: Any, budget_bits: float, settings: dict[str, Any], calibrated: bool, message: str
) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=message):
        mikv.quantize(
            model, BCQConfig(**settings), texts if calibrated else None, tokenizer=tokenizer, budget_bits=budget_bits
        )
    assert not getattr(model, "is_quantized", False)
