"""A conversation is one private file: words and cache cannot come apart, and no damage of it is believed."""

import errno
import json
import os
import random
import signal
import stat

import pytest
import torch
from safetensors import safe_open

from mikv.cache.config import MiKVConfig
from mikv.cli import conversation_file
from mikv.cli.answer import AnswerOptions
from mikv.cli.conversation import Conversation
from mikv.cli.model_fingerprint import fingerprint
from mikv.errors import CheckpointError
from mikv.integrations.transformers import MiKVCache
from mikv.models import LoadedModel
from tiny_chat import chat_model, chat_tokenizer

BALANCED = MiKVConfig.preset("balanced")
QUESTION = "A first question that is long enough to leave the warm-up behind."


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", chat_model(), chat_tokenizer())


@pytest.fixture
def conversation(loaded):
    said = Conversation(loaded, BALANCED)
    said.say(QUESTION, AnswerOptions(8))
    return said


def header_of(path):
    """The header of a safetensors file and the bytes behind it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_words(path, change):
    """Write the file anew with other words, their checksum as it would be if `mikv chat` had written them."""
    header, tensors = header_of(path)
    metadata = header["__metadata__"]
    words = change(json.loads(metadata["mikv.conversation"]))
    metadata["mikv.conversation"] = words if isinstance(words, str) else json.dumps(words)
    metadata["mikv.conversation.sha256"] = conversation_file._checksum(metadata["mikv.conversation"])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


def test_it_is_one_file_for_its_owner_only_and_a_saved_cache_too(conversation, tmp_path):
    before = os.umask(0)
    try:
        conversation.save(tmp_path / "talk")
    finally:
        os.umask(before)
    [path] = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert MiKVCache.load(path, conversation.loaded.model.config).get_seq_length() == len(conversation.token_ids) - 1


def test_an_existing_file_is_overwritten_only_when_told(conversation, tmp_path):
    (tmp_path / "b").write_text("precious")
    with pytest.raises(CheckpointError, match="exists"):
        conversation.save(tmp_path / "b")
    assert (tmp_path / "b").read_text() == "precious"
    conversation.save(tmp_path / "b", overwrite=True)
    conversation.load(tmp_path / "b")


@pytest.mark.parametrize("place", ["_settle", "_publish"])
def test_a_save_that_fails_leaves_the_old_conversation_whole(conversation, tmp_path, monkeypatch, place):
    path = tmp_path / "talk"
    conversation.save(path)
    old = path.read_bytes()
    conversation.say("And more.", AnswerOptions(8))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"mikv.atomic_file.{place}", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        conversation.save(path, overwrite=True)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_words_and_cache_are_of_one_moment_wherever_saving_is_killed(conversation, tmp_path):
    path = tmp_path / "talk"
    conversation.save(path)
    moments = {tuple(conversation.token_ids)}
    dice = random.Random(2)
    for i in range(20):
        conversation.say(f"Turn {i}", AnswerOptions(4))
        moments.add(tuple(conversation.token_ids))
        if (child := os.fork()) == 0:
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-5, 0.03))  # SIGALRM kills
            conversation.save(path, overwrite=True)
            os._exit(0)
        dice.random()
        os.waitpid(child, 0)
        other = Conversation(conversation.loaded, BALANCED)
        other.load(path)
        assert tuple(other.token_ids) in moments
        assert other.cache.get_seq_length() == len(other.token_ids) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: "{", "is not a saved conversation"),
        (lambda words: "[]", "it holds no JSON object"),
        (lambda words: '{"a":' + "[" * 100_000, "is not a saved conversation"),
        (lambda words: words | {"version": 3}, "format version 3, this mikv reads up to 2; update mikv"),
        (lambda words: words | {"version": "2"}, "it has no version"),
        (lambda words: words | {"version": True}, "it has no version"),
        (lambda words: words | {"fingerprint": "0" * 32}, "with other weights"),
        (lambda words: words | {"fingerprint": None}, "does not name its model"),
        (lambda words: words | {"model": 3}, "does not name its model"),
        (lambda words: words | {"token_ids": "x"}, "its token ids are not all from 0 to 260"),
        (lambda words: words | {"token_ids": [*words["token_ids"], 261]}, "not all from 0 to 260"),
        (lambda words: words | {"token_ids": [-1, *words["token_ids"]]}, "not all from 0 to 260"),
        (lambda words: words | {"token_ids": [True, *words["token_ids"]]}, "not all from 0 to 260"),
        (lambda words: words | {"token_ids": [1.0, *words["token_ids"]]}, "not all from 0 to 260"),
        (lambda words: words | {"token_ids": [10**400, *words["token_ids"]]}, "not all from 0 to 260"),
        (lambda words: words | {"token_ids": words["token_ids"][:-2]}, "its cache is said to hold"),
        (lambda words: words | {"cached_tokens": 3}, "do not belong together"),
        (lambda words: words | {"cached_tokens": -1}, "its cache is said to hold -1"),
        (lambda words: words | {"cached_tokens": None}, "its cache is said to hold None"),
        (lambda words: words | {"messages": [{"role": "user"}]}, "do not take turns"),
        (lambda words: words | {"messages": [{"role": "tool", "content": ""}]}, "do not take turns"),
        (lambda words: words | {"messages": words["messages"][::-1]}, "do not take turns"),
        (lambda words: words | {"messages": {"role": "user"}}, "it holds no messages"),
        (lambda words: words | {"messages": [1, 2]}, "it holds no messages"),
        (lambda words: words | {"messages": [{"role": [], "content": ""}]}, "do not take turns"),
        (lambda words: words | {"messages": [dict(m, content="\ud800") for m in words["messages"]]}, "is no text"),
        (lambda words: words | {"messages": [dict(m, content=["x"]) for m in words["messages"]]}, "is no text"),
    ],
)
def test_words_that_cannot_be_right_are_refused_and_change_nothing(conversation, tmp_path, change, message):
    path = tmp_path / "talk"
    conversation.save(path)
    with_words(path, change)
    before = conversation.cache, list(conversation.token_ids), list(conversation.messages)
    with pytest.raises(CheckpointError, match=message):
        conversation.load(path)
    assert (conversation.cache, conversation.token_ids, conversation.messages) == before


def test_a_flipped_bit_of_the_words_is_seen(conversation, tmp_path):
    path = tmp_path / "talk"
    conversation.save(path)
    data = path.read_bytes()
    start = data.index(b'"mikv.conversation"')
    end = data.index(b'"mikv.conversation.sha256"')
    dice = random.Random(1)
    for _ in range(200):
        place = dice.randrange(start, end)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << dice.randrange(7)]) + data[place + 1 :])
        with pytest.raises(CheckpointError):
            conversation.load(path)


def test_a_file_that_ends_early_is_refused(conversation, tmp_path):
    path = tmp_path / "talk"
    conversation.save(path)
    data = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            conversation.load(path)


def test_a_saved_cache_without_words_is_told_apart(conversation, tmp_path):
    conversation.cache.save(tmp_path / "cache")
    with pytest.raises(CheckpointError, match="mikv chat wrote no words into it"):
        conversation.load(tmp_path / "cache")


def test_a_conversation_in_two_files_of_an_older_version_keeps_its_words(conversation, loaded, tmp_path):
    conversation.cache.save(tmp_path / "old")
    record = {"version": 1, "model": "tiny", "fingerprint": "0" * 16, "messages": conversation.messages}
    (tmp_path / "old.json").write_text(json.dumps(record | {"token_ids": [1], "cached_tokens": 1}))
    other = Conversation(loaded, BALANCED)
    other.say("forgotten", AnswerOptions(4))
    other.load(tmp_path / "old")
    assert other.messages == conversation.messages
    asked = loaded.tokenizer.decode(other.next_token_ids("Go on."))
    assert QUESTION in asked
    assert asked.endswith("<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n")
    other.say("Go on.", AnswerOptions(4))
    other.save(tmp_path / "old", overwrite=True)
    other.load(tmp_path / "old")
    assert other.cache.get_seq_length() == len(other.token_ids) - 1


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"messages": 3}', "\udcff"])
def test_a_damaged_older_file_is_refused(conversation, tmp_path, text):
    (tmp_path / "old.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError):
        conversation.load(tmp_path / "old")


def test_an_older_file_that_is_too_large_is_not_read(conversation, tmp_path):
    with (tmp_path / "old.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes"):
        conversation.load(tmp_path / "old")


def test_every_weight_is_in_the_fingerprint():
    model = chat_model()
    first = fingerprint(model)
    assert first == fingerprint(chat_model())
    for name, tensor in model.state_dict().items():
        place = tuple(random.Random(name).randrange(size) for size in tensor.shape)
        kept = tensor[place].item()
        tensor[place] = kept + 1e-3
        assert fingerprint(model) != first, name
        tensor[place] = kept
    assert fingerprint(model) == first


def test_the_fingerprint_knows_numbers_dtypes_and_the_place_of_a_weight_but_no_names():
    first = fingerprint(chat_model())
    other = chat_model()
    other.config._name_or_path = "/another/place"
    assert fingerprint(other) == first
    other.config.rope_parameters = dict(other.config.rope_parameters) | {"rope_theta": 5.0}
    assert fingerprint(other) != first
    assert fingerprint(chat_model().to(torch.bfloat16)) != first
    swapped = chat_model()
    weight = swapped.model.layers[0].mlp.up_proj.weight.data
    weight[[0, -1]] = weight[[-1, 0]]
    assert fingerprint(swapped) != first


def test_the_words_are_metadata_that_others_can_read(conversation, tmp_path):
    conversation.save(tmp_path / "talk")
    with safe_open(tmp_path / "talk", framework="pt") as file:
        assert json.loads(file.metadata()["mikv.conversation"])["messages"] == conversation.messages
