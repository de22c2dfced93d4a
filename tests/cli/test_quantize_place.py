"""What `mikv quantize` may replace, and that two models change places without a moment in which none is whole."""

import json
import os
import shutil
from pathlib import Path

import pytest

from mikv import models
from mikv.cli import quantize_place

QUICK = ("--bits", 2, "--group-size", 32, "--calibration", "none")


@pytest.fixture
def run_folder(mikv, tiny_folder, tmp_path, monkeypatch):
    """A working folder with `original`, a plain model, and `q`, the same quantized."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "original")
    assert mikv("quantize", "original", "q", *QUICK, "--bits", 3).exit_code == 0
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def into_original(folder: Path) -> tuple[str, str]:
    shutil.move(folder / "original", folder / "q" / "original")
    return "q/original", "q"


def linked_from_outside(folder: Path) -> tuple[str, str]:
    shutil.move(folder / "original", folder / "q" / "original")
    (folder / "link").symlink_to("q/original")
    return "link", "q"


def weights_linked_from_out(folder: Path) -> tuple[str, str]:
    weights = folder / "original" / "model.safetensors"
    weights.replace(folder / "q" / "model.safetensors")
    weights.symlink_to(folder / "q" / "model.safetensors")
    return "original", "q"


def gguf_in_out(folder: Path) -> tuple[str, str]:
    from tiny_chat import write_gguf

    write_gguf(folder / "q" / "m.gguf")
    return "q/m.gguf", "q"


def extra(name: str):
    def add(folder: Path) -> tuple[str, str]:
        path = folder / "q" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        return "original", "q"

    return add


def link_in_out(folder: Path) -> tuple[str, str]:
    (folder / "q" / "vocab.json").symlink_to(folder / "original" / "config.json")
    return "original", "q"


def plain_model(folder: Path) -> tuple[str, str]:
    shutil.copytree("original", "other")
    return "original", "other"


def dangling(folder: Path) -> tuple[str, str]:
    (folder / "nothing").symlink_to("nowhere")
    return "original", "nothing"


def link_to_model(folder: Path) -> tuple[str, str]:
    (folder / "there").symlink_to("q")
    return "original", "there/"


def plain(model: str, out: str):
    return lambda folder: (model, out)


def a_file(folder: Path) -> tuple[str, str]:
    (folder / "file").write_text("mine")
    return "original", "file"


REFUSED = [
    (into_original, "q holds the model q/original that is to be quantized"),
    (linked_from_outside, "q holds the model link that is to be quantized"),
    (weights_linked_from_out, "q holds the model original that is to be quantized"),
    (gguf_in_out, "q holds the model q/m.gguf that is to be quantized"),
    (extra("notes.txt"), "q holds notes.txt, which mikv did not write"),
    (extra("model-00001-of-00002.safetensors"), "q holds model-00001-of-00002.safetensors, which"),
    (extra("adapter_model.safetensors"), "q holds adapter_model.safetensors, which"),
    (extra(".hidden"), "q holds .hidden, which"),
    (extra("checkpoint/trainer.json"), "q holds checkpoint, which"),
    (extra("additional_chat_templates/notes.txt"), "q holds additional_chat_templates, which"),
    (link_in_out, "q holds vocab.json, which"),
    (plain_model, "mikv did not write the model in other, so --overwrite does not replace it"),
    (dangling, "nothing is a link to nowhere; name the folder itself"),
    (link_to_model, "there is a link to q; name the folder itself"),
    (a_file, "file is a file; name another folder"),
    (plain("original", "original"), "original is the model itself"),
    (plain("original", "./original/"), "original is the model itself"),
    (plain("original", "q/../original"), "q/../original is the model itself"),
    (plain("original", "original/q"), "original/q lies in the model's own folder original"),
    (plain("original", "."), ". holds the model original"),
    (plain("q/../original/", "q/.."), "q/.. holds the model"),
    (plain("original", "/"), "/ holds the model original"),
    (plain("original", "original/config.json/q"), "original/config.json/q cannot be a folder: Not a directory"),
    (plain("original", "no/q"), "no/q: there is no folder no"),
    (plain("original", "x" * 300), "cannot be a folder: File name too long"),
]


@pytest.mark.parametrize(("prepare", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
@pytest.mark.parametrize("overwrite", [True, False])
def test_only_folders_of_mikv_with_nothing_else_are_replaced(
    refused, run_folder, unloaded, prepare, message, overwrite
):
    model, out = prepare(run_folder)
    before = listing(run_folder)
    error = refused("quantize", model, out, *QUICK, *(["--overwrite"] if overwrite else []))
    if overwrite:
        assert message in error
    assert listing(run_folder) == before


def test_the_folder_that_the_command_runs_in_is_not_replaced(refused, run_folder, unloaded, monkeypatch):
    monkeypatch.chdir(run_folder / "q")
    assert "is the folder in which this command runs" in refused("quantize", "../original", ".", *QUICK, "--overwrite")
    assert "is the folder in which this command runs" in refused(
        "quantize", "../original", "../q", *QUICK, "--overwrite"
    )


def test_a_mount_point_is_refused(refused, run_folder, unloaded, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "q")
    assert "q is a mount point" in refused("quantize", "original", "q", *QUICK, "--overwrite")


def test_a_parent_that_cannot_be_written_is_refused(refused, run_folder, unloaded, monkeypatch):
    def mkdir(path, *args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    error = refused("quantize", "original", "new", *QUICK)
    assert f"new: cannot write into {run_folder}: Permission denied" in error


def test_a_disk_without_room_is_refused(refused, run_folder, unloaded, monkeypatch):
    usage = shutil.disk_usage(run_folder)._replace(free=2**15)
    monkeypatch.setattr(quantize_place.shutil, "disk_usage", lambda path: usage)
    error = refused("quantize", "original", "new", *QUICK)
    assert f"{run_folder} has 0 MiB free, and quantizing into new takes about" in error


@pytest.mark.parametrize("arguments", [QUICK, (*QUICK, "--embeddings"), ("--bits", 4, "--nested", *QUICK[2:])])
def test_the_room_that_is_asked_for_is_what_is_taken(mikv, run_folder, monkeypatch, arguments):
    asked = []
    monkeypatch.setattr(quantize_place.Place, "require_room", lambda place, count, work: asked.append(count))
    assert mikv("quantize", "original", "new", *arguments).exit_code == 0
    written = (run_folder / "new" / "model.safetensors").stat().st_size
    assert asked[0] == asked[1]  # by the configuration, and of the loaded model
    assert written < asked[0] < 2 * written


def test_overwrite_replaces_a_model_with_shards(mikv, run_folder):
    from safetensors.torch import load_file, save_file

    whole = run_folder / "q" / "model.safetensors"
    names = list(tensors := load_file(whole))
    whole.unlink()
    halves = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, run_folder / "q" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in halves.items() for name in own}}
    (run_folder / "q" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert mikv("quantize", "original", "q", *QUICK, "--overwrite").exit_code == 0
    assert not (run_folder / "q" / "model-1.safetensors").exists()
    assert sorted(os.listdir(run_folder)) == ["original", "q"]


@pytest.mark.parametrize("failing", [{0}, {1}, {1, 2}], ids=str)
def test_a_failed_rename_leaves_a_whole_model_where_the_message_says(mikv, run_folder, monkeypatch, failing):
    moves, replace = [], os.replace
    out = run_folder / "q"

    def fail(source, target):
        if out in (Path(source), Path(target)):
            moves.append(source)
            if len(moves) - 1 in failing:
                raise OSError(16, "Device or resource busy")
        replace(source, target)

    old = listing(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        result = mikv("quantize", "original", "q", *QUICK, "--overwrite")
    assert result.exit_code == 2
    (work,) = run_folder.glob(".q.*.unfinished")
    assert "Device or resource busy" in result.stderr
    assert "the same command goes on from there" in result.stderr
    assert f"{work}/new" in result.stderr
    assert json.loads((work / "new" / "config.json").read_text())["quantization_config"]["bits"] == 2
    if failing == {1, 2}:
        assert f"the old model is whole in {work / 'old'}" in result.stderr
        assert listing(work / "old") == old
    else:
        assert listing(out) == old
    again = mikv("quantize", "original", "q", *QUICK, "--overwrite")
    assert again.exit_code == 0, again.output
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 2
    assert sorted(os.listdir(run_folder)) == ["original", "q"]


def test_what_came_into_out_meanwhile_is_kept(mikv, run_folder, monkeypatch):
    save = quantize_place.sync

    def disturb(folder):
        save(folder)
        (run_folder / "q" / "notes.txt").write_text("mine")
        (run_folder / "new").mkdir()
        (run_folder / "new" / "notes.txt").write_text("mine")

    monkeypatch.setattr("mikv.cli.quantize_order.sync", disturb)
    for out, options in (("q", ["--overwrite"]), ("new", [])):
        shutil.rmtree(run_folder / "new", ignore_errors=True)
        result = mikv("quantize", "original", out, *QUICK, *options)
        assert result.exit_code == 2, result.output
        assert (run_folder / out / "notes.txt").read_text() == "mine"
        assert "the same command goes on from there" in result.stderr


def test_two_commands_do_not_work_on_the_same(mikv, run_folder, monkeypatch):
    seen = []
    load = models.load_model

    def load_and_look(*args, **options):
        if not seen:
            seen.append(mikv("quantize", "original", "new", *QUICK))
        return load(*args, **options)

    monkeypatch.setattr(models, "load_model", load_and_look)
    assert mikv("quantize", "original", "new", *QUICK).exit_code == 0
    assert "another mikv quantize with these settings is at work on new" in seen[0].stderr
