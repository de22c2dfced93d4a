"""`mikv quantize`, interrupted at any point and run again: the same files, and no finished layer is done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mikv.cli import quantize_stop
from mikv.errors import MiKVError
from mikv.integrations.quantizer import journal, quantization
from saved_files import content

COMMANDS = {
    "refined": ("--bits", 2, "--embeddings"),
    "gptq": ("--bits", 3, "--method", "gptq"),
    "budget": ("--budget-bits", 4, "--method", "gptq-bcq"),
    "nested": ("--nested", "--embeddings", "--calibration", "none"),
}
NUM_LAYERS = 14


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    return path


@pytest.fixture
def command(mikv, tiny_folder, tmp_path, text_file):
    """Run a command of COMMANDS, into tmp_path / q by default."""

    def run(name, *options, out="q"):
        common = ("--group-size", 32, "--threads", 1, "--json", "--calibration", text_file)
        return mikv("quantize", tiny_folder, tmp_path / out, *common, *COMMANDS[name], *options)

    return run


@pytest.fixture
def listing(tmp_path):
    def contents(out="q"):
        return {file.name: content(file) for file in (tmp_path / out).iterdir()}

    return contents


@pytest.fixture
def solved(monkeypatch):
    """The names of layers that are solved, not taken from a journal."""
    names: list[str] = []
    coded = quantization.coded

    def count(weight, name, *args):
        names.append(name)
        return coded(weight, name, *args)

    monkeypatch.setattr(quantization, "coded", count)
    return names


def stop_at(monkeypatch, number, error):
    """Let the `number`-th file of the journal fail before it takes its name."""
    keep, calls = journal.os.replace, []

    def replace(source, target):
        if Path(target).parent.name in ("layers", "costs"):
            calls.append(target)
            if len(calls) == number:
                raise error
        keep(source, target)

    monkeypatch.setattr(journal.os, "replace", replace)


@pytest.mark.parametrize(("name", "at"), [("refined", 2), ("gptq", 4), ("budget", 9), ("nested", 5)])
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_files(
    command, listing, name, at, monkeypatch, solved, tmp_path
):
    assert command(name, out="whole").exit_code == 0
    whole = solved.copy()
    solved.clear()
    runs = 0
    while True:
        with monkeypatch.context() as patch:
            stop_at(patch, at, KeyboardInterrupt())  # one less is kept in every run
            result = command(name)
        runs += 1
        if result.exit_code == 0:
            break
        assert result.exit_code == 130, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert "the same command goes on from there" in result.stderr
        (work,) = tmp_path.glob(".q.*.unfinished")
        assert str(work) in result.stderr
    assert runs > len(whole) // at
    assert listing() == listing("whole")
    assert set(whole) == set(solved)
    assert sorted(os.listdir(tmp_path)) == ["q", "whole"]
    assert [layer["name"] for layer in json.loads(result.stdout)["layers"]] == whole


@pytest.mark.parametrize("number", range(1, NUM_LAYERS + 1))
def test_a_disk_that_is_full_at_any_layer_keeps_the_layers_before(
    command, listing, tmp_path, monkeypatch, solved, number
):
    assert command("gptq", out="whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, number, OSError(28, "No space left on device"))
        result = command("gptq")
    assert result.exit_code == 2
    assert "error: cannot keep model.layers." in result.stderr
    assert "No space left on device" in result.stderr
    assert (f"has {number - 1} layers; the same command" in result.stderr) == (number > 1)
    assert list(tmp_path.rglob("*.partial")) == []
    solved.clear()
    assert command("gptq").exit_code == 0
    assert len(solved) == NUM_LAYERS - number + 1
    assert listing() == listing("whole")


@pytest.mark.parametrize("where", ["save_pretrained", "fsync", "rename"])
def test_a_disk_that_is_full_while_the_model_is_written_loses_no_layer(
    command, listing, tmp_path, monkeypatch, solved, where
):
    from transformers import PreTrainedTokenizerBase

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    replace = os.replace
    with monkeypatch.context() as patch:
        if where == "save_pretrained":
            patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
        elif where == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(os, "replace", lambda a, b: full() if Path(b) == tmp_path / "q" else replace(a, b))
        result = command("refined")
    assert result.exit_code == 2, result.output
    assert "No space left on device" in result.stderr
    assert "has 16 layers" in result.stderr
    assert not (tmp_path / "q").exists()
    solved.clear()
    assert command("refined").exit_code == 0
    assert command("refined", out="whole").exit_code == 0
    assert listing() == listing("whole")
    assert len(solved) == 16  # those of `whole` only


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_layer_that_is_not_whole_is_done_again(command, listing, tmp_path, monkeypatch, solved, damage):
    with monkeypatch.context() as patch:
        stop_at(patch, 9, KeyboardInterrupt())
        assert command("refined").exit_code == 130
    files = sorted(tmp_path.glob(".q.*.unfinished/layers/*.safetensors"))
    assert len(files) == 8
    content = files[4].read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    files[4].write_bytes({"cut": content[:middle], "changed": changed, "empty": b""}[damage])
    solved.clear()
    assert command("refined").exit_code == 0
    assert len(solved) == 16 - 7
    assert command("refined", out="whole").exit_code == 0
    assert listing() == listing("whole")


@pytest.mark.parametrize("change", ["weights", "settings", "text"])
def test_nothing_is_taken_over_for_another_model_text_or_setting(
    mikv, tiny_folder, tmp_path, monkeypatch, solved, change
):
    import torch

    from tiny_chat import chat_model, save_chat_model

    save_chat_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some text. " * 30)
    arguments = ["quantize", tmp_path / "model", tmp_path / "q", "--calibration", tmp_path / "text.txt"]
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        assert mikv(*arguments, "--bits", 3).exit_code == 130
    solved.clear()
    if change == "weights":
        model = chat_model()
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[0] += 1
        model.save_pretrained(tmp_path / "model")
    elif change == "text":
        (tmp_path / "text.txt").write_text("Another one " * 30)
    result = mikv(*arguments, "--bits", 2 if change == "settings" else 3)
    assert result.exit_code == 0, result.output
    assert len(solved) == NUM_LAYERS
    (left,) = tmp_path.glob(".q.*.unfinished")
    assert f"{left} has unfinished work for" in result.stderr


def test_other_errors_say_what_is_kept(command, monkeypatch):
    for error in (MemoryError(), RuntimeError("out of memory"), MiKVError("enough")):
        with monkeypatch.context() as patch:
            stop_at(patch, 3, error)
            result = command("gptq")
        assert result.exit_code == (2 if isinstance(error, MiKVError) else 1)
        assert "layers; the same command goes on from there" in result.stderr


def test_an_interruption_before_any_layer_leaves_nothing(command, tmp_path, monkeypatch):
    stop_at(monkeypatch, 1, KeyboardInterrupt())
    result = command("gptq")
    assert result.exit_code == 130
    assert "no layer was finished, nothing was kept" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_end_the_command_with_a_word(tmp_path, tiny_folder, text_file, name):
    words = ["quantize", tiny_folder, tmp_path / "q", "--calibration", text_file, "--bits", 2, "--threads", 1]
    code = "import sys, mikv.cli; sys.argv[0] = 'mikv'; mikv.cli.main()"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if process.poll() is not None or list(tmp_path.glob(".q.*.unfinished/layers/*.safetensors")):
            break
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + getattr(signal, name), said
    assert "Traceback" not in said
    assert "the same command goes on from there" in said


def test_the_handlers_of_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with quantize_stop.saying_what_is_kept(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
