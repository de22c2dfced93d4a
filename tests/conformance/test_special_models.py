"""What single families do with a cache besides attending to it: arguments of their own, shared layers, other caches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel

import mikv
from conformance.class_trial import CACHE, EXACT, NOISE, Recorder, Subject, off_by
from conformance.model_classes import model_classes, prompt, tiny_config, tiny_model
from mikv import MiKVCache, UnsupportedModelError
from tiny import FIRST_WORD, VOCAB_SIZE
from tiny import tiny_model as family_model

IDS = prompt((90,))["input_ids"].clamp(FIRST_WORD, VOCAB_SIZE - 1)


@pytest.fixture
def llama() -> Iterator[PreTrainedModel]:
    model = family_model("llama")
    attention = model.config._attn_implementation
    yield model
    model.config._attn_implementation = attention


UNKNOWN = {
    "block_indices": torch.zeros(1, 4, 90, 2, dtype=torch.long),
    "sinks": torch.ones(4),
    "attention_bias": torch.zeros(1, 4, 90, 90),
    "an_argument_of_tomorrow": torch.ones(3),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "without a cache"])
def test_a_tensor_argument_of_attention_that_is_not_known_is_refused_by_name(
    name: str, is_cached: bool, llama: PreTrainedModel
) -> None:
    cache = MiKVCache(llama.config, EXACT)
    llama.config._attn_implementation = "sdpa" if is_cached else "mikv"
    with pytest.raises(UnsupportedModelError, match=name):
        llama(IDS, **({CACHE: cache} if is_cached else {"use_cache": False}), **{name: UNKNOWN[name]})


def test_numbers_and_positions_among_the_arguments_of_attention_are_none_of_ours(llama: PreTrainedModel) -> None:
    expected = llama(IDS, use_cache=False).logits
    cache = MiKVCache(llama.config, EXACT)
    positions = torch.arange(90)[None]
    found = llama(IDS, position_ids=positions, a_number=3, a_word="none", nothing=None, **{CACHE: cache}).logits
    assert off_by(found, expected) < NOISE


@pytest.mark.parametrize("kept", [1, 2, 7])
@pytest.mark.parametrize("name", ["Gemma4ForCausalLM", "Gemma4UnifiedForCausalLM", "Gemma3nForCausalLM"])
def test_layers_that_read_the_keys_of_others_are_right_for_the_last_few_queries(name: str, kept: int) -> None:
    if name not in model_classes():
        pytest.skip(f"this transformers has no {name}")
    model = tiny_model(name)
    expected = model(IDS, use_cache=False).logits
    cache, start = MiKVCache(model.config, EXACT), 0
    for stop in (80, 90):  # into an empty cache and into a filled one
        found = model(IDS[:, start:stop], logits_to_keep=kept, **{CACHE: cache}).logits
        assert off_by(found, expected[:, stop - kept : stop]) < NOISE
        start = stop


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration", "EncoderDecoderModel"])
def test_a_cache_of_ours_inside_that_of_an_encoder_decoder_is_exact_or_refused(name: str) -> None:
    try:
        subject = Subject(tiny_model(name))
    except ValueError as error:  # transformers 5.16 has no default for EncoderDecoderModel's configuration
        pytest.skip(f"{name} was not built: {error}")
    expected = subject.reference[0]
    try:
        inner = MiKVCache(subject.model.config, EXACT)
        cache = EncoderDecoderCache(inner, type(expected.cache.cross_attention_cache)())
        found = subject.generate(0, Recorder(expected.tokens), **{CACHE: cache})
    except UnsupportedModelError:
        assert subject.changes(live=False) == ""
    else:
        assert off_by(found.logits, expected.logits) < NOISE
        assert inner.get_seq_length() > IDS.shape[1]


@pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache` are set:FutureWarning")  # by PEFT's prefixes
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "LoraConfig"])
def test_attach_to_an_adapted_model_uses_our_cache_or_says_why_not(kind: str) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {} if kind == "LoraConfig" else {"num_virtual_tokens": 5}
    torch.manual_seed(0)
    model = peft.get_peft_model(family_model("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()

    def logits(result: Any) -> Tensor:
        return torch.stack(result.logits)

    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    asked |= {"input_ids": IDS, "return_dict_in_generate": True}
    expected = model.generate(**asked)
    try:
        with mikv.attach(model, EXACT):
            found = model.generate(**asked)
    except mikv.MiKVError:
        return
    assert isinstance(getattr(found, CACHE), MiKVCache)
    assert off_by(logits(found), logits(expected)) < NOISE


def test_cross_attention_is_exact_or_refused() -> None:
    """A decoder with cross-attention of its own, as BERT has in an encoder-decoder."""
    from transformers import BertLMHeadModel

    config = tiny_config(BertLMHeadModel.config_class, {"add_cross_attention": True, "is_decoder": True})
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval().requires_grad_(False)
    states = torch.randn(1, 12, config.hidden_size)
    expected = model(IDS, encoder_hidden_states=states, use_cache=False).logits
    with pytest.raises(UnsupportedModelError, match="cross"):
        model(IDS, encoder_hidden_states=states, **{CACHE: MiKVCache(model.config, EXACT)})
    assert torch.equal(model(IDS, encoder_hidden_states=states, use_cache=False).logits, expected)
