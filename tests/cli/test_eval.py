"""`mikv eval`: the JSON contract, the table, errors before the model is loaded, and what an interrupted run says."""

import json
import signal
import subprocess
import sys
import time

import pytest

from mikv.lab import evaluate

LINES = "line-retrieval:lines=2"
QUICK = ("--samples", 1, "--threads", 1)
KEYS = {
    "kind",
    "task",
    "model",
    "cache",
    "score",
    "score_stderr",
    "samples",
    "seed",
    "tokens",
    "bytes_per_token",
    "ratio",
    "kl_mean",
    "kl_p99",
    "top1_agreement",
    "perplexity",
    "perplexity_delta",
    "decode_tokens_per_second",
    "details",
    "config",
    "skipped",
    "threads",
    "hardware",
    "isa",
    "versions",
    "command",
}


@pytest.fixture
def unloaded(monkeypatch):
    """Loading a model is a failure."""
    monkeypatch.setattr(evaluate, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))


def test_json_is_the_records_and_nothing_else(mikv, tiny_folder, tmp_path):
    out = tmp_path / "r.jsonl"
    arguments = (LINES, "--model", tiny_folder, "--cache", "full", "--cache", "mikv:small", *QUICK, "--out", out)
    result = mikv("eval", *arguments, "--json")
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout)["records"]
    assert [record["cache"] for record in records] == ["full", "mikv:small"]
    assert all(set(record) >= KEYS for record in records)
    assert records == [json.loads(line) for line in out.read_text().splitlines()]
    assert records[0]["threads"] == 1
    command = f"mikv eval {LINES} --model {tiny_folder} --cache full --cache mikv:small --samples 1 --seed 0"
    assert records[0]["command"] == f"{command} --chunk 32 --threads 1"


def test_people_get_a_table_per_task_and_what_was_skipped(mikv, tiny_folder, monkeypatch):
    monkeypatch.setattr("mikv.cache_names.is_installed", lambda package: False)
    tasks = (LINES, "text:prompt=80,read=16")
    text = mikv("eval", *tasks, "--model", tiny_folder, "--cache", "full", "--cache", "hqq4", *QUICK).stdout
    scored, _, read = text.partition("perplexity")
    assert f"{LINES}, samples: 1, model:" in " ".join(scored.split())
    assert "0.000" in scored
    assert "2.0000" in read
    assert f"skipped: {LINES} through hqq4: needs hqq" in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("juggling",), "unknown task 'juggling'; the tasks are"),
        ((LINES, "--cache", "blanced"), "unknown cache 'blanced'"),
        ((LINES, "--model", "./nowhere"), "./nowhere does not exist"),
        ((LINES, "--out", "nowhere/r.jsonl"), "--out nowhere/r.jsonl: there is no folder nowhere"),
        ((LINES, "--out", "r.json"), "--out r.json must end in .jsonl"),
        ((LINES, "--samples", 0), "--samples 0 must be 1 or more"),
        ((LINES, "--threads", 100_000), "--threads 100000 must be between 1 and"),
        ((LINES, "--dtype", "int4"), "--dtype 'int4' is not one of"),
        ((LINES, "--reference", "./nowhere"), "./nowhere does not exist"),
        (("humaneval",), "allow it with --allow-code-execution"),
        (("line-retrieval:lines=900",), "was trained for 4,096; choose a shorter one by the task's options"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(refused, tiny_folder, unloaded, arguments, message):
    assert message in refused("eval", "--model", tiny_folder, *QUICK, *arguments)


def test_a_file_with_other_content_is_refused_before_the_model_is_loaded(refused, tiny_folder, unloaded, tmp_path):
    (tmp_path / "diary.jsonl").write_text('{"dear": "diary"}\n')
    message = refused("eval", LINES, "--model", tiny_folder, *QUICK, "--out", tmp_path / "diary.jsonl")
    assert "holds something else than mikv eval writes there" in message


def test_an_interrupted_run_says_how_to_continue(tiny_folder, tmp_path):
    journal = tmp_path / "r.partial.jsonl"
    script = "from mikv.cli import main; main()"
    options = ["--model", tiny_folder, "--samples", 1000, "--threads", 1, "--out", tmp_path / "r.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, "eval", "text:prompt=80,read=16", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # jobs in the background of some shells ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not journal.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted: the same command continues where it stopped" in stderr
    assert "Traceback" not in stderr


def test_an_interrupted_run_without_a_file_says_that_nothing_was_kept(mikv, tiny_folder, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_model", interrupt)
    result = mikv("eval", LINES, "--model", tiny_folder, *QUICK)
    assert result.exit_code == 130
    assert "interrupted: nothing was kept; with --out FILE.jsonl a run can be continued" in result.stderr
