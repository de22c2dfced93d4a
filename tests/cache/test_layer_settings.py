"""Settings of single layers in the real cache: its formats, its bytes, and what a file keeps of them."""

import copy

import pytest
import torch

from mikv import MiKVCache, MiKVConfig
from mikv.cache.accounting import cache_bytes
from mikv.cache.geometry import CacheGeometry
from mikv.errors import ConfigError
from mikv.integrations.transformers.versions import as_argument
from tiny import tiny_model

CONFIG = MiKVConfig(
    min_recent=8,
    layer_settings={
        "0": {"low": "int8", "key_rounding": "nearest"},
        "1-2": {"importance_ratio": 0.4, "high": "int4"},
        "-1": {"low": "drop", "policy": "h2o", "center_keys": False},
    },
)
NUM_TOKENS = 200


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=5)


@pytest.fixture(scope="module")
def cache(model):
    """A cache that has read a prompt."""
    cache = MiKVCache(model.config, CONFIG)
    tokens = torch.arange(NUM_TOKENS)[None] % 90 + 3
    with torch.no_grad():
        model(tokens, **as_argument(cache))
    return cache


def storage_bytes(cache):
    """Bytes of all storages of all layers, found without the cache's own bookkeeping."""
    tensors = [tensor.untyped_storage() for layer in cache.layers for tensor in layer.tokens.state()[0].values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())


def test_every_layer_stores_what_its_own_settings_say(cache):
    assert [layer.tokens.config for layer in cache.layers] == [CONFIG.for_layer(index, 5) for index in range(5)]
    tiers = [layer.tokens_by_tier for layer in cache.memory().layers]
    assert [tier["dropped"] > 0 for tier in tiers] == [False, False, False, False, True]
    assert tiers[1]["high"] == tiers[2]["high"] > tiers[0]["high"] == tiers[3]["high"]
    of_layer = [layer.bytes_by_part["low"] for layer in cache.memory().layers]
    assert of_layer[0] > of_layer[3] > of_layer[1] > of_layer[4] == 0


def test_the_accounting_predicts_the_bytes_of_the_storage(model, cache):
    predicted = cache_bytes(CONFIG, CacheGeometry.from_model_config(model.config), NUM_TOKENS)
    assert predicted.bytes == storage_bytes(cache) == cache.memory().bytes
    assert (
        predicted.bytes
        != cache_bytes(MiKVConfig(min_recent=8), CacheGeometry.from_model_config(model.config), NUM_TOKENS).bytes
    )


def test_a_saved_cache_goes_on_as_before(model, cache, tmp_path):
    cache.save(tmp_path / "cache.safetensors")
    loaded = MiKVCache.load(tmp_path / "cache.safetensors", model.config)
    assert loaded.config == CONFIG
    token = torch.tensor([[7]])
    with torch.no_grad():
        expected, found = (model(token, **as_argument(c)).logits for c in (copy.deepcopy(cache), loaded))
    assert torch.equal(expected, found)


def test_layers_that_the_model_does_not_have_are_refused(model):
    with pytest.raises(ConfigError, match="'5' is not among this model's layers, 0 to 4"):
        MiKVCache(model.config, MiKVConfig(layer_settings={"5": {"low": "int8"}}))
