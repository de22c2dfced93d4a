"""mikv does what transformers asks of a cache: exact it gives the same tokens, packed it keeps its word (trial.py)."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

import mikv
from conformance.subjects import BALANCED, EXACT, EXACT_CONFIG, FINE, packed, packed_config
from conformance.suite import CHECKS
from conformance.trial import Prompt, Subject, Trial, require_same_tokens
from mikv import MiKVCache, UnsupportedModelError
from mikv.formats import BLOCK_TOKENS
from mikv.integrations.transformers.versions import as_argument
from tiny import FAMILIES, tiny_model

# What mikv does not do and says so: there is one mask per cache, and latents are not keys and values.
REFUSED = ("hiding_mask", "hidden_endings", "latent_attention")
FAMILY_CHECKS = [
    *((check, EXACT) for check in ("left_padding", "beam_search", "assisted_decoding")),
    *((check, FINE) for check in ("left_padding", "close_to_full_cache")),
]
STATEFUL = ("qwen3-next",)
HYBRIDS = ("gemma3", "gpt-oss", "qwen2-half-sliding")
HYBRID_CHECKS = ("second_turn", "crop", "crop_unprepared", "reset", "save_and_load")


def by_name(subject: Subject) -> str:
    return subject.name.removeprefix("MiKVCache ").strip("()")


@pytest.mark.parametrize("subject", [EXACT, BALANCED], ids=by_name)
@pytest.mark.parametrize("check", [name for name in CHECKS if name not in REFUSED])
def test_conforms(check: str, subject: Subject) -> None:
    CHECKS[check](Trial(tiny_model("llama"), subject))


@pytest.mark.parametrize("subject", [EXACT, BALANCED], ids=by_name)
@pytest.mark.parametrize("check", REFUSED)
def test_refuses_what_it_would_get_wrong(check: str, subject: Subject) -> None:
    with pytest.raises(UnsupportedModelError):
        CHECKS[check](Trial(tiny_model("llama"), subject))


@pytest.mark.parametrize(("check", "subject"), FAMILY_CHECKS, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_family_conforms(family: str, check: str, subject: Subject) -> None:
    if family in STATEFUL and check == "assisted_decoding":
        pytest.skip("transformers refuses drafts for models with linear attention")
    CHECKS[check](Trial(tiny_model(family), subject))


@pytest.mark.parametrize("subject", [EXACT, BALANCED], ids=by_name)
@pytest.mark.parametrize("check", HYBRID_CHECKS)
@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrid_conforms(family: str, check: str, subject: Subject) -> None:
    CHECKS[check](Trial(tiny_model(family), subject))


@pytest.mark.parametrize("check", ["left_padding", "second_turn", "crop", "save_and_load"])
@pytest.mark.parametrize("subject", [FINE, packed("lossless"), packed("small"), packed("paper-int4")], ids=by_name)
def test_preset_conforms(subject: Subject, check: str) -> None:
    CHECKS[check](Trial(tiny_model("llama"), subject))


@pytest.mark.xfail(strict=True, reason="the warm-up of all rows ends when the longest row is long enough")
def test_row_shorter_than_the_warm_up_is_as_if_alone() -> None:
    trial, prompt = Trial(tiny_model("llama"), FINE), Prompt.random(90, 9)
    batched = trial.generate(trial.cache(), prompt)
    alone = trial.replay(prompt.row(1), one_by_one=batched.tokens[1:, :-1])
    trial.require_same_rows(batched.logits[1:], alone, "the row alone")


def test_demotion_goes_on_after_assisted_decoding() -> None:
    trial, prompt, more = Trial(tiny_model("llama"), BALANCED), Prompt.random(75), Prompt.random(300, seed=1)
    caches = [trial.cache(), trial.cache()]
    trial.generate(caches[0], prompt, prompt_lookup_num_tokens=6)
    trial.generate(caches[1], prompt)
    for cache in caches:
        trial.feed_each(cache, more.ids)
    drafted, plain = (cache.memory().tokens_by_tier["high"] for cache in caches)
    assert abs(drafted - plain) < BLOCK_TOKENS * len(caches[0].layers)


def attached(model: PreTrainedModel) -> None:
    """No cache: `generate` makes one itself, by way of mikv.attach."""
    if not hasattr(model, "_mikv_attachment"):
        mikv.attach(model, EXACT_CONFIG)


@pytest.mark.parametrize(
    "check",
    [
        "greedy",
        "left_padding",
        "several_sequences",
        "beam_search",
        "early_exit",
        "chunked_prefill",
        "text_generation_pipeline",
    ],
)
def test_attached_model_conforms(check: str) -> None:
    CHECKS[check](Trial(tiny_model("llama"), Subject("mikv.attach", attached, exact=True)))


@pytest.mark.parametrize("which", ["model", "draft"])
@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_attached_models_and_drafts_give_the_same_tokens(family: str, which: str) -> None:
    models, prompt = {"model": tiny_model(family), "draft": tiny_model(family)}, Prompt.random(75)
    trial = Trial(models["model"], EXACT)
    plain = trial.generate(None, prompt)
    with mikv.attach(models[which], EXACT_CONFIG if which == "model" else packed_config("balanced")):
        drafted = trial.generate(None, prompt, assistant_model=models["draft"])
    require_same_tokens(drafted.tokens, plain.tokens, "decoding without drafts")


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_offloading_changes_nothing(family: str) -> None:
    model, prompt = tiny_model(family), Prompt.random(90, 44)
    trial = Trial(model, BALANCED)
    expected = trial.generate(trial.cache(), prompt)
    offloading = MiKVCache(model.config, packed_config("balanced"), offloading=True)
    assert torch.equal(trial.generate(offloading, prompt).logits, expected.logits)


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_decode_steps_compile_without_a_graph_break_and_once(family: str) -> None:
    """One graph for the first step and one for all later lengths; the cache is as if nothing had been compiled."""
    model, prompt, after = tiny_model(family, num_hidden_layers=2), Prompt.random(75), Prompt.random(20)
    caches = BALANCED.make(model), BALANCED.make(model)
    for cache in caches:
        model(prompt.ids, **as_argument(cache))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for token in after.ids.split(1, dim=1):
        actual, expected = compiled(token, **as_argument(caches[0])), model(token, **as_argument(caches[1]))
        assert torch.allclose(actual.logits, expected.logits, atol=2e-3)  # a query that is 1e-7 off may round otherwise
    torch._dynamo.reset()
    assert counter.frame_count <= 2
    assert caches[0].memory() == caches[1].memory()


def test_a_copy_of_a_cache_compiles_as_a_cache_of_its_own() -> None:
    model, prompt, after = tiny_model("llama", num_hidden_layers=1), Prompt.random(75), Prompt.random(1)
    cache = BALANCED.make(model)
    model(prompt.ids, **as_argument(cache))
    copied = copy.deepcopy(cache)
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(after.ids, **as_argument(copied))
    torch._dynamo.reset()
    assert (cache.get_seq_length(), copied.get_seq_length()) == (75, 76)
