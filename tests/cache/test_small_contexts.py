"""Short contexts say that they save nothing, why, and from which length on the cache does; budgets count it."""

import re

import pytest
import torch

from mikv import MiKVCache, MiKVConfig
from mikv.cache.accounting import cache_bytes
from mikv.cache.budget import choose_preset, shortest
from mikv.cache.geometry import CacheGeometry
from mikv.cli.options import CacheChoice
from mikv.errors import ConfigError
from mikv.integrations.transformers.versions import as_argument
from tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    made.config.dtype = torch.float32
    return made


def report(model, num_tokens, config=None, batch=1):
    cache = MiKVCache(model.config, config)
    with torch.no_grad():
        model(torch.arange(num_tokens)[None].repeat(batch, 1) % 90 + 3, **as_argument(cache))
    return cache.memory()


@pytest.mark.parametrize("preset", ["lossless", "balanced", "small"])
@pytest.mark.parametrize(("num_tokens", "words"), [(7, "nothing"), (62, "nothing"), (76, "next to nothing")])
def test_a_short_context_says_that_it_saves_nothing(model, preset, num_tokens, words):
    memory = report(model, num_tokens, MiKVConfig.preset(preset), batch=2)
    assert f"a context this short saves {words}" in str(memory)
    assert memory.to_dict()["note"] == memory.note
    length = int(re.search(r"from about ([\d,]+) tokens", memory.note)[1].replace(",", ""))
    assert report(model, num_tokens + length, MiKVConfig.preset(preset)).note is None


def test_a_context_that_saves_says_nothing(model):
    assert report(model, 400).note is None
    assert "saves" not in str(report(model, 400))
    assert MiKVCache(model.config).memory().note is None


def test_a_full_cache_does_not_promise_to_save(model):
    assert report(model, 20, MiKVConfig(importance_ratio=1, high="exact")).note is None


def test_statistics_of_the_warm_up_are_not_called_scores(model):
    """Sums of squares of queries are most of what a context of 20 tokens takes; scores are 4 bytes a token and head."""
    parts = report(model, 20).bytes_by_part
    assert parts["scores"] == 20 * 4 * 2 * 2  # 2 KV heads, 2 layers
    assert parts["statistics"] > 10 * parts["scores"]


def test_from_the_shortest_length_on_all_longer_ones_do(model):
    geometry = CacheGeometry.from_model_config(model.config)
    config = MiKVConfig.preset("balanced")

    def ratio_at(num_tokens):
        return cache_bytes(config, geometry, num_tokens).ratio

    found = shortest(ratio_at, 0.4)
    assert ratio_at(found - 1) > 0.4
    assert all(ratio_at(num_tokens) <= 0.4 for num_tokens in range(found, 2000))
    assert shortest(ratio_at, 0.01) is None


@pytest.mark.parametrize("num_tokens", [3, 64, 65, 200, 700, 5000])
@pytest.mark.parametrize("budget", [0.21, 0.3, 0.35, 0.6, 1.0])
def test_the_command_line_names_its_preset_at_every_length(model, budget, num_tokens, capsys):
    """The best that fits; in a context too short for any, the smallest, which it says."""
    geometry = CacheGeometry.from_model_config(model.config)
    ratios = {
        name: cache_bytes(MiKVConfig.preset(name), geometry, num_tokens).ratio
        for name in ("lossless", "balanced", "small")
    }
    fitting = [name for name, ratio in ratios.items() if ratio <= budget]
    config = CacheChoice.of_options(None, budget, None).for_model(model.config, num_tokens)
    said = capsys.readouterr().err
    assert config == MiKVConfig.preset(fitting[0] if fitting else "small")
    assert repr(fitting[0] if fitting else "small") in said
    assert f"{num_tokens:,} tokens" in said or f"{num_tokens} tokens" in said
    assert ("cannot be met" in said) == (not fitting)
    if fitting:
        assert choose_preset(budget, model.config, num_tokens).preset == fitting[0]


def test_a_budget_that_no_length_meets_is_refused(model):
    with pytest.raises(ConfigError, match="no length of context is enough"):
        CacheChoice.of_options(None, 0.01, None).for_model(model.config, 100)
