"""`attach` never does nothing: after a generation the cache used is ours, or the user has been told why not."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Phi3Config, PreTrainedModel, pipeline

import mikv
from conformance.trial import Prompt
from mikv import ConfigError, MiKVCache, UnsupportedModelError
from mikv.integrations.transformers.versions import CACHE_ARGUMENT, as_argument
from tiny import FAMILIES, model_of, tiny_model, tiny_tokenizer

PROMPT = Prompt.random(75)
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}


def generate(model: Any, **options: Any) -> Any:
    return model.generate(input_ids=PROMPT.ids, attention_mask=PROMPT.mask, **OPTIONS | options)


def cache_of(output: Any) -> Any:
    return getattr(output, CACHE_ARGUMENT)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def test_the_cache_that_a_generation_returns_is_the_handles(model: PreTrainedModel) -> None:
    with mikv.attach(model, "small") as attached:
        first, second = generate(model), generate(model)
    assert type(cache_of(first)) is type(cache_of(second)) is MiKVCache
    assert cache_of(second) is attached.cache is not cache_of(first)
    assert attached.cache.config == mikv.MiKVConfig.preset("small")
    assert type(cache_of(generate(model))) is DynamicCache


@pytest.mark.parametrize("implementation", ["dynamic", "static", "quantized", "offloaded"])
def test_a_cache_implementation_of_the_checkpoint_is_replaced(implementation: str, model: PreTrainedModel) -> None:
    model.generation_config.cache_implementation = implementation
    with mikv.attach(model) as attached:
        assert cache_of(generate(model)) is attached.cache is not None
    assert model.generation_config.cache_implementation == implementation


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_cache": False}, "use_cache is False"),
        ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
        (as_argument(DynamicCache()), "given a DynamicCache"),
    ],
)
def test_what_the_caller_chose_is_left_alone_with_a_warning(
    options: dict[str, Any], reason: str, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with mikv.attach(model) as attached:
        generate(model, **options)
    assert attached.cache is None
    assert reason in caplog.text


def test_a_dialogue_goes_on_with_the_handles_cache_also_after_detaching(model: PreTrainedModel) -> None:
    exact = mikv.MiKVConfig(importance_ratio=1, high="exact")
    with mikv.attach(model, exact) as attached:
        first = generate(model)
        longer = torch.cat((first.sequences, PROMPT.ids[:, :9]), 1)
        second = model.generate(longer, **as_argument(attached.cache), **OPTIONS)
        assert cache_of(second) is attached.cache
    longest = torch.cat((second.sequences, PROMPT.ids[:, 9:20]), 1)
    third = model.generate(longest, **as_argument(attached.cache), **OPTIONS)
    assert torch.equal(third.sequences, model.generate(longest, **OPTIONS).sequences)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_an_attached_model_has_an_attachment_of_its_own(how: str, model: PreTrainedModel) -> None:
    attached = mikv.attach(model)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert type(cache_of(generate(copied))) is MiKVCache
    assert attached.cache is None
    mikv.detach(copied)
    assert type(cache_of(generate(copied))) is DynamicCache
    assert cache_of(generate(model)) is attached.cache


def test_an_attached_model_is_saved_as_it_was(model: PreTrainedModel, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path / "plain")
    with mikv.attach(model):
        generate(model)
        model.save_pretrained(tmp_path / "attached")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "attached" / name).read_bytes()


class Wrapper(torch.nn.Module):
    """A module around a model, whose generate calls that of the model, as adapters' do."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def generate(self, **options: Any) -> Any:
        return self.inner.generate(**options)


def test_wrappers_and_pipelines(model: PreTrainedModel) -> None:
    wrapper = Wrapper(Wrapper(model))  # type: ignore[arg-type]
    with mikv.attach(wrapper) as attached:
        assert cache_of(generate(wrapper)) is attached.cache is not None
    with mikv.attach(pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())) as attached:
        assert cache_of(generate(model)) is attached.cache is not None


@pytest.mark.parametrize("wrong", [None, 7, "smollm2", torch.nn.Linear(2, 2), FAMILIES["llama"].configuration()])
def test_what_is_no_model_is_refused_by_name(wrong: object) -> None:
    with pytest.raises(ConfigError, match=type(wrong).__name__):
        mikv.attach(wrong)


@pytest.mark.parametrize("config", ["smal", 7, {"low": "int4"}])
def test_what_is_no_configuration_is_refused(config: Any, model: PreTrainedModel) -> None:
    for make in (lambda: mikv.attach(model, config), lambda: MiKVCache(model.config, config)):
        with pytest.raises(ConfigError):
            make()
    assert MiKVCache(model, "small").config == MiKVCache(model.config, mikv.MiKVConfig.preset("small")).config


def test_a_cache_of_another_model_is_refused(model: PreTrainedModel) -> None:
    larger = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(mikv.CacheStateError, match=r"make it for model\.config itself"):
        larger(PROMPT.ids, **as_argument(MiKVCache(model.config)))
    larger.config._attn_implementation = model.config._attn_implementation = "mikv"
    with pytest.raises(mikv.CacheStateError, match="made for a model of 2 layers"):
        larger(PROMPT.ids, **as_argument(MiKVCache(model.config)))


def test_a_model_that_replaces_its_cache_says_so() -> None:
    """Phi-3 drops its cache when the text outgrows the length from which its position embeddings change."""
    half = 16
    model = model_of(
        FAMILIES["phi3"].configuration(
            head_dim=32,
            max_position_embeddings=400,
            original_max_position_embeddings=78,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * half,
                "long_factor": [2.0] * half,
                "original_max_position_embeddings": 78,
            },
        )
    )
    assert isinstance(model.config, Phi3Config)
    with mikv.attach(model), pytest.raises(UnsupportedModelError, match=r"has replaced the MiKVCache"):
        generate(model, max_new_tokens=12)
    assert type(cache_of(generate(model))) is DynamicCache


def test_beams_drafts_and_chunks_use_it_too(model: PreTrainedModel) -> None:
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 30}):
        with mikv.attach(model) as attached:
            assert cache_of(generate(model, **options)) is attached.cache is not None
