"""`mikv.integrations.quantizer.budget`: bits go where rounding hurts; the model stays as it is."""

import pytest
import torch

from mikv import BCQConfig, ConfigError
from mikv.integrations.quantizer import budget
from mikv.integrations.quantizer.budget import Matrix, allocate, bits_for_budget
from mikv.integrations.quantizer.config import ModuleSettings
from tiny import tiny_model

SETTINGS = ModuleSettings(bits=4, group_size=64, uniform=False, offset=True)


def settings_of(matrices):
    return dict.fromkeys(matrices, SETTINGS)


def average(matrices, bits):
    taken = sum(matrix.num_bits(SETTINGS, bits[name]) for name, matrix in matrices.items())
    return taken / sum(matrix.rows * matrix.columns for matrix in matrices.values())


def chunks(vocabulary=64):
    return [torch.randint(vocabulary, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def test_bits_of_a_matrix_are_all_that_is_stored():
    matrix = Matrix(64, 100, cost=1.0)
    assert matrix.num_bits(SETTINGS, 3) == 64 * (104 * 3 + 2 * 4 * 16)  # 13 bytes a plane; 2 groups of 3 + 1 scales
    uniform = ModuleSettings(bits=4, group_size=None, uniform=True, offset=True)
    assert matrix.num_bits(uniform, 3) == 64 * (104 * 3 + 2 * 16)


@pytest.mark.parametrize("budget_bits", [2.75, 3.2, 4.0, 5.1])
def test_a_budget_is_used_and_kept(budget_bits):
    matrices = {f"layer{i}": Matrix(64, 128, cost=1.7**i) for i in range(20)}
    bits = allocate(matrices, settings_of(matrices), budget_bits)
    one_more = (matrices["layer0"].num_bits(SETTINGS, 3) - matrices["layer0"].num_bits(SETTINGS, 2)) / (20 * 64 * 128)
    assert budget_bits - one_more < average(matrices, bits) <= budget_bits


def test_what_costs_more_gets_no_fewer_bits():
    matrices = {f"layer{i}": Matrix(64, 128, cost=1.7**i) for i in range(20)}
    bits = list(allocate(matrices, settings_of(matrices), 3.5).values())
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]


def test_equal_costs_get_equal_bits():
    matrices = {f"layer{i}": Matrix(64, 128, cost=1.0) for i in range(4)}
    assert set(allocate(matrices, settings_of(matrices), average(matrices, dict.fromkeys(matrices, 3))).values()) == {3}


def test_a_budget_below_two_bits_is_refused_with_the_least_that_works():
    matrices = {"layer": Matrix(64, 128, cost=1.0)}
    with pytest.raises(
        ConfigError, match=r"a budget of 2 bits per weight is less than 2 bits take .* use 2\.75 or more"
    ):
        allocate(matrices, settings_of(matrices), 2.0)
    assert allocate(matrices, settings_of(matrices), 2.75) == {"layer": 2}


def test_layers_that_do_nothing_get_the_fewest_bits_and_the_model_stays_as_it_is():
    model = tiny_model("llama")
    idle = "model.layers.0.mlp.up_proj"
    model.get_submodule("model.layers.0.mlp.down_proj").weight.data.zero_()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    bits = bits_for_budget(model, BCQConfig(group_size=32), 4.5, chunks())
    assert bits[idle] == bits["model.layers.0.mlp.gate_proj"] == 2 < max(bits.values())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_a_tied_embedding_is_one_of_the_layers_if_it_is_quantized():
    model = tiny_model("llama", tie_word_embeddings=True)
    names = set(bits_for_budget(model, BCQConfig(group_size=32), 4.5, chunks()))
    with_embedding = set(bits_for_budget(model, BCQConfig(group_size=32, quantize_embeddings=True), 4.5, chunks()))
    assert with_embedding - names == {"model.embed_tokens"}


def test_an_impossible_budget_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(budget, "_log_probabilities", lambda *args: pytest.fail("something was measured"))
    with pytest.raises(ConfigError, match=r"use 3\.50 or more"):
        bits_for_budget(tiny_model("llama"), BCQConfig(group_size=32), 1.0, chunks())
