"""Distances that weights cause: zero for the same model, and what they are computed from."""

import copy
import itertools

import pytest
import torch

from mikv.lab.tasks.text import passages
from mikv.lab.weight_fidelity import Reference, calibration_texts, draw
from tiny_chat import chat_model, chat_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def reference(tokenizer):
    return Reference.of_model(chat_model(), tokenizer, samples=2, num_tokens=40)


def test_a_model_is_at_no_distance_from_itself(reference):
    result = reference.measure(chat_model())
    assert [result[f"kl_{kind}"] for kind in ("prose", "code")] == [0, 0]
    assert [result[f"top1_{kind}"] for kind in ("prose", "code")] == [1, 1]


def test_changed_weights_are_noticed_and_perplexity_is_that_of_the_loss(reference):
    changed = copy.deepcopy(chat_model())
    with torch.no_grad():
        changed.get_output_embeddings().weight.mul_(1.5)
    result = reference.measure(changed)
    assert result["kl_prose"] > 1e-4
    tokens = [passage.tokens for passage in reference.passages if passage.kind == "code"]
    losses = [float(changed(x[None], labels=x[None]).loss) for x in tokens]
    assert result["perplexity_code"] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


def test_passages_have_the_length_asked_for_and_do_not_overlap(tokenizer):
    text = passages("prose", "report")
    drawn = [tokenizer.decode(tokens) for tokens in draw(text, tokenizer, 3, 50)]
    places = [text.find(part) for part in drawn]
    assert all(place >= 0 for place in places)
    assert all(after - before >= 50 for before, after in itertools.pairwise(places))
    assert {len(tokens) for tokens in draw(text, tokenizer, 3, 50)} == {50}


def test_calibration_shares_no_text_with_what_is_reported(tokenizer):
    texts = calibration_texts(tokenizer, 4, 60)
    assert len(texts) == 4
    for text in texts:
        assert text in passages("prose", "tune") or text in passages("code", "tune")
        assert text not in passages("prose", "report")
        assert text not in passages("code", "report")
