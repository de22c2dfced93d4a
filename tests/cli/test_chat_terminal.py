"""`mikv chat` on a pseudo-terminal: pasting, keys typed ahead, Ctrl-C at any moment."""

import fcntl
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest
import torch

from mikv.cache.config import MiKVConfig
from mikv.cli.answer import AnswerOptions
from mikv.cli.chat import Chat, _on_interrupt
from mikv.cli.conversation import Conversation
from mikv.cli.progress import Stopped
from mikv.errors import CacheStateError
from mikv.integrations.transformers import MiKVCache
from mikv.integrations.transformers.versions import as_argument
from mikv.models import LoadedModel
from tiny_chat import chat_model, chat_tokenizer

EXACT = MiKVConfig(importance_ratio=1, high="exact")
PROMPT = b"\x1b[0m>"
WAIT = 60.0


class Terminal:
    """A pseudo-terminal with `mikv chat` in it; `screen` is what the program has written, `seen` how far one looked."""

    def __init__(self, *arguments):
        self.keyboard, self.inside = pty.openpty()
        self.modes = termios.tcgetattr(self.inside)
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from mikv.cli import main; main()", "chat", *map(str, arguments)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), self.inside),
            env=environment,
            start_new_session=True,
            preexec_fn=self._become_controlling,  # so that Ctrl-C becomes a signal
        )
        self.screen, self.seen = b"", 0

    def _become_controlling(self):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fcntl.ioctl(self.inside, termios.TIOCSCTTY, 0)

    def type(self, keys):
        os.write(self.keyboard, keys)

    def see(self, text):
        """Wait until `text` comes; returns what came before it, since the last call."""
        end = time.monotonic() + WAIT
        while (place := self.screen.find(text, self.seen)) < 0:
            assert time.monotonic() < end, (text, self.screen[self.seen :])
            assert self.process.poll() is None, self.screen
            self._read()
        before = self.screen[self.seen : place]
        self.seen = place + len(text)
        return before

    def tokens_read(self):
        """The next summary says how many."""
        line = self.see(b" tokens read").decode("utf-8", "replace")
        return int(re.findall(r"[\d,]+$", line)[0].replace(",", ""))

    def leave(self):
        """Ctrl-D at an empty prompt; returns the exit code."""
        self.type(b"\x04")
        end = time.monotonic() + WAIT
        while self.process.poll() is None and time.monotonic() < end:
            self._read()
        return self.process.returncode

    def _read(self):
        if select.select([self.keyboard], [], [], 0.1)[0]:
            self.screen += os.read(self.keyboard, 1 << 16)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)
        os.close(self.inside)


@pytest.fixture(scope="module")
def opened(tiny_folder):
    """One process for all tests, since it starts in seconds."""
    terminal = Terminal("-m", tiny_folder, "--max-new-tokens", 400)
    terminal.see(PROMPT)
    yield terminal
    terminal.close()


@pytest.fixture
def chat(opened):
    """At the prompt of a new conversation."""
    opened.type(b"/reset\r")
    opened.see(b"is forgotten")
    opened.see(PROMPT)
    return opened


def test_what_is_pasted_is_one_message_at_the_prompt_and_while_an_answer_comes(chat):
    chat.type(b"\x1b[200~one\ntwo\r\nthree\n\x1b[201~\r")
    assert chat.tokens_read() == len("<user\none\ntwo\nthree>\n<assistant\n")
    chat.see(PROMPT)
    chat.type(b"x\r")
    chat.see(b"\x1b[?2004h")  # pasting is one message in the midst of an answer, too
    chat.type(b"\x1b[200~four\rfive\x1b[201~\r")
    assert chat.tokens_read() == 1 + len(">\n<user\nx>\n<assistant\n")
    assert chat.tokens_read() == 1 + len(">\n<user\nfour\nfive>\n<assistant\n")
    chat.see(PROMPT)


def test_ctrl_c_at_the_prompt_discards_the_line(chat):
    chat.type(b"half a line")
    chat.see(b"line")
    chat.type(b"\x03")
    chat.see(b"Ctrl-D or /exit leaves")
    chat.see(PROMPT)
    os.kill(chat.process.pid, signal.SIGINT)
    chat.see(b"Ctrl-D or /exit leaves")
    chat.see(PROMPT)
    chat.type(b"hi\r")
    assert chat.tokens_read() == len("<user\nhi>\n<assistant\n")
    chat.see(PROMPT)


def test_ctrl_c_stops_an_answer_and_the_next_one_comes(chat):
    for turn in range(4):
        chat.type(b"hi\r")
        chat.see(b"\x1b[?2004h")
        time.sleep(0.1 * turn)
        chat.type(b"\x03")
        assert b" 400 new" not in chat.see(PROMPT)
    chat.type(b"hi\r")
    chat.tokens_read()
    chat.see(PROMPT)


def test_keys_of_all_kinds_end_no_chat(chat):
    dice = random.Random(3)
    allowed = [key for key in range(256) if key not in (3, 4, 10, 13, 26, 28)]  # these leave, or send
    lines = [bytes(dice.choices(allowed, k=20)) for _ in range(10)]
    for number, line in enumerate([*lines, b"[red]/x[/]", b"\x00"]):
        chat.type(line + b"\x03" * 4)  # whatever state the keys have led to: a search, a quoted key, an answer
        time.sleep(0.1)
        chat.type(b"/nope%d\r" % number)
        chat.see(b"there is no command /nope%d" % number)
    for line in (b"/load \xff\xfe", b"\xff", b"/x[/red]"):
        chat.type(line + b"\r")
        chat.see(b"error: ")
        chat.see(PROMPT)
    assert b"Traceback" not in chat.screen


def test_the_terminal_is_given_back_as_it_was(chat):
    assert chat.leave() == 0
    assert termios.tcgetattr(chat.inside) == chat.modes
    assert chat.screen.rindex(b"\x1b[?2004l") > chat.screen.rindex(b"\x1b[?2004h")
    assert b"Traceback" not in chat.screen


def press(moments):
    """Ctrl-C at each of these times."""
    start = time.monotonic()
    for moment in moments:
        time.sleep(max(0.0, start + moment - time.monotonic()))
        os.kill(os.getpid(), signal.SIGINT)


def continuation(model, token_ids, num_new):
    """What the model says after `token_ids`, all fed at once to transformers' own cache."""
    ids = torch.tensor([token_ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False)
    return output[0, len(token_ids) :].tolist()


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_a_conversation_survives_interrupts_at_random_moments(presses, capsys):
    """17 turns with one to three presses each: what comes then is what an undisturbed model would say."""
    reference, loaded = (
        chat_model(num_hidden_layers=6),
        LoadedModel("tiny", chat_model(num_hidden_layers=6), chat_tokenizer()),
    )
    chat = Chat(Conversation(loaded, EXACT), AnswerOptions(12))
    chat._try("A first turn.")
    dice, stopped = random.Random(presses), 0
    for turn in range(17):
        moments = sorted(dice.uniform(0.0, 0.15) for _ in range(presses))
        capsys.readouterr()
        chat.interrupts.begin()
        with _on_interrupt(chat.interrupts):
            sender = threading.Thread(target=press, args=(moments,))
            sender.start()
            chat._try(f"turn {turn} " + "word " * dice.randrange(60))
            sender.join()
        heard = capsys.readouterr().err
        stopped += "stopp" in heard
        assert "error" not in heard
        expected = continuation(reference, chat.conversation.next_token_ids("y"), 3)
        assert list(chat.conversation.say("y", AnswerOptions(3)).token_ids) == expected
        if len(chat.conversation.token_ids) > 1500:
            chat.conversation.restart(None)
    assert stopped > 5


def test_reading_is_stopped_between_two_layers_and_the_earlier_turns_stay(capsys):
    loaded = LoadedModel("tiny", chat_model(num_hidden_layers=6), chat_tokenizer())
    chat = Chat(Conversation(loaded, EXACT), AnswerOptions(3))
    chat._try("A first turn.")
    before = chat.conversation.token_ids
    seen = []
    layers = loaded.model.model.layers
    hook = layers[2].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: seen.append(list(layers).index(layer)))
    chat._try("A second turn.")
    hook.remove()
    assert seen == [0, 1, 2]
    assert "neither it nor your message is kept" in capsys.readouterr().err
    assert chat.conversation.token_ids is before
    assert not any(layer._forward_hooks and len(layer._forward_hooks) > 1 for layer in layers)


@pytest.mark.parametrize(
    ("leaves_tokens", "can_crop", "is_kept"), [(False, True, True), (True, True, True), (True, False, False)]
)
def test_a_cache_is_kept_if_it_can_be_taken_back_and_else_filled_anew(monkeypatch, leaves_tokens, can_crop, is_kept):
    loaded = LoadedModel("tiny", chat_model(), chat_tokenizer())
    conversation, undisturbed = Conversation(loaded, EXACT), Conversation(loaded, EXACT)
    for one in (conversation, undisturbed):
        one.say("A first turn.", AnswerOptions(3))
    cache = conversation.cache

    def stopped(loaded, token_ids, cache, options):
        if leaves_tokens:
            loaded.model.model(torch.tensor([[5, 6, 7]]), **as_argument(cache))
        raise Stopped

    def refuse(*_):
        raise CacheStateError("they are demoted")

    with monkeypatch.context() as patch:
        patch.setattr("mikv.cli.conversation.answer", stopped)
        if not can_crop:
            patch.setattr(MiKVCache, "crop", refuse)
        with pytest.raises(KeyboardInterrupt):
            conversation.say("lost", AnswerOptions(3))
    assert (conversation.cache is cache) == is_kept
    answers = [one.say("A second turn.", AnswerOptions(3)) for one in (conversation, undisturbed)]
    assert answers[0].token_ids == answers[1].token_ids
    assert (answers[0].num_prompt_tokens == answers[1].num_prompt_tokens) == is_kept


def test_a_cache_that_refuses_is_filled_anew_with_the_whole_conversation(monkeypatch):
    loaded = LoadedModel("tiny", chat_model(), chat_tokenizer())
    conversation, undisturbed = Conversation(loaded, EXACT), Conversation(loaded, EXACT)
    for one in (conversation, undisturbed):
        one.say("A first turn.", AnswerOptions(3))
    broken = conversation.cache

    def refuse(self, *arguments, **named):
        if self is broken:
            raise CacheStateError("a step was interrupted; crop or reset")
        return update(self, *arguments, **named)

    update = MiKVCache._update
    monkeypatch.setattr(MiKVCache, "_update", refuse)
    answers = [one.say("A second turn.", AnswerOptions(3)) for one in (conversation, undisturbed)]
    assert answers[0].token_ids == answers[1].token_ids
    assert conversation.messages == undisturbed.messages
