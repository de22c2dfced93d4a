"""Models, masks and attention that would make a cache give garbage are refused with a message, at the first step."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs

import mikv
from conformance.subjects import BALANCED, EXACT, packed_config
from conformance.trial import Prompt, Subject
from mikv import CacheStateError, MiKVCache, MiKVConfig, UnsupportedModelError
from mikv.cache.geometry import CacheGeometry
from mikv.errors import CheckpointError
from tiny import FAMILIES, LATENT, tiny_model

PROMPT = Prompt.random(75)


@pytest.mark.parametrize("subject", [EXACT, BALANCED], ids=lambda subject: subject.name)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_than_mikv_is_noticed_in_the_same_step(
    attention: str, num_layers: int, subject: Subject
) -> None:
    model = tiny_model("llama", num_hidden_layers=num_layers)
    cache = subject.make(model)
    model.set_attn_implementation(attention)
    with pytest.raises(CacheStateError, match="attn_implementation='mikv'"):
        model(PROMPT.ids, past_key_values=cache)


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss"])
def test_another_attention_is_noticed_when_the_only_compressed_layer_is_the_last(family: str) -> None:
    model = tiny_model(family)
    cache = BALANCED.make(model)
    model.config._attn_implementation = "eager"
    with pytest.raises(CacheStateError, match="attn_implementation='mikv'"):
        model(PROMPT.ids, past_key_values=cache)


def test_a_cache_made_for_a_copy_of_the_configuration_is_noticed() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    cache = MiKVCache(copy.deepcopy(model.config))
    with pytest.raises(CacheStateError, match="attn_implementation='mikv'"):
        model(PROMPT.ids, past_key_values=cache)


def test_a_failed_step_makes_the_cache_unusable_until_reset() -> None:
    model = tiny_model("llama")
    cache = BALANCED.make(model)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(CacheStateError):
        model(PROMPT.ids, past_key_values=cache)
    model.config._attn_implementation = "mikv"
    with pytest.raises(CacheStateError, match=r"cache\.reset\(\)"):
        model(PROMPT.ids, past_key_values=cache)
    cache.reset()
    model(PROMPT.ids, past_key_values=cache)
    assert cache.get_seq_length() == PROMPT.ids.shape[1]


def test_attention_weights_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        model(PROMPT.ids, past_key_values=BALANCED.make(model), output_attentions=True)


@pytest.mark.parametrize("make", [lambda config: MiKVCache(config), CacheGeometry.from_model_config])
def test_latent_attention_is_refused_at_construction(make: object) -> None:
    with pytest.raises(UnsupportedModelError, match="latent"):
        make(LATENT.configuration())  # type: ignore[operator]


def test_attach_leaves_the_callers_own_cache_alone() -> None:
    model, own = tiny_model("llama"), DynamicCache()  # without layers yet, and therefore false
    with mikv.attach(model) as attachment:
        model.generate(PROMPT.ids, attention_mask=PROMPT.mask, past_key_values=own, max_new_tokens=2, do_sample=False)
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
    model(PROMPT.ids, past_key_values=cache)
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
    model(PROMPT.ids, past_key_values=cache)
    linear = cache.layers[0]
    states = [state for kind in (linear.conv_states, linear.recurrent_states) for state in kind.values()]
    assert cache.memory().layers[0].bytes == sum(state.nbytes for state in states) > 0


def rewrite_header(saved: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a saved cache with another header."""
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["mikv"])
    assert header["version"] == 3
    change(header)
    save_file(load_file(saved), saved.with_name("other.safetensors"), metadata={"mikv": json.dumps(header)})
    return saved.with_name("other.safetensors")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            1,
            "has format version 1, whose layout of the tiers this mikv no longer reads; fill a cache again and save it",
        ),
        (4, "has format version 4, this mikv reads up to 3; update mikv"),
    ],
)
def test_a_cache_saved_in_another_version_is_refused(version: int, message: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = BALANCED.make(model)
    model(PROMPT.ids, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    other = rewrite_header(tmp_path / "cache.safetensors", lambda header: header.update(version=version))
    with pytest.raises(CheckpointError, match=message):
        MiKVCache.load(other, model.config)


def test_a_cache_saved_before_keys_were_rounded_with_feedback_is_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = MiKVCache(model.config, MiKVConfig(key_rounding="nearest"))
    model(PROMPT.ids, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")

    def as_version_2(header: dict[str, Any]) -> None:
        header["version"] = 2
        del header["config"]["key_rounding"]

    loaded = MiKVCache.load(rewrite_header(tmp_path / "cache.safetensors", as_version_2), model.config)
    assert loaded.config == cache.config
    step = PROMPT.ids[:, :1]
    assert torch.equal(model(step, past_key_values=loaded).logits, model(step, past_key_values=cache).logits)
