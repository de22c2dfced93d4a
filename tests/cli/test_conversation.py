"""A conversation over one cache: each turn feeds only what is new, whatever happened in the turn before."""

import itertools

import pytest
import torch

from mikv.cache.config import MiKVConfig
from mikv.chat_template import chat_ids, next_turn_ids
from mikv.cli.answer import AnswerOptions
from mikv.cli.conversation import Conversation
from mikv.errors import CheckpointError, ConfigError
from mikv.models import LoadedModel, load_model
from tiny_chat import TEMPLATE, chat_model, chat_tokenizer

EXACT = MiKVConfig(importance_ratio=1, high="exact")
TEXTS = ("Hello there", "And what of the second turn?", "abab")
NUM_NEW = 24


@pytest.fixture
def loaded():
    return LoadedModel("tiny", chat_model(), chat_tokenizer())


def talk(conversation, texts=TEXTS, **options):
    return [conversation.say(text, AnswerOptions(NUM_NEW, **options)) for text in texts]


def continuation(loaded, token_ids):
    """What the model says after `token_ids`, all fed at once to transformers' own cache."""
    ids = torch.tensor([token_ids])
    loaded.model.set_attn_implementation("sdpa")
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False)
    return tuple(output[0, len(token_ids) :].tolist())


def test_turns_over_one_cache_equal_feeding_everything_at_once(loaded):
    conversation = Conversation(loaded, EXACT)
    prompts = []
    answers = []
    for text in TEXTS:
        prompts.append(conversation.next_token_ids(text))
        answers += talk(conversation, [text])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == continuation(loaded, prompt)


def test_a_turn_feeds_only_new_tokens(loaded):
    conversation = Conversation(loaded, EXACT)
    _, second = talk(conversation, TEXTS[:2])
    # the last token of the first answer was not fed yet; < and > are special tokens
    assert second.num_prompt_tokens == 1 + len(f">\n<user\n{TEXTS[1]}>\n<assistant\n")
    assert conversation.cache.get_seq_length() == len(conversation.token_ids) - 1


def test_the_ids_of_a_conversation_decode_to_its_template(loaded):
    conversation = Conversation(loaded, EXACT, system="Be brief.")
    talk(conversation)
    text = loaded.tokenizer.decode(conversation.token_ids)
    assert text.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n<|im_start|>"
    )
    assert text.count("<|im_start|>assistant\n") == 3
    for question in TEXTS[1:]:
        assert f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" in text


def test_an_answer_that_ends_itself_is_closed_once(loaded):
    prompt = Conversation(loaded, EXACT).next_token_ids(TEXTS[0])
    answer = continuation(loaded, prompt)
    end = next(token for i, token in enumerate(answer) if i > 2 and token not in answer[:i])
    loaded.model.generation_config.eos_token_id = end
    conversation = Conversation(loaded, EXACT)
    [first] = talk(conversation, TEXTS[:1])
    assert first.token_ids == answer[: answer.index(end)]
    assert first.num_new_tokens == len(first.token_ids) + 1
    asked = conversation.next_token_ids(TEXTS[1])
    assert asked == [
        *prompt,
        *first.token_ids,
        *loaded.tokenizer.encode(f"<|im_end|>\n<|im_start|>user\n{TEXTS[1]}<|im_end|>\n<|im_start|>assistant\n"),
    ]


def test_an_answer_spelled_otherwise_than_the_tokenizer_would_stays_as_it_was_said():
    tokenizer = chat_tokenizer()
    a, b, merged = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "ab"))
    messages = [{"role": "user", "content": "x"}]
    known = [*chat_ids(tokenizer, messages), a, b]
    messages += [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "y"}]
    new = next_turn_ids(tokenizer, messages, known)
    assert merged not in [*known, *new]
    assert [*known, *new] == [
        i for token in chat_ids(tokenizer, messages) for i in ([a, b] if token == merged else [token])
    ]


def test_a_template_that_trims_answers_does_not_disturb_the_next_turn():
    tokenizer = chat_tokenizer(TEMPLATE.replace("message['content']", "message['content'].strip()"))
    messages = [{"role": "user", "content": "x"}]
    known = [*chat_ids(tokenizer, messages), *tokenizer.encode("  yes  ")]
    messages += [{"role": "assistant", "content": "  yes  "}, {"role": "user", "content": "z"}]
    new = tokenizer.decode(next_turn_ids(tokenizer, messages, known))
    assert new == "<|im_end|>\n<|im_start|>user\nz<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_drops_answers_is_refused():
    tokenizer = chat_tokenizer("{{ messages[-1]['content'] }}")
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with pytest.raises(ConfigError, match="drops earlier answers"):
        next_turn_ids(tokenizer, messages, [5, 6])


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(loaded):
    tokens = itertools.count(1)
    conversation = Conversation(loaded, EXACT)
    [stopped] = talk(conversation, TEXTS[:1], stop=lambda: next(tokens) == 3)
    assert stopped.num_new_tokens == 3
    prompt = conversation.next_token_ids(TEXTS[1])
    [second] = talk(conversation, TEXTS[1:2])
    assert second.token_ids == continuation(loaded, prompt)


def test_an_answer_that_is_broken_off_leaves_the_conversation_as_it_was(loaded):
    conversation, undisturbed = Conversation(loaded, EXACT), Conversation(loaded, EXACT)
    talk(undisturbed)

    def interrupt(*_):
        raise KeyboardInterrupt

    talk(conversation, TEXTS[:1])
    before = list(conversation.token_ids), list(conversation.messages)
    hook = loaded.model.model.layers[1].register_forward_hook(interrupt)  # layer 0 has stored the tokens already
    with pytest.raises(KeyboardInterrupt):
        talk(conversation, ["lost"])
    hook.remove()
    assert (conversation.token_ids, conversation.messages) == before
    talk(conversation, TEXTS[1:])
    assert conversation.token_ids == undisturbed.token_ids


def test_a_restart_forgets_all_but_the_system_message(loaded):
    conversation = Conversation(loaded, EXACT, system="s")
    first = talk(conversation)
    conversation.restart(conversation.system)
    assert conversation.messages == [{"role": "system", "content": "s"}]
    assert [answer.token_ids for answer in talk(conversation)] == [answer.token_ids for answer in first]


def test_an_answer_ends_where_the_context_of_the_model_does():
    loaded = LoadedModel("tiny", chat_model(max_position_embeddings=60), chat_tokenizer())
    conversation = Conversation(loaded, EXACT)
    prompt = conversation.next_token_ids("x" * 30)
    [answer] = talk(conversation, ["x" * 30])
    assert len(prompt) + answer.num_new_tokens == 60
    with pytest.raises(ConfigError, match="was trained for 60; shorten it or begin anew with /reset"):
        talk(conversation, ["y"])


@pytest.mark.parametrize("preset", ["balanced", "small", "paper-int2"])
def test_a_saved_conversation_continues_identically(loaded, tmp_path, preset):
    conversation = Conversation(loaded, MiKVConfig.preset(preset))
    talk(conversation, ["A first question that is long enough to leave the warm-up behind.", *TEXTS[:1]])
    assert conversation.cache.memory().tokens_by_tier["low"] > 0
    conversation.save(tmp_path / "talk")
    other = Conversation(loaded, EXACT)
    other.load(tmp_path / "talk")
    assert other.config == conversation.config
    assert [a.token_ids for a in talk(other, TEXTS[1:])] == [a.token_ids for a in talk(conversation, TEXTS[1:])]
    assert other.messages == conversation.messages


def test_a_conversation_with_other_weights_is_refused(loaded, tmp_path):
    conversation = Conversation(loaded, EXACT)
    talk(conversation, TEXTS[:1])
    conversation.save(tmp_path / "talk")
    loaded.model.get_input_embeddings().weight.data += 0.01
    other = LoadedModel("other", loaded.model, loaded.tokenizer)
    with pytest.raises(CheckpointError, match="saved from the model 'tiny', this is 'other' with other weights"):
        Conversation(other, EXACT).load(tmp_path / "talk")


@pytest.mark.bundled
def test_the_bundled_model_is_fed_what_its_template_says():
    loaded = load_model()
    conversation = Conversation(loaded, MiKVConfig())
    conversation.say("What is the capital of France?", AnswerOptions(20))
    text = "And of Germany?"
    messages = [*conversation.messages, {"role": "user", "content": text}]
    assert conversation.next_token_ids(text) == chat_ids(loaded.tokenizer, messages)
    assert "Berlin" in conversation.say(text, AnswerOptions(20)).text
