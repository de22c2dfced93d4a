"""`mikv chat`: a conversation in the terminal, or on stdin. Commands begin with a slash.

Nothing that is typed ends it with an error, and Ctrl-C never ends it: it stops an answer or discards a line.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mikv.choices import did_you_mean
from mikv.cli.options import (
    BudgetOption,
    CacheChoice,
    ConfigOption,
    MaxNewTokensOption,
    ModelOption,
    PresetOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TrustOption,
    load_for_cli,
)
from mikv.cli.prompt import Interrupts, messages, say
from mikv.cli.terminal import console, writer
from mikv.errors import ConfigError, MiKVError
from mikv.models import BUNDLED_MODEL, find_model

if TYPE_CHECKING:
    from mikv.cli.answer import AnswerOptions
    from mikv.cli.conversation import Conversation

HELP = """\
/memory        what the cache holds and takes
/save FILE     keep the conversation and its cache; /save! FILE overwrites
/load FILE     continue a saved conversation
/reset         forget the conversation, keep the system message
/system TEXT   forget the conversation, begin with this system message
/help          this list
/exit          leave; so does Ctrl-D. Ctrl-C stops an answer. A pasted text of several lines is one message."""

logger = logging.getLogger("mikv")


def chat(
    model: ModelOption = BUNDLED_MODEL,
    trust_remote_code: TrustOption = False,
    preset: PresetOption = None,
    budget: BudgetOption = None,
    config: ConfigOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    system: SystemOption = None,
) -> None:
    """Talk to a model; one compressed cache lives through all turns."""
    choice = CacheChoice.of_options(preset, budget, config)
    find_model(model)

    import torch

    from mikv.cli.answer import AnswerOptions
    from mikv.cli.conversation import Conversation

    loaded = load_for_cli(model, trust_remote_code=trust_remote_code)
    conversation = Conversation(loaded, choice.for_model(loaded.model.config), system)
    if seed is not None:
        torch.manual_seed(seed)
    Chat(conversation, AnswerOptions(max_new_tokens, temperature, on_text=writer())).run()


class Chat:
    """The loop between a person and a conversation: answers to stdout, everything about them to stderr."""

    def __init__(self, conversation: "Conversation", options: "AnswerOptions") -> None:
        self.conversation, self.options = conversation, options
        self.out, self.err = console(), console(stderr=True)
        self.interrupts = Interrupts()
        self.commands: dict[str, Callable[[str], None]] = {
            "/memory": self._memory,
            "/save": self._save,
            "/save!": self._overwrite,
            "/load": self._load,
            "/reset": self._reset,
            "/system": self._system,
            "/help": self._help,
        }

    def run(self) -> None:
        """Until /exit or the end of stdin."""
        self._note(f"{self.conversation.loaded.name}; /help lists the commands, Ctrl-D leaves")
        with _on_interrupt(self.interrupts):
            for message in messages([*self.commands, "/exit"], self.interrupts):
                if message == "/exit":
                    return
                self._try(message)

    def _try(self, message: str) -> None:
        """Whatever is wrong with a message costs this message and no other."""
        try:
            self._take(message)
        except MiKVError as error:
            self._complain(str(error))
        except BrokenPipeError:  # nobody is left to read the answers
            raise
        except Exception as error:
            logger.debug("a message failed", exc_info=True)
            self._complain(f"{type(error).__name__}: {error}; the conversation is as it was before")

    def _take(self, message: str) -> None:
        words = message.split(maxsplit=1)
        if words[0] in self.commands:
            self.commands[words[0]](message[len(words[0]) :].strip())
        elif message.startswith("/") and "\n" not in message:
            near = did_you_mean(words[0], [*self.commands, "/exit"])
            raise ConfigError(f"there is no command {words[0]}{near or ';'} /help lists the commands")
        else:
            self._answer(_text(message))

    def _answer(self, text: str) -> None:
        from mikv.cli.answer import summary
        from mikv.cli.progress import prefill_bar

        conversation, before = self.conversation, self.conversation.token_ids
        num_new = len(conversation.next_token_ids(text)) - conversation.cache.get_seq_length()
        try:
            with _interruptible(self.interrupts) as stop, prefill_bar(conversation.loaded.model, num_new, stop=stop):
                result = conversation.say(text, replace(self.options, stop=stop))
        except KeyboardInterrupt:
            kept = "" if conversation.token_ids is not before else "; neither it nor your message is kept"
            self._note(f"\nstopped before the answer was complete{kept}")
            return
        typer.echo()
        self._note(summary(result, conversation.cache))

    def _memory(self, _: str) -> None:
        from mikv.cli.memory_table import memory_table

        self.out.print(memory_table(self.conversation.cache.memory()))

    def _save(self, argument: str, overwrite: bool = False) -> None:
        path = _path(argument, "/save FILE")
        if not overwrite and os.path.isfile(path):  # whatever else is there, /save! would not overwrite it either
            raise ConfigError(f"{path} exists; /save! {path} overwrites it")
        self.conversation.save(path, overwrite=overwrite)
        self._note(f"saved {len(self.conversation.token_ids):,} tokens to {path}")

    def _overwrite(self, argument: str) -> None:
        self._save(argument, overwrite=True)

    def _load(self, argument: str) -> None:
        path = _path(argument, "/load FILE")
        self.conversation.load(path)
        what = f"{len(self.conversation.token_ids):,} tokens, with the cache settings it has"
        if not self.conversation.token_ids and self.conversation.messages:
            what = "its words, of an older version; they are read anew with your next message"
        self._note(f"continuing {path}: {what}")

    def _reset(self, _: str) -> None:
        self.conversation.restart(self.conversation.system)
        self._note("the conversation is forgotten")

    def _system(self, argument: str) -> None:
        if not argument:
            raise ConfigError("the system message is missing: /system TEXT")
        self.conversation.restart(_text(argument))
        self._note("a new conversation with this system message")

    def _help(self, _: str) -> None:
        self.out.print(HELP)

    def _note(self, text: str) -> None:
        self.err.print(text, style="dim", soft_wrap=True)

    def _complain(self, text: str) -> None:
        self.err.print(" ".join(f"error: {text}".split()), style="red", soft_wrap=True)


@contextmanager
def _on_interrupt(react: Callable[..., None]) -> Iterator[None]:
    """Meanwhile Ctrl-C calls `react` and interrupts nothing by itself."""
    former = signal.signal(signal.SIGINT, react)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


@contextmanager
def _interruptible(before: Interrupts | None = None) -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the answer to stop, which it does after the layer or token under way; a second one breaks it off.

    Those that came `before`, since there is a message, ask too.
    """
    presses = 0

    def ask(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses == 1:
            say("stopping; once more breaks off")
        elif presses == 2:  # and never again: what cleans up is not to be interrupted
            raise KeyboardInterrupt

    with _on_interrupt(ask):
        yield lambda: presses > 0 or (before is not None and before.early > 0)


def _text(typed: str) -> str:
    """What was typed, if it is text; safetensors opens no files with other names either. Raises ConfigError if not."""
    try:
        typed.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"character {error.start + 1} of {typed[:40]} is not UTF-8 text") from error
    return typed


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise ConfigError(f"the file name is missing: {usage}")
    try:
        return Path(_text(argument)).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{argument}: {error}") from error
