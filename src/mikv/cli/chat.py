"""`mikv chat`: a conversation in the terminal, or on stdin. Commands begin with a slash."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

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
    load_for_cli,
)
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
/exit          leave; so does Ctrl-D. Ctrl-C stops an answer."""


def chat(
    model: ModelOption = BUNDLED_MODEL,
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

    loaded = load_for_cli(model)
    conversation = Conversation(loaded, choice.for_model(loaded.model.config), system)
    if seed is not None:
        torch.manual_seed(seed)
    Chat(conversation, AnswerOptions(max_new_tokens, temperature, on_text=_write)).run()


class Chat:
    """The loop between a person and a conversation: answers to stdout, everything about them to stderr."""

    def __init__(self, conversation: "Conversation", options: "AnswerOptions") -> None:
        self.conversation, self.options = conversation, options
        self.out, self.err = Console(highlight=False), Console(stderr=True, highlight=False)
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
        for line in _lines():
            if line == "/exit":
                return
            try:
                self._take(line)
            except MiKVError as error:
                self._complain(str(error))

    def _take(self, line: str) -> None:
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, argument = line.partition(" ")
        if name not in self.commands:
            raise ConfigError(f"there is no command {name}; /help lists the commands")
        self.commands[name](argument.strip())

    def _answer(self, text: str) -> None:
        from mikv.cli.answer import summary
        from mikv.cli.progress import prefill_bar

        conversation = self.conversation
        num_new = len(conversation.next_token_ids(text)) - conversation.cache.get_seq_length()
        try:
            with _interruptible() as stop, prefill_bar(conversation.loaded.model, num_new):
                result = conversation.say(text, replace(self.options, stop=stop))
        except KeyboardInterrupt:
            self._note("\nstopped before the answer was complete; neither it nor your message is kept")
            return
        typer.echo()
        self._note(summary(result, conversation.cache))

    def _memory(self, _: str) -> None:
        from mikv.cli.memory_table import memory_table

        self.out.print(memory_table(self.conversation.cache.memory()))

    def _save(self, argument: str, overwrite: bool = False) -> None:
        path = _path(argument, "/save FILE")
        if not overwrite and path.exists():
            raise ConfigError(f"{path} exists; /save! {path} overwrites it")
        self.conversation.save(path, overwrite=overwrite)
        self._note(f"saved {len(self.conversation.token_ids):,} tokens to {path} and {path}.json")

    def _overwrite(self, argument: str) -> None:
        self._save(argument, overwrite=True)

    def _load(self, argument: str) -> None:
        path = _path(argument, "/load FILE")
        self.conversation.load(path)
        self._note(f"continuing {path}: {len(self.conversation.token_ids):,} tokens, with the cache settings it has")

    def _reset(self, _: str) -> None:
        self.conversation.restart(self.conversation.system)
        self._note("the conversation is forgotten")

    def _system(self, argument: str) -> None:
        if not argument:
            raise ConfigError("the system message is missing: /system TEXT")
        self.conversation.restart(argument)
        self._note("a new conversation with this system message")

    def _help(self, _: str) -> None:
        self.out.print(HELP, markup=False)

    def _note(self, text: str) -> None:
        self.err.print(text, style="dim", markup=False, soft_wrap=True)

    def _complain(self, text: str) -> None:
        self.err.print(" ".join(f"error: {text}".split()), style="red", markup=False, soft_wrap=True)


def _lines() -> Iterator[str]:
    """Lines from a person with line editing, or from a pipe; empty ones are skipped."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        with suppress(ImportError):  # not on Windows, whose terminal does the same
            import_module("readline")  # gives input() line editing and a history
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit leaves", file=sys.stderr)
            continue
        if line:
            yield line


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the answer to stop after the token under way; a second one breaks it off."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    former = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, former)


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise ConfigError(f"the file name is missing: {usage}")
    return Path(argument).expanduser()


def _write(text: str) -> None:
    typer.echo(text, nl=False)
