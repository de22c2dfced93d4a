"""One sample through one cache after another: what is compared where, what is counted, what is noticed."""

from dataclasses import replace

import pytest
import torch

from mikv.cache.config import MiKVConfig
from mikv.cache_names import NamedCache, parse_cache
from mikv.errors import ConfigError
from mikv.lab.examination import Examination, SampleResult, Skipped
from mikv.lab.tasks.base import Sample, Turn
from mikv.models import LoadedModel
from misbehaving_caches import CrashingLayer, FailingLayer, NoiseLayer, prefilled, refusing, with_layers
from tiny_chat import chat_model, chat_tokenizer

CONTEXT = " ".join(f"The number of locker {i} is {i * 7919 % 1000}." for i in range(8))
ASKING = Sample((Turn(context=CONTEXT, question="Which number has locker 3?", answer_start="It is", max_new_tokens=6),))
TEXT = Sample(
    (Turn(context=CONTEXT, question=" And so it goes on for a while, word after word.", reply=""),), chat=False
)
TWICE = Sample(
    (
        *ASKING.turns,
        Turn("And locker 4?", max_new_tokens=3, score=lambda answer: 0.25, label="second"),
        Turn("Thank you.", reply="You are welcome."),
    )
)
EXACT = NamedCache(
    "exact",
    lambda model, num_tokens: parse_cache("full").make(model, num_tokens),
    parse_cache("full").bytes,
    lambda: None,
)


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", chat_model(), chat_tokenizer())


@pytest.fixture(scope="module")
def asking(loaded):
    return Examination(loaded, ASKING, chunk=5)


def untimed(result):
    return replace(result, decode_seconds=None)


def mean(values):
    return sum(values) / len(values)


def test_the_full_cache_is_at_no_distance_from_itself(asking):
    piece = len("Which number has locker 3?") + len(">\n<assistant\n") + len("It is")
    assert asking.full.kl == (0.0,) * piece
    assert asking.full.agreements == piece
    assert untimed(asking.through(EXACT)) == untimed(asking.full)


def test_a_cache_that_stores_noise_is_noticed(asking):
    noise = asking.through(with_layers("noise", NoiseLayer))
    honest = asking.through(parse_cache("mikv:balanced"))
    assert mean(noise.kl) > 1
    assert noise.agreements < len(noise.kl) / 2
    assert mean(honest.kl) < mean(noise.kl) / 20


@pytest.mark.parametrize("preset", ["balanced", "small", "paper-int2"])
def test_a_real_prefill_and_the_recording_give_the_same(loaded, preset):
    config = MiKVConfig.preset(preset)
    examination = Examination(loaded, ASKING)
    assert untimed(examination.through(prefilled(config))) == untimed(
        examination.through(parse_cache(f"mikv:{preset}"))
    )


def test_answers_are_those_of_greedy_generation(loaded, asking):
    [turn] = ASKING.turns
    text = chat_tokenizer().apply_chat_template(
        [{"role": "user", "content": turn.context + turn.question}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([loaded.tokenizer.encode(text + turn.answer_start, add_special_tokens=False)])
    output = loaded.model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    assert asking.full.answers[0].text == loaded.tokenizer.decode(output[0, ids.shape[1] - len("It is") :])
    assert asking.full.tokens == output.shape[1] - 1  # nobody has read the last token


def test_predictions_are_compared_up_to_the_first_own_answer_that_differs(loaded):
    examination = Examination(loaded, TWICE)
    same, other = examination.through(EXACT), examination.through(with_layers("noise", NoiseLayer))
    assert same.answers == examination.full.answers
    assert len(same.kl) == len(examination.full.kl)
    assert other.answers[0] != same.answers[0]
    assert len(other.kl) == len(Examination(loaded, ASKING).full.kl)


def test_scores_are_the_mean_over_the_turns_that_have_one(loaded):
    full = Examination(loaded, TWICE).full
    assert [(answer.score, answer.label) for answer in full.answers] == [(None, ""), (0.25, "second")]
    assert full.score == 0.25
    assert Examination(loaded, ASKING).full.score is None


def test_the_size_of_a_chunk_does_not_change_the_full_cache(loaded, asking):
    assert Examination(loaded, ASKING, chunk=1).full.answers == asking.full.answers


def test_likelihoods_are_those_of_one_pass_over_the_text(loaded):
    full = Examination(loaded, TEXT, chunk=7).full
    ids = torch.tensor([loaded.tokenizer.encode(TEXT.turns[0].context + TEXT.turns[0].question)])
    first = len(loaded.tokenizer.encode(TEXT.turns[0].context))
    log_probs = loaded.model(ids).logits[0].log_softmax(-1)
    chosen = log_probs[range(first, ids.shape[1] - 1), ids[0, first + 1 :]]
    assert (
        full.predicted == len(full.kl) - len(range(0, len(full.kl), 7)) + len(range(7, len(full.kl), 7)) == len(chosen)
    )
    assert full.nll == pytest.approx(-float(chosen.sum()), rel=1e-5)
    assert full.answers == ()
    assert full.decode_seconds is None


def test_likelihoods_through_another_cache_come_with_those_of_the_full_one(loaded):
    examination = Examination(loaded, TEXT)
    noise = examination.through(with_layers("noise", NoiseLayer))
    assert noise.full_nll == examination.full.nll
    assert noise.nll != noise.full_nll


def test_predictions_are_compared_with_those_of_a_reference_model(loaded, asking):
    reference = Examination(LoadedModel("other", chat_model(hidden_act="relu"), loaded.tokenizer), ASKING, chunk=5)
    assert untimed(Examination(loaded, ASKING, chunk=5, reference=asking).full) == untimed(asking.full)
    away = Examination(loaded, ASKING, chunk=5, reference=reference)
    assert len(away.full.kl) == len(asking.full.kl)
    assert mean(away.full.kl) > 0.001
    assert away.full.answers == asking.full.answers
    assert mean(away.through(EXACT).kl) == mean(away.full.kl)


def test_bytes_are_measured_at_the_end_and_compared_with_fp16(asking):
    full, packed = asking.full, asking.through(parse_cache("int8"))
    assert full.bytes == 2 * full.fp16_bytes == 2 * 2 * 2 * 64 * full.tokens * 4
    assert 0.5 < packed.bytes / packed.fp16_bytes < 0.7


def test_single_token_steps_are_timed(asking):
    assert 0 < asking.full.decode_seconds < 10


def test_a_cache_that_predicts_nan_is_skipped_with_the_reason(asking):
    reason = asking.through(with_layers("nan", FailingLayer))
    assert reason == Skipped(f"the model predicts NaN after {asking.full.tokens - 5 - len(asking.full.kl) + 5} tokens")


@pytest.mark.parametrize("error", [ConfigError("no room"), ValueError("no\nroom")])
def test_a_cache_that_cannot_be_made_is_skipped_with_the_reason(asking, error):
    assert asking.through(refusing(error)) == Skipped("no room")


def test_a_crash_in_another_library_is_a_reason_to_skip_and_in_ours_a_bug(asking):
    crashing = with_layers("crashing", CrashingLayer)
    skipped = asking.through(replace(crashing, is_foreign=True))
    assert skipped == Skipped("RuntimeError in another library: sizes do not match")
    with pytest.raises(RuntimeError, match="sizes do not match"):
        asking.through(crashing)


def test_other_errors_are_not_hidden(asking):
    with pytest.raises(RuntimeError, match="a bug"):
        asking.through(refusing(RuntimeError("a bug")))


def test_evicting_caches_are_made_for_the_length_at_the_end(asking):
    lengths = []

    def make(model, num_tokens):
        lengths.append(num_tokens)
        return parse_cache("full").make(model, num_tokens)

    result = asking.through(NamedCache("told", make, parse_cache("full").bytes, lambda: None))
    assert isinstance(result, SampleResult)
    assert lengths == [result.tokens + 1]  # the last token of the answer is not read
