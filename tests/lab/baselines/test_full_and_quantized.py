"""The full cache and transformers' QuantizedCache are transformers' own, as they are."""

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from mikv.cache_names import parse_cache
from mikv.integrations.transformers.versions import as_argument
from tiny import tiny_model


def test_the_full_cache_holds_the_models_own_numbers() -> None:
    model, named = tiny_model(), parse_cache("full")
    cache = named.make(model, 87)
    assert type(cache) is DynamicCache
    model(torch.arange(3, 90)[None], **as_argument(cache))
    assert named.bytes(cache) == 2 * 2 * 2 * 64 * 87 * 4  # layers, keys and values, heads, channels, tokens, float32


@pytest.mark.parametrize(("name", "bits"), [("quanto4", 4), ("quanto2", 2), ("hqq4", 4), ("hqq2", 2), ("fp8", None)])
def test_a_quantized_cache_is_that_of_transformers(name: str, bits: int | None) -> None:
    named = parse_cache(name)
    if (reason := named.unavailable()) is not None:
        pytest.skip(reason)
    cache = named.make(tiny_model(), 87)
    assert type(cache) is QuantizedCache
    assert {getattr(layer, "nbits", None) for layer in cache.layers} == {bits}
