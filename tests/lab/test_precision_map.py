"""The precision map says what the cache itself holds, token by token, and what the policy said of every token."""

from dataclasses import replace
from importlib.resources import files

import pytest
import torch

from mikv import ConfigError, MiKVCache, MiKVConfig
from mikv.integrations.transformers.layer import MiKVLayer
from mikv.lab.fidelity import prefill
from mikv.lab.precision_map import precision_map, token_texts
from mikv.models import LoadedModel, load_model
from tiny import tiny_model, tiny_tokenizer
from tiny_chat import chat_tokenizer

NUM_TOKENS = 150
CONFIGS = {
    "balanced": MiKVConfig(min_recent=16),
    "h2o, dropping": MiKVConfig(policy="h2o", low="drop", importance_ratio=0.3, min_recent=0),
    "no attention": MiKVConfig(policy="key_norm", importance_ratio=0.2),
    "protected span": MiKVConfig(protected=((40, 50),), importance_ratio=0.2, min_recent=8),
}


def loaded(family="llama"):
    return LoadedModel(family, tiny_model(family), tiny_tokenizer())


def prompt(num_tokens=NUM_TOKENS):
    return torch.randint(3, 96, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()


def read(model, config, tokens):
    """A cache that has read the tokens in a prefill of its own."""
    cache = MiKVCache(model.config, config)
    prefill(model, cache, torch.tensor(tokens))
    return cache


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_map_counts_what_the_cache_counts(name, family):
    subject, config = loaded(family), CONFIGS[name]
    found = precision_map(subject, config, prompt())
    layers = [layer for layer in read(subject.model, config, prompt()).layers if isinstance(layer, MiKVLayer)]
    assert [layer.layer for layer in found.layers] == [layer.layer_idx for layer in layers]
    for mapped, layer in zip(found.layers, layers, strict=True):
        counts = layer.tokens.tokens_by_tier()
        assert mapped.high.sum(1).tolist() == [counts["high"]] * mapped.high.shape[0]
        assert (~mapped.high).sum(1).tolist() == [counts[mapped.rest]] * mapped.high.shape[0]
        assert counts[mapped.rest] > 0


def test_the_high_tier_holds_what_is_protected_and_then_what_the_policy_ranks_highest():
    found = precision_map(loaded(), CONFIGS["protected span"], prompt())
    for layer in found.layers:
        protected = torch.tensor([bool(reason) for reason in layer.protection])
        assert bool(layer.high[:, protected].all())
        for high, priority in zip(layer.high[:, ~protected], layer.priority[:, ~protected], strict=True):
            assert priority[high].min() >= priority[~high].max()


def test_protection_names_its_reason():
    found = precision_map(loaded(), CONFIGS["protected span"], prompt())
    reasons = found.layers[0].protection
    assert set(reasons[:4]) == {"sink"}
    assert set(reasons[40:50]) == {"protected"}
    assert reasons[-1] == "recent"
    assert reasons[20] == ""
    assert found.always_kept() == [bool(reason) for reason in reasons]


def test_a_token_that_is_asked_for_most_has_the_highest_priority():
    """Of keys alone, so that it can be checked by hand: the smallest key norm wins."""
    subject, config = loaded(), CONFIGS["no attention"]
    found = precision_map(subject, config, prompt())
    cache = read(subject.model, replace(config, warmup_tokens=1000), prompt())
    for mapped, layer in zip(found.layers, cache.layers, strict=True):
        norms = layer.tokens.tokens.tokens.keys[0].norm(dim=-1)
        assert torch.equal(mapped.priority.argmax(1), norms.argmin(1))


def test_shares_are_means_over_layers_and_heads():
    found = precision_map(loaded(), CONFIGS["balanced"], prompt())
    share = found.share_high()
    assert share.shape == (NUM_TOKENS,)
    assert share[:4].tolist() == [1.0] * 4
    assert float(share.sum()) == pytest.approx(sum(int(layer.high[0].sum()) for layer in found.layers) / 2)


def test_json_has_a_flag_and_a_priority_per_token_and_head():
    found = precision_map(loaded(), CONFIGS["balanced"], prompt())
    data = found.to_dict()
    assert len(data["texts"]) == len(data["layers"][0]["protection"]) == NUM_TOKENS
    for mapped, written in zip(found.layers, data["layers"], strict=True):
        assert [[flag == "1" for flag in head] for head in written["high"]] == mapped.high.tolist()
        assert torch.allclose(torch.tensor(written["priority"]), mapped.priority, rtol=0.006)


@pytest.mark.parametrize("text", ["plain words", "naïve café, 日本 and 🙂!", "ends in half a 日"])
def test_the_tokens_spell_the_text(text):
    tokenizer = chat_tokenizer()  # one token per byte
    tokens = tokenizer.encode(text)
    texts = token_texts(tokenizer, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == text


def test_layers_may_have_settings_of_their_own():
    settings = {"0": {"importance_ratio": 0.5, "sinks": 9}, "1": {"low": "drop"}}
    found = precision_map(loaded(), MiKVConfig(layer_settings=settings), prompt())
    first, second = found.layers
    assert int(first.high[0].sum()) > int(second.high[0].sum())
    assert (first.rest, second.rest) == ("low", "dropped")
    assert (first.protection[8], second.protection[8]) == ("sink", "")
    assert not found.always_kept()[8]


def test_layers_that_stay_exact_are_left_out():
    settings = {"0": {"importance_ratio": 1, "high": "exact"}}
    found = precision_map(loaded(), MiKVConfig(layer_settings=settings), prompt())
    assert [layer.layer for layer in found.layers] == [1]


def test_an_unfinished_character_is_shown_as_such():
    tokenizer = chat_tokenizer()
    assert token_texts(tokenizer, tokenizer.encode("日")[:2]) == ("", "\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("config", "num_tokens", "error"),
    [
        (
            MiKVConfig(importance_ratio=1, high="exact"),
            NUM_TOKENS,
            "leaves all 150 tokens exact in every layer of llama",
        ),
        (MiKVConfig(), 20, "leaves all 20 tokens exact .* at least warmup_tokens=64"),
        (MiKVConfig(skip_layers=(0, 1)), NUM_TOKENS, "leaves all 150 tokens exact"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_cache_without_tiers_is_refused(config, num_tokens, error):
    with pytest.raises(ConfigError, match=error):
        precision_map(loaded(), config, prompt(num_tokens))


def test_a_policy_of_age_alone_shows_the_same_priority_in_every_head():
    found = precision_map(loaded(), MiKVConfig(policy="recency", min_recent=0), prompt())
    for layer in found.layers:
        assert layer.priority.shape == layer.high.shape
        assert layer.priority[0].tolist() == list(range(NUM_TOKENS))


@pytest.mark.bundled
def test_the_bundled_model_keeps_what_the_cache_counts():
    subject, config = load_model(), MiKVConfig()
    text = files("mikv.lab").joinpath("texts/harbour.txt").read_text(encoding="utf-8")[:1500]
    tokens = subject.tokenizer.encode(text)
    found = precision_map(subject, config, tokens)
    cache = read(subject.model, config, tokens)
    assert len(found.layers) == 30
    for mapped, layer in zip(found.layers, cache.layers, strict=True):
        assert mapped.high.sum(1).tolist() == [layer.tokens.tokens_by_tier()["high"]] * 3
    assert "".join(found.texts) == text
    assert found.ratio == cache.memory().ratio
