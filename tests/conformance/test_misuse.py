"""Models, masks and attention that would make a cache give garbage are refused with a message, at the first step."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs

import mikv
from conformance.subjects import BALANCED, EXACT, packed_config
from conformance.trial import Prompt, Subject
from mikv import CacheStateError, MiKVCache, UnsupportedModelError
from mikv.cache.geometry import CacheGeometry
from mikv.integrations.transformers.versions import as_argument
from tiny import FAMILIES, LATENT, tiny_model

PROMPT = Prompt.random(75)


@pytest.mark.parametrize("subject", [EXACT, BALANCED], ids=lambda subject: subject.name)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "mikv"])
def test_the_models_own_attention_may_change_at_any_time(attention: str, subject: Subject) -> None:
    model = tiny_model("llama")
    cache, expected = subject.make(model), subject.make(model)
    for ids in (PROMPT.ids, PROMPT.ids[:, :1]):
        logits = model(ids, **as_argument(expected)).logits
        own, model.config._attn_implementation = model.config._attn_implementation, attention
        assert torch.allclose(model(ids, **as_argument(cache)).logits, logits, atol=1e-3)
        assert model.config._attn_implementation == attention
        model.config._attn_implementation = own


def test_a_cache_made_for_a_copy_of_the_configuration_is_noticed() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    cache = MiKVCache(copy.deepcopy(model.config))
    with pytest.raises(CacheStateError, match=r"a copy of its configuration"):
        model(PROMPT.ids, **as_argument(cache))


def test_attention_weights_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        model(PROMPT.ids, **as_argument(BALANCED.make(model)), output_attentions=True)


@pytest.mark.parametrize("make", [lambda config: MiKVCache(config), CacheGeometry.from_model_config])
def test_latent_attention_is_refused_at_construction(make: object) -> None:
    with pytest.raises(UnsupportedModelError, match="latent"):
        make(LATENT.configuration())  # type: ignore[operator]


def test_attach_leaves_the_callers_own_cache_alone() -> None:
    model, own = tiny_model("llama"), DynamicCache()  # without layers yet, and therefore false
    with mikv.attach(model) as attachment:
        model.generate(PROMPT.ids, attention_mask=PROMPT.mask, **as_argument(own), max_new_tokens=2, do_sample=False)
    assert own.get_seq_length() == PROMPT.ids.shape[1] + 1
    assert attachment.cache is None


def test_the_attached_cache_is_the_models_and_not_that_of_its_drafts() -> None:
    model = tiny_model("llama")
    with mikv.attach(model, packed_config("balanced")) as attachment:
        model.generate(
            PROMPT.ids, attention_mask=PROMPT.mask, max_new_tokens=8, do_sample=False, assistant_early_exit=1
        )
    assert attachment.cache is not None
    assert len(attachment.cache.layers) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_agrees_with_transformers(family: str) -> None:
    config = FAMILIES[family].configuration()
    layer_types, kwargs = get_layer_types_and_kwargs(config)
    geometry = CacheGeometry.from_model_config(config)
    # before 5.23 transformers leaves out the layers that read another layer's keys; 5.16 has one dictionary for all
    types = [layer.layer_type for layer in geometry.layers]
    assert types == [*layer_types, *["dummy"] * (len(types) - len(layer_types))]
    for layer, own in zip(geometry.layers, kwargs if isinstance(kwargs, list) else [], strict=False):
        assert layer.layer_type == "dummy" or layer.window == own.get("sliding_window")


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_agrees_with_the_cache(family: str) -> None:
    model = tiny_model(family)
    geometry = CacheGeometry.from_model_config(model.config)
    cache = BALANCED.make(model)
    model(PROMPT.ids, **as_argument(cache))
    for layer, cached, memory in zip(geometry.layers, cache.layers, cache.memory().layers, strict=False):
        assert layer.is_compressible == (memory.skipped is None)
        if memory.skipped is None:
            assert cached.tokens.shape == (1, layer.num_kv_heads, layer.head_dim)
            continue
        assert sum(memory.tokens_by_tier.values()) == layer.num_cached(PROMPT.ids.shape[1])


def test_keys_that_other_layers_read_stay_as_they_are() -> None:
    skipped = BALANCED.make(tiny_model("gemma3n")).memory().skipped
    assert skipped[2] == "other layers read its keys and values too"
    assert 0 not in skipped


def test_states_of_linear_attention_count() -> None:
    model = tiny_model("qwen3-next")
    cache = BALANCED.make(model)
    model(PROMPT.ids, **as_argument(cache))
    linear = cache.layers[0]
    states = [state for kind in (linear.conv_states, linear.recurrent_states) for state in kind.values()]
    assert cache.memory().layers[0].bytes == sum(state.nbytes for state in states) > 0


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen2-half-sliding"])
@pytest.mark.parametrize("removed", [0, torch.tensor(0), -2, torch.tensor(-2)], ids=repr)
def test_a_crop_of_any_kind_of_number_frees_what_waits_for_it(removed: int | torch.Tensor, family: str) -> None:
    model = tiny_model(family)
    cache = EXACT.make(model)
    cache.activate_past_recording()
    model(PROMPT.ids, **as_argument(cache))
    cache.crop(0)
    model(PROMPT.ids[:, :4], **as_argument(cache))
    cache.crop(removed)
    assert type(cache.get_seq_length()) is int
    assert cache.get_seq_length() == 79 + int(removed)
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            assert layer.keys.shape[-2] < layer.sliding_window
