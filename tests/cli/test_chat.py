"""`mikv chat` over a pipe: answers and tables on stdout, everything else on stderr."""

import os
import re
import signal
import stat
from pathlib import Path

import pytest

from mikv.cache.config import MiKVConfig
from mikv.cli.chat import _interruptible


@pytest.fixture
def talk(mikv, tiny_folder):
    """Run `mikv chat` on lines of stdin."""

    def run(*lines, options=()):
        stdin = ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
        result = mikv("chat", "-m", tiny_folder, "--max-new-tokens", 12, *options, stdin=stdin)
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.fixture
def exact(tmp_path):
    """Options for a cache that rounds nothing."""
    (tmp_path / "exact.json").write_text(MiKVConfig(importance_ratio=1, high="exact").to_json())
    return ("--config", tmp_path / "exact.json")


def errors(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_answers_go_to_stdout_one_after_the_other(talk, mikv, tiny_folder, exact):
    first = mikv("generate", "Hello", "-m", tiny_folder, "--max-new-tokens", 12, *exact).stdout
    result = talk("Hello", "And now?", options=exact)
    assert result.stdout.startswith(first)
    assert len(result.stdout) > len(first)
    assert [line.count(" new at ") for line in result.stderr.splitlines() if "of fp16" in line] == [1, 1]


def test_the_second_answer_depends_on_the_first_turn(talk, exact):
    first = talk("Hello", options=exact).stdout
    assert talk("Hello", "And now?", options=exact).stdout.removeprefix(first) != talk("And now?", options=exact).stdout


def test_reset_forgets_and_keeps_the_system_message(talk, exact):
    once = talk("Hello", options=(*exact, "--system", "s")).stdout
    assert talk("Hello", "/reset", "Hello", options=(*exact, "--system", "s")).stdout == once + once
    assert talk("Hello", options=exact).stdout != once


def test_system_begins_anew(talk, exact):
    once = talk("Hello", options=(*exact, "--system", "s")).stdout
    first = talk("Hello", options=exact).stdout
    assert talk("Hello", "/system s", "Hello", options=exact).stdout == first + once


def test_a_saved_conversation_is_continued(talk, tmp_path):
    question = "A question that is long enough to leave the warm-up behind, even in bytes."
    first = talk(question).stdout
    whole = talk(question, f"/save {tmp_path / 'my talk'}", "Go on.")
    assert "saved" in whole.stderr
    resumed = talk(f"/load {tmp_path / 'my talk'}", "Go on.", options=("--preset", "small"))
    assert resumed.stdout == whole.stdout.removeprefix(first)
    assert [path.name for path in tmp_path.iterdir()] == ["my talk"]
    assert stat.S_IMODE((tmp_path / "my talk").stat().st_mode) == 0o600


def test_save_overwrites_only_when_told(talk, tmp_path):
    path = tmp_path / "talk"
    result = talk("Hi", f"/save {path}", f"/save {path}", f"/save! {path}")
    assert errors(result) == [f"error: {path} exists; /save! {path} overwrites it"]
    assert result.stderr.count("saved") == 2


def test_memory_shows_bytes_by_part_and_their_sum(talk):
    rows = dict(re.findall(r"│ (\w+) +│ +([\d,]+) │", talk("word " * 60, "/memory").stdout))
    sizes = {name: int(size.replace(",", "")) for name, size in rows.items()}
    assert {"high", "low", "total"} <= set(sizes)
    assert sizes.pop("total") == sum(sizes.values())


def test_memory_of_an_empty_cache_and_of_skipped_layers(talk, tmp_path):
    (tmp_path / "config.json").write_text(MiKVConfig(skip_layers=(1,)).to_json())
    shown = talk("/memory", "Hi", "/memory", options=("--config", tmp_path / "config.json")).stdout
    assert "compressed layers: none" in shown
    assert "layer 1 is not compressed: named in skip_layers" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "there is no command /nope; /help lists the commands"),
        ("/save", "the file name is missing: /save FILE"),
        ("/load", "the file name is missing: /load FILE"),
        ("/load nowhere", "cannot read nowhere: No such file or directory"),
        ("/load .", ". is not a saved conversation: it is not a regular file"),
        ("/load ..", ".. is not a saved conversation: it is not a regular file"),
        ("/load pipe", "pipe is not a saved conversation: it is not a regular file"),
        ("/load /dev/zero", "/dev/zero is not a saved conversation: it is not a regular file"),
        ("/load deep", "deep.json is not a saved conversation: maximum recursion depth exceeded"),
        ("/load text", "text is not a saved conversation: mikv chat wrote no words into it"),
        ("/load a\0b", "cannot read a\\x00b: embedded null byte"),
        ("/load ~nobody-of-this-name/x", "~nobody-of-this-name/x: Could not determine home directory"),
        ("/load " + "x" * 5000, "File name too long"),
        ("/save .", "is a folder, not a regular file; choose another name"),
        ("/save text", "text exists; /save! text overwrites it"),
        ("/save! .", " is a folder, not a regular file; choose another name"),
        ("/save! pipe", "pipe is a pipe, not a regular file; choose another name"),
        ("/save! /dev/null", "/dev/null is a device, not a regular file; choose another name"),
        ("/save a\0b", "cannot be the name of a file; choose another one"),
        ("/save " + "x" * 5000, "File name too long"),
        ("/save no/such/folder/x", "no/such/folder does not exist; create it or choose another one"),
        ("/laod x", "there is no command /laod; did you mean /load? /help lists the commands"),
        ("/Help", "there is no command /Help; did you mean /help? /help lists the commands"),
        ("bytes: \udcff\udcfe", "character 8 of bytes: \\udcff\\udcfe is not UTF-8 text"),
        ("/load a\udcff", "character 2 of a\\udcff is not UTF-8 text"),
        ("/save a\udcff", "character 2 of a\\udcff is not UTF-8 text"),
        ("/system \udcff", "character 1 of \\udcff is not UTF-8 text"),
        ("/system", "the system message is missing: /system TEXT"),
    ],
)
def test_a_bad_command_is_reported_and_the_conversation_goes_on(talk, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("text").write_text("{}")
    Path("deep.json").write_text("[" * 100_000)
    result = talk("Hello", line, "/exit", "never read")
    [error] = errors(result)
    assert message in error
    assert result.stdout == talk("Hello").stdout


def test_help_names_all_commands(talk):
    shown = talk("/help").stdout
    assert all(f"/{name}" in shown for name in ("memory", "save", "load", "reset", "system", "help", "exit"))


def test_exit_and_the_end_of_stdin_leave(talk):
    assert talk("/exit", "Hello").stdout == ""
    assert talk("", "   ").stdout == ""


def test_a_model_without_chat_template_is_refused(refused, wordless_folder):
    assert "has no chat template" in refused("chat", "-m", wordless_folder)


def test_contradicting_options_are_refused(refused, monkeypatch):
    monkeypatch.setattr("mikv.cli.options.load_model", None)
    assert "exclude each other" in refused("chat", "--preset", "small", "--budget", "0.2")


def test_the_first_interrupt_asks_and_the_second_insists():
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell runs the tests in the background
    with _interruptible() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
