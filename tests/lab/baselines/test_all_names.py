"""Every cache that can be named reads a prompt, a chunk and single tokens, and `fill` is as good as its own prefill."""

import pytest
import torch

from mikv.cache_names import parse_cache, spellings
from mikv.integrations.transformers.versions import as_argument
from mikv.lab.recording import fill, record
from tiny import tiny_model

NUM_PROMPT, NUM_TOKENS = 300, 336
IDS = torch.randint(3, 96, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
PIECES = IDS[NUM_PROMPT:].split((33, 1, 1, 1))
PLAIN = [name for name in spellings() if not set(name) & set(": @")]
PARAMETRISED = ["h2o@0.25", "snapkv@0.25", "streaming@0.25", "kvpress:Knorm@0.25", "mikv:small"]
OVERRIDDEN = ["mikv:balanced+policy=window+low=drop+importance_ratio=0.1"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def recording(model):
    return record(model, IDS[:NUM_PROMPT])


def read_on(model, cache) -> torch.Tensor:
    return torch.cat([model(piece[None], **as_argument(cache)).logits[0] for piece in PIECES])


@pytest.mark.parametrize("name", [*PLAIN, *PARAMETRISED, *OVERRIDDEN])
def test_a_filled_cache_predicts_what_a_prefilled_one_predicts(name, model, recording) -> None:
    named = parse_cache(name)
    if (reason := named.unavailable()) is not None:
        pytest.skip(reason)
    prefilled = named.make(model, NUM_TOKENS)
    model(IDS[None, :NUM_PROMPT], **as_argument(prefilled))
    filled = fill(named.make(model, NUM_TOKENS), recording)
    assert prefilled.get_seq_length() == filled.get_seq_length() == NUM_PROMPT
    assert torch.equal(read_on(model, prefilled), read_on(model, filled))
    assert prefilled.get_seq_length() == filled.get_seq_length() == NUM_TOKENS
    assert 0 < named.bytes(prefilled) == named.bytes(filled)


@pytest.mark.parametrize("name", ["int4", "kivi2", "zipcache", "turboquant3", "h2o@0.25", "snapkv@0.25"])
def test_what_a_cache_stores_is_what_the_model_reads(name, model, recording) -> None:
    full = read_on(model, fill(parse_cache("full").make(model, NUM_TOKENS), recording))
    own = read_on(model, fill(parse_cache(name).make(model, NUM_TOKENS), recording))
    assert not torch.allclose(full, own, atol=1e-3)


@pytest.mark.parametrize("name", ["zipcache", "turboquant2.5", "streaming@0.3", "kivi2"])
def test_layers_that_are_not_full_attention_are_filled_too(name) -> None:
    model, named = tiny_model("gemma3"), parse_cache(name)
    prefilled = named.make(model, NUM_TOKENS)
    filled = fill(named.make(model, NUM_TOKENS), record(model, IDS[:NUM_PROMPT]))
    model(IDS[None, :NUM_PROMPT], **as_argument(prefilled))
    assert torch.equal(read_on(model, prefilled), read_on(model, filled))
