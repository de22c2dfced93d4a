"""`mikv report`: files written, options that belong together, refusals before a model reads anything."""

import os
import subprocess
import sys

import made_up_records
import pytest
from typer.testing import CliRunner

from mikv.cache_names import is_installed
from mikv.cli import app
from mikv.lab import precision_map
from mikv.lab.report import page, pictures

needs_plotly = pytest.mark.skipif(not is_installed("plotly"), reason="needs plotly: pip install 'mikv[report]'")
needs_both = pytest.mark.skipif(
    not (is_installed("plotly") and is_installed("matplotlib")), reason="needs plotly and matplotlib"
)


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("The pass key of the harbour safe is 71432. " * 5, encoding="utf-8")
    return path


@needs_both
def test_page_and_pictures_are_written(records_file, prompt_file, tiny_folder, tmp_path):
    out, png = tmp_path / "out.html", tmp_path / "png"
    of_map = ("--map-model", tiny_folder, "--map-cache", "mikv:small+sinks=2", "--map-prompt", prompt_file)
    result = report(records_file, "--html", out, "--png", png, *of_map)
    assert result.exit_code == 0, result.output
    written = [out, *(png / name for name in ("curves-smollm2.png", "curves-Qwen2.5-Coder-0.5B-Instruct.png"))]
    assert result.stdout.splitlines() == [str(path) for path in (*written, png / "precision-map.png")]
    html = out.read_text(encoding="utf-8")
    assert '"sinks":2' in html
    assert "Plotly" in html


@needs_plotly
def test_records_of_several_files_are_shown_together(tmp_path):
    files = []
    for model in made_up_records.MODELS:
        made = [made_up_records.record(made_up_records.TASKS[0], model, cache) for cache in ("full", "int4")]
        files.append(made_up_records.write(tmp_path / f"{len(files)}.jsonl", made))
    result = report(*files, "--html", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    assert "2 models, 1 task, 4 records · 0.jsonl, 1.jsonl" in (tmp_path / "out.html").read_text(encoding="utf-8")


@needs_plotly
@pytest.mark.parametrize("setting", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_of_ascii_alone_is_no_error(setting, tmp_path):
    made = made_up_records.record(made_up_records.TASKS[0], "m", "int4") | {"command": "mikv eval \udcc3 …"}
    records, out = made_up_records.write(tmp_path / "é.jsonl", [made]), tmp_path / "ü.html"
    environment = os.environ | {"PYTHONCOERCECLOCALE": "0"} | setting
    command = [sys.executable, "-c", "from mikv.cli import main; main()", "report", str(records), "--html", str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert "1 record" in out.read_text(encoding="utf-8")


@needs_plotly
def test_a_page_is_replaced_only_if_asked(records_file, tmp_path):
    out = tmp_path / "out.html"
    out.write_text("precious")
    result = report(records_file, "--html", out)
    assert result.exit_code == 2
    assert "exists; pass --overwrite to replace it" in result.stderr
    assert out.read_text() == "precious"
    assert report(records_file, "--html", out, "--overwrite").exit_code == 0
    assert "precious" not in out.read_text(encoding="utf-8")


@needs_plotly
@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--html", "out.txt"), "--html out.txt must end in .html"),
        (("--html", "nowhere/out.html"), "there is no folder nowhere"),
        (("--map-model", "smollm2"), "--map-model smollm2 needs a text to read: --map-prompt FILE"),
        (("--map-prompt", "nowhere.txt"), "cannot read --map-prompt nowhere.txt"),
        (("--map-prompt", "prompt.txt", "--map-cache", "fp8"), "--map-cache fp8 has no tiers to show"),
        (("--map-prompt", "prompt.txt", "--map-cache", "mikv:blanced"), "blanced"),
        (("--map-prompt", "prompt.txt", "--map-model", "./nowhere"), "./nowhere does not exist"),
        (("--png", "nowhere/png"), "--png nowhere/png must be a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_reads(
    options, error, records_file, prompt_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(precision_map, "precision_map", lambda *_: pytest.fail("a model has read"))
    if "--png" in options:
        monkeypatch.setattr(pictures, "is_installed", lambda package: True)
    if "--html" not in options:
        options = (*options, "--html", "out.html")
    result = report(records_file, *options)
    assert result.exit_code == 2, result.output
    assert error in result.stderr
    assert not (tmp_path / "out.html").exists()


@needs_plotly
def test_a_picture_that_exists_is_found_before_a_model_reads(records_file, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr(precision_map, "precision_map", lambda *_: pytest.fail("a model has read"))
    monkeypatch.setattr(pictures, "is_installed", lambda package: True)
    (tmp_path / "precision-map.png").write_text("precious")
    options = ("--png", tmp_path, "--map-prompt", prompt_file, "--map-model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    result = report(records_file, "--html", tmp_path / "out.html", *options)
    assert result.exit_code == 2
    assert "precision-map.png exists; pass --overwrite" in result.stderr


def test_what_is_missing_is_named_with_how_to_install_it(records_file, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "is_installed", lambda package: False)
    monkeypatch.setattr(page, "is_installed", lambda package: True)
    result = report(records_file, "--html", tmp_path / "out.html", "--png", tmp_path)
    assert "--png needs matplotlib: pip install 'mikv[report]'" in result.stderr
    monkeypatch.setattr(page, "is_installed", lambda package: False)
    result = report(records_file, "--html", tmp_path / "out.html")
    assert "the page needs plotly: pip install 'mikv[report]'" in result.stderr
