"""Cells: what their records say, that they are measured once, and that a killed run loses at most one sample."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mikv.cache.config import MiKVConfig
from mikv.errors import ConfigError, ModelNotFoundError
from mikv.lab import evaluate, model_facts
from mikv.lab.cells import from_json, summary, to_json
from mikv.lab.evaluate import Evaluation, Plan
from mikv.lab.examination import Answer, SampleResult
from mikv.lab.records import Ledger
from tiny_chat import chat_tokenizer, save_chat_model

TEXT, LINES = "text:prompt=80,read=16", "line-retrieval:lines=2"
TIMING = {"decode_tokens_per_second", "command", "threads", "processes"}
RESULT = SampleResult(
    answers=(Answer("yes", 1.0, "a"), Answer("no", 0.0, "b"), Answer("well", None, "")),
    tokens=10,
    bytes=500,
    fp16_bytes=1000,
    kl=(0.0, 0.5),
    agreements=1,
    nll=4.0,
    full_nll=2.0,
    predicted=2,
    decode_seconds=0.5,
)


@pytest.fixture
def plan(tiny_folder):
    return Plan((TEXT, LINES), str(tiny_folder), ("full", "mikv:small"), samples=2)


def run(plan, out=None):
    """Records, and how many samples were measured for them."""
    measured = []
    with Ledger(out) as ledger:
        records = Evaluation(plan, "mikv eval").run(ledger, lambda finished, done, total: measured.append(finished))
    return records, len(measured)


def untimed(records):
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_reference_model_is_part_of_what_a_record_is_of(plan, tiny_folder, tmp_path):
    against = replace(plan, tasks=(TEXT,), reference=str(tiny_folder))
    run(against, tmp_path / "r.jsonl")
    records, measured = run(replace(plan, tasks=(TEXT,)), tmp_path / "r.jsonl")
    assert measured == 4
    assert [line["reference"] for line in lines(tmp_path / "r.jsonl")] == [str(tiny_folder)] * 2 + [None] * 2
    assert [line["kl_mean"] for line in lines(tmp_path / "r.jsonl")] == [record["kl_mean"] for record in records] * 2


def test_a_reference_model_with_other_tokens_is_refused(plan, tmp_path):
    save_chat_model(tmp_path)
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["mikv"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"--reference {tmp_path} has other tokens than"):
        Evaluation(replace(plan, reference=str(tmp_path)), "mikv eval")


def test_a_cell_has_one_record_with_everything(plan):
    records, measured = run(plan)
    assert measured == 8
    assert [(r["task"], r["cache"]) for r in records] == [
        (task, cache) for task in (TEXT, LINES) for cache in plan.caches
    ]
    text, _, asked, packed = records
    assert text["kind"] == "eval"
    assert text["perplexity"] > 1
    assert text["perplexity_delta"] == text["kl_mean"] == 0
    assert text["score"] is None
    assert asked["score"] is not None
    assert asked["perplexity"] is None
    assert (asked["ratio"], asked["top1_agreement"], asked["config"]) == (2.0, 1.0, None)
    assert packed["config"] == MiKVConfig.preset("small").to_dict()
    assert packed["ratio"] < 1 < asked["decode_tokens_per_second"]
    assert packed["bytes_per_token"] == pytest.approx(packed["ratio"] * asked["bytes_per_token"] / 2)
    assert [detail["sample"] for detail in packed["details"]] == [0, 1]
    assert set(packed["details"][0]["labels"]) == {"line"}
    assert {"threads", "hardware", "isa", "versions", "command", "samples", "seed", "dtype", "chunk"} <= set(packed)


def test_numbers_of_a_cell_are_over_all_its_samples():
    other = replace(RESULT, kl=(0.25,), agreements=1, bytes=100, answers=(Answer("yes", 1.0, "a"),), decode_seconds=0.1)
    record = summary((RESULT, other), ({"depth": 1}, {"depth": 2}))
    assert record["score"] == 0.75
    assert record["score_stderr"] == pytest.approx(0.25)
    assert record["kl_mean"] == 0.25
    assert record["top1_agreement"] == pytest.approx(2 / 3)
    assert record["ratio"] == pytest.approx(0.3)
    assert record["bytes_per_token"] == pytest.approx(30)
    assert record["decode_tokens_per_second"] == pytest.approx(1 / 0.3)
    assert record["perplexity"] is None
    assert record["details"][0]["answer_scores"] == [1.0, 0.0, None]
    assert record["details"][1]["labels"] == {"depth": 2}


def test_perplexity_is_over_all_given_tokens_of_unscored_samples():
    silent = replace(RESULT, answers=())
    record = summary((silent, replace(silent, nll=8.0, full_nll=4.0, predicted=4)), ({}, {}))
    assert record["perplexity"] == pytest.approx(2.718281828**2)
    assert record["perplexity_delta"] == pytest.approx(2.718281828**2 - 2.718281828)
    assert record["score"] is record["score_stderr"] is None


def test_results_survive_json():
    assert from_json(json.loads(json.dumps(to_json(RESULT)))) == RESULT


def test_finished_cells_are_not_measured_again_and_the_model_not_even_loaded(plan, tmp_path, monkeypatch):
    out = tmp_path / "r.jsonl"
    records, _ = run(plan, out)
    assert lines(out) == records
    assert os.listdir(tmp_path) == ["r.jsonl"]
    monkeypatch.setattr(evaluate, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    assert run(plan, out) == (records, 0)
    assert lines(out) == records


def test_successive_commands_add_what_is_missing(plan, tmp_path):
    out = tmp_path / "r.jsonl"
    first, _ = run(replace(plan, tasks=(LINES,), caches=("full",)), out)
    second, measured = run(plan, out)
    assert measured == 6
    assert second[2] == first[0]
    assert len(lines(out)) == 4
    _, measured = run(replace(plan, seed=1, tasks=(LINES,)), out)
    assert measured == 4
    assert len(lines(out)) == 6


def test_the_reference_is_the_full_cache_even_if_it_is_not_asked_for(plan):
    both, _ = run(replace(plan, tasks=(LINES,)))
    [alone], _ = run(replace(plan, tasks=(LINES,), caches=("mikv:small",)))
    assert untimed([alone]) == untimed(both[1:])


def test_a_killed_run_continues_in_the_middle_of_a_cell(plan, tmp_path):
    plan, out = replace(plan, tasks=(LINES,), samples=8), tmp_path / "r.jsonl"
    journal = tmp_path / "r.partial.jsonl"
    script = "from mikv.cli import main; main()"
    options = ["--model", plan.model, "--cache", "full", "--cache", "mikv:small", "--samples", "8", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", script, "eval", LINES, *options, "--threads", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: journal.exists() and journal.read_text().count("\n") >= 3, process)
    process.kill()
    process.wait()
    finished = journal.read_text().count("\n")
    assert 3 <= finished < 16
    assert out.read_text() == ""
    records, measured = run(plan, out)
    assert measured == 16 - finished
    assert os.listdir(tmp_path) == ["r.jsonl"]
    assert untimed(lines(out)) == untimed(records) == untimed(run(plan)[0])


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def interrupted(plan, out, after):
    """Run until so many samples are finished."""

    def stop(finished, done, total):
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Ledger(out) as ledger:
        Evaluation(plan, "mikv eval").run(ledger, stop)


def test_last_lines_that_were_being_written_are_cut_off_and_measured_again(plan, tmp_path):
    out, journal = tmp_path / "r.jsonl", tmp_path / "r.partial.jsonl"
    interrupted(plan, out, after=5)
    assert len(lines(out)) == 2
    assert len(lines(journal)) == 1
    with journal.open("a") as file:
        file.write('{"cell": "[')
    with out.open("a") as file:
        file.write('{"kind": "eval", "task": "li')
    records, measured = run(plan, out)
    assert measured == 3
    assert untimed(lines(out)) == untimed(run(plan)[0]) == untimed(records)


def test_a_run_that_was_killed_before_it_wrote_a_finished_cell_needs_no_model(plan, tmp_path, monkeypatch):
    plan, out = replace(plan, tasks=(LINES,)), tmp_path / "r.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), Ledger(out) as ledger:
            Evaluation(replace(plan, caches=("full",)), "mikv eval").run(ledger)
    assert not out.exists()
    monkeypatch.setattr(evaluate, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    [record], measured = run(replace(plan, caches=("full",)), out)
    assert measured == 0
    assert record["score"] is not None
    assert os.listdir(tmp_path) == ["r.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"bench": "generate"}\n', "holds something else than mikv eval writes"),
        ("r.jsonl", '{"kind": "sweep"}', "holds something else than mikv eval writes"),
        ("r.jsonl", "my diary", "does not end as mikv eval writes"),
        ("r.jsonl", "my diary\n", "cannot read records from"),
        ("r.jsonl", '{"dear": "dia', "does not end as mikv eval writes"),
        ("r.partial.jsonl", '{"dear": "diary"}\n', "holds something else than mikv eval writes"),
    ],
)
def test_a_file_with_other_content_is_refused_and_left_alone(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message), Ledger(tmp_path / "r.jsonl"):
        pytest.fail("it was accepted")
    assert (tmp_path / name).read_text() == content


def test_a_last_line_without_its_end_counts_if_it_is_whole(plan, tmp_path):
    out = tmp_path / "r.jsonl"
    records, _ = run(plan, out)
    out.write_text(out.read_text().rstrip("\n"))
    assert run(plan, out) == (records, 0)
    assert run(replace(plan, seed=3), out)[1] == 8
    assert len(lines(out)) == 8


def test_a_file_that_another_run_is_writing_is_refused(tmp_path):
    with Ledger(tmp_path / "r.jsonl"), pytest.raises(ConfigError, match="is being written by another run"):
        Ledger(tmp_path / "r.jsonl").__enter__()


def test_a_cache_that_is_not_there_gets_a_record_with_the_reason_and_another_try(plan, tmp_path, monkeypatch):
    plan, out = replace(plan, tasks=(LINES,), caches=("quanto4", "full")), tmp_path / "r.jsonl"
    monkeypatch.setattr("mikv.cache_names.is_installed", lambda package: False)
    skipped, full = run(plan, out)[0]
    assert skipped["skipped"].startswith("needs optimum-quanto")
    assert skipped["score"] is skipped["ratio"] is skipped["kl_mean"] is None
    assert full["skipped"] is None
    assert run(plan, out) == ([skipped, full], 0)
    assert len(lines(out)) == 2  # the same reason is not written twice


def test_a_cache_that_cannot_hold_a_sample_is_skipped_with_the_reason(plan, tmp_path):
    out = tmp_path / "r.jsonl"
    records, _ = run(replace(plan, tasks=(LINES,), caches=("h2o@0.01", "full")), out)
    assert "eviction to 0.01 of the fp16 bytes is not possible" in records[0]["skipped"]
    assert records[1]["skipped"] is None
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_records_do_not_depend_on_the_number_of_processes(plan, tmp_path):
    plan = replace(plan, tasks=(LINES,), samples=3)
    assert untimed(run(replace(plan, processes=2))[0]) == untimed(run(plan)[0])


def test_more_processes_than_memory_holds_are_refused(plan, monkeypatch):
    monkeypatch.setattr(model_facts, "available_bytes", lambda: 10**9)
    with pytest.raises(
        ConfigError,
        match=r"--processes 3 would take about 1\.\d GB, 0\.4 each, and 1\.0 GB are available; use --processes 2",
    ):
        Evaluation(replace(plan, processes=3), "mikv eval")
    Evaluation(plan, "mikv eval")


def test_available_memory_is_less_than_all_there_is():
    assert 10**7 < model_facts.available_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "--samples 0 must be 1 or more"),
        ({"chunk": 0}, "--chunk 0 must be 1 or more"),
        ({"processes": 0}, "--processes 0 must be 1 or more"),
        ({"dtype": "int8"}, "--dtype 'int8' is not one of float32, bfloat16, float16"),
        ({"caches": ()}, "no cache is named"),
        ({"caches": ("full", "full")}, "--cache full is given 2 times"),
        ({"caches": ("ful",)}, "unknown cache 'ful'"),
        ({"tasks": (LINES, f"{LINES},index=word")}, f"TASK {LINES} is given 2 times"),
        ({"tasks": ("juggling",)}, "unknown task 'juggling'; the tasks are"),
    ],
)
def test_plans_that_cannot_work_are_refused(plan, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(plan, **changes)


def test_a_model_that_is_not_there_is_refused(plan):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        replace(plan, model="./nowhere")


def test_samples_longer_than_the_model_was_trained_for_are_refused(plan, tmp_path):
    folder = save_chat_model(tmp_path / "short", max_position_embeddings=256)
    with pytest.raises(ConfigError, match=rf"task '{LINES}' has a sample of [\d,]+ tokens .* was trained for 256"):
        Evaluation(replace(plan, model=str(folder)), "mikv eval")
    Evaluation(replace(plan, model=str(folder), tasks=(TEXT,)), "mikv eval")


def test_conversations_need_a_model_that_chats(plan, tmp_path):
    folder = save_chat_model(tmp_path / "wordless", template=None)
    with pytest.raises(ConfigError, match=rf"task '{LINES}' is a conversation and .* has no chat template"):
        Evaluation(replace(plan, model=str(folder)), "mikv eval")


def test_specs_become_canonical_so_that_a_cell_has_one_name(plan):
    assert replace(plan, tasks=(f"{LINES},index=word",)).tasks == (LINES,)


def test_the_journal_is_beside_its_records():
    assert Ledger(Path("a/b.jsonl"))._journal == Path("a/b.partial.jsonl")
