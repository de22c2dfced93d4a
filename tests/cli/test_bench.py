"""`mikv bench`: the JSON contract, tables for people, files, and errors before anything is measured."""

import json
import subprocess

import pytest

from mikv import cache_names
from mikv.bench import attention, kernels, matmul, plots
from mikv.bench.machine import command_line

pytestmark = pytest.mark.usefixtures("small_machine")

TINY = ("--tokens", 256, "--heads", 4, "--kv-heads", 2, "--head-dim", 32, "--seconds", 0.0001, "--threads", 1)


@pytest.fixture
def unmeasured(monkeypatch):
    """Measuring or starting a process is a failure."""
    for owner, name in ((subprocess, "run"), (attention, "run"), (matmul, "run")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("something was measured"))


def test_attention_keeps_the_json_contract(mikv):
    result = mikv("bench", "attention", *TINY, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert {"stream_gbps", "threads", "hardware", "isa", "versions", "command", "rows"} <= set(record)
    assert record["threads"] == 1
    keys = {"kernel", "config", "ms", "bytes", "gbps", "bandwidth_share", "rel_error", "skipped"}
    assert all(keys <= set(row) for row in record["rows"])


def test_generate_keeps_the_json_contract(mikv, tiny_folder, monkeypatch):
    monkeypatch.setattr(cache_names, "is_installed", lambda package: False)
    arguments = ("--contexts", 70, "--caches", "quanto4,mikv:small", "--new-tokens", 4, "--threads", 1)
    result = mikv("bench", "generate", "--model", tiny_folder, *arguments, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    keys = {
        "cache",
        "context",
        "decode_tokens_per_second",
        "prefill_tokens_per_second",
        "time_to_first_token_s",
        "cache_bytes",
        "peak_rss_growth_bytes",
        "skipped",
    }
    assert all(keys <= set(row) for row in record["rows"])
    skipped, measured = record["rows"]
    assert (skipped["cache"], skipped["cache_bytes"]) == ("quanto4", None)
    assert "optimum-quanto" in skipped["skipped"]
    assert (measured["cache"], measured["context"], measured["skipped"]) == ("mikv:small", 70, None)
    assert measured["decode_tokens_per_second"] > 0


def test_matmul_keeps_the_json_contract(mikv):
    sizes = ("--m", 64, "--k", 128, "--rows", "1,3", "--bits", "2", "--group-size", 32, "--seconds", 0.0001)
    result = mikv("bench", "matmul", *sizes, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert {"stream_gbps", "threads", "hardware", "isa", "versions", "command", "rows"} <= set(record)
    keys = {"kernel", "bits", "rows", "ms_cold", "ms_warm", "gbps", "bandwidth_share", "rel_error", "bytes", "skipped"}
    assert all(keys <= set(row) for row in record["rows"])
    assert {(row["bits"], row["rows"]) for row in record["rows"] if row["kernel"] == "mikv"} == {(2, 1), (2, 3)}


def test_people_get_a_table_what_it_means_and_what_was_skipped(mikv, monkeypatch):
    monkeypatch.setattr(kernels, "is_installed", lambda package: False)
    text = mikv("bench", "attention", *TINY, "--steps", 32).stdout
    assert "mikv balanced" in text
    assert "mikv 20% int8 + 80% int2" in text
    assert "skipped: quantized_cache_quanto4: needs optimum-quanto" in text
    assert "as a share of what reading memory" in " ".join(text.split())
    assert "…" not in text


def test_records_and_their_table_go_to_files(mikv, tmp_path):
    assert mikv("bench", "attention", *TINY, "--json", "--out", tmp_path / "a.jsonl").exit_code == 0
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(records) == 10
    assert all(record["bench"] == "attention" and record["hardware"] for record in records)
    page = (tmp_path / "a.md").read_text()
    assert "    mikv bench attention --tokens 256 " in page
    assert ".png" not in page


@pytest.mark.skipif(not cache_names.is_installed("matplotlib"), reason="needs matplotlib")
@pytest.mark.filterwarnings("default")
def test_records_are_drawn_again(mikv, tmp_path):
    mikv("bench", "attention", *TINY, "--out", tmp_path / "a.jsonl")
    result = mikv("bench", "plot", tmp_path / "a.jsonl")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").is_file()
    assert "](a.png)" in (tmp_path / "a.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("attention", "--heads", 30), "--heads 30 is not a multiple of --kv-heads 8"),
        (("attention", "--tokens", 0), "--tokens 0 must be 1 or more"),
        (("attention", "--steps", 5), "--steps 5 must be a multiple of 32"),
        (("attention", "--threads", 0), "--threads 0 must be between 1 and"),
        (("attention", "--out", "a.txt"), "--out a.txt must end in .jsonl"),
        (("matmul", "--rows", "1,all"), "--rows '1,all' must be whole numbers with commas"),
        (("matmul", "--bits", "9"), "--bits 9 must be 1, 2, 3 or 4"),
        (("matmul", "--threads", 0), "--threads 0 must be between 1 and"),
        (("matmul", "--out", "a.txt"), "--out a.txt must end in .jsonl"),
        (("attention", "--plot", "nowhere/a.png"), "there is no folder nowhere"),
        (("generate", "--contexts", "64,many"), "'many' is not a whole number of tokens"),
        (("generate", "--caches", "full,fool"), "unknown cache 'fool'; the caches are full, int8, "),
        (("generate", "--caches", ","), "names no cache"),
        (("generate", "--dtype", "int8"), "--dtype 'int8' is not one of"),
        (("generate", "--model", "./nowhere"), "./nowhere does not exist"),
        (("plot", "nowhere.jsonl"), "cannot read records from nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(arguments, error, refused, unmeasured):
    assert error in refused("bench", *arguments)


def test_an_unknown_preset_is_refused(refused):
    assert "unknown preset 'blanced'" in refused("bench", "attention", "--preset", "blanced")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(refused, unmeasured, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "is_installed", lambda package: False)
    assert "plots need matplotlib" in refused("bench", "attention", "--plot", tmp_path / "a.png")


def test_the_command_is_recorded_without_what_was_not_given():
    line = command_line("generate", {"contexts": "64,128", "dtype": None, "threads": 2})
    assert line == "mikv bench generate --contexts 64,128 --threads 2"


def test_bench_is_a_group_with_help_for_each_command(mikv):
    for command in ("attention", "matmul", "generate", "plot"):
        assert f" {command} " in mikv("bench", "--help").stdout
        assert mikv("bench", command, "--help").exit_code == 0
