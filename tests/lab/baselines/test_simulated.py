"""Caches with simulated storage: what they hold, what they refuse, and that other layers stay what they were."""

import pytest
import torch

from mikv.cache_names import parse_cache
from mikv.errors import CacheStateError, UnsupportedModelError
from mikv.integrations.transformers.versions import as_argument
from mikv.lab.baselines.held_bytes import tensor_bytes
from mikv.lab.baselines.simulated import SimulatedLayer
from tiny import LATENT, model_of, tiny_model

NAMES = ["zipcache", "turboquant3", "turboquant2.5"]
IDS = torch.arange(3, 90)[None]


@pytest.mark.parametrize("name", NAMES)
def test_only_full_attention_is_simulated_and_all_layers_are_counted(name: str) -> None:
    model, named = tiny_model("gemma3"), parse_cache(name)
    cache = named.make(model, IDS.shape[1])
    model(IDS, **as_argument(cache))
    sliding, full = cache.layers
    assert not isinstance(sliding, SimulatedLayer)
    assert isinstance(full, SimulatedLayer)
    assert named.bytes(cache) == tensor_bytes(vars(sliding)) + full.stored_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_16_bits_reads_on_in_16_bits(name: str) -> None:
    model = tiny_model().bfloat16()
    cache = parse_cache(name).make(model, IDS.shape[1])
    for piece in IDS.split((60, 20, 7), dim=1):
        logits = model(piece, **as_argument(cache)).logits
    assert logits.dtype == torch.bfloat16
    assert cache.layers[0].keys.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_taking_back_and_changing_rows_are_refused(name: str) -> None:
    model = tiny_model()
    cache = parse_cache(name).make(model, IDS.shape[1])
    model(IDS, **as_argument(cache))
    for call in (lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([0]))):
        with pytest.raises(CacheStateError, match=r"only reads on.*use a new cache for each text"):
            call()


@pytest.mark.parametrize("name", NAMES)
def test_latent_attention_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="multi-head latent attention"):
        parse_cache(name).make(model_of(LATENT.configuration()), 100)
