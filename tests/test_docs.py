"""The code in README and the guides runs as it stands."""

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from transformers import pipeline

import mikv
from mikv.plan.constants import CPU, GPU
from mikv.records import read_lines
from tiny_chat import chat_model, chat_tokenizer

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def python_blocks(page: str) -> list[str]:
    return _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.bundled
def test_quick_start_is_short_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = python_blocks("README.md")
    assert len(block.strip().splitlines()) <= 10
    exec(block, {})
    assert "of fp16" in capsys.readouterr().out


def test_guide_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = chat_model(), chat_tokenizer()
    inputs = tokenizer("Some text to begin with.", return_tensors="pt")
    names: dict[str, Any] = {"mikv": mikv, "model": model, "tokenizer": tokenizer, "inputs": inputs}
    names["pipeline"] = pipeline
    blocks = python_blocks("docs/guides/transformers.md")
    assert len(blocks) >= 5
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md")),
    ],
)
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for target in filter(None, targets):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_results_in_short_repeat_the_numbers_of_the_report() -> None:
    records = read_lines(ROOT / "docs/results/report.jsonl")
    texts = [record for record in records if record["task"].startswith("text") and record["skipped"] is None]
    costs = (ROOT / "docs/results/README.md").read_text().partition("## What it costs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .*`(.+)`.* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", costs, re.M)
    assert len(rows) >= 8
    for cache, *numbers in rows:
        of_cache = [record for record in texts if record["cache"] == cache]
        assert len({(record["model"], record["task"]) for record in of_cache}) == 4, cache
        ratio = fmean(record["ratio"] for record in of_cache)
        kl = [
            fmean(record["kl_mean"] for record in of_cache if record["model"].startswith(model))
            for model in ("smollm2", "qwen")
        ]
        assert numbers == [f"{ratio:.3f}", *(f"{value:.4f}" for value in kl)], cache


def test_readme_repeats_the_report_with_its_spread() -> None:
    records = read_lines(ROOT / "docs/results/report.jsonl")
    texts = [record for record in records if record["task"].startswith("text") and record["skipped"] is None]
    kl = r"([\d.]+ \([\d.]+ to [\d.]+\))"
    rows = re.findall(rf"^\| .*`(.+)` \| ([\d.]+) \| {kl} \| {kl} \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 8
    for cache, ratio, *divergences in rows:
        of_cache = [record for record in texts if record["cache"] == cache]
        assert ratio == f"{fmean(record['ratio'] for record in of_cache):.2f}", cache
        for model, divergence in zip(("smollm2", "qwen"), divergences, strict=True):
            of_model = [record for record in of_cache if record["model"].startswith(model)]
            single = [detail["kl_mean"] for record in of_model for detail in record["details"]]
            mean = fmean(record["kl_mean"] for record in of_model)
            assert divergence == f"{mean:.4f} ({min(single):.4f} to {max(single):.4f})", (cache, model)


def test_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_results_in_short_repeat_what_was_measured_of_weights() -> None:
    measured = set()
    for record in read_lines(ROOT / "docs/results/weights.jsonl"):
        numbers = f"{record['bits_per_weight']:.2f}", *(f"{record[kl]:.3f}" for kl in ("kl_prose", "kl_code"))
        measured.add((record["model"].split("-")[0], f"{record['bits']} bits", record["method"], *numbers))
    weights = (ROOT / "docs/results/README.md").read_text().partition("## Weights, too")[2].partition("\n## ")[0]
    pair = r" \| ([\d.]+) \| ([\d.]+) / ([\d.]+)"
    rows = re.findall(rf"^\| ([\w.]+)-[^,]*, (\d bits)[^|]*{pair}{pair} \|$", weights, re.M)
    assert len(rows) >= 5
    for model, bits, *numbers in rows:
        assert (model.lower(), bits, "refined", *numbers[:3]) in measured
        assert (model.lower(), bits, "gptq", *numbers[3:]) in measured


def test_the_page_of_the_planner_has_its_constants() -> None:
    page = (ROOT / "docs/results/plan.md").read_text(encoding="utf-8")
    for constants in (GPU, CPU):
        for name, constant in constants.items():
            assert f"| {name} | {constant.value:g} | {constant.unit} | {constant.source} |" in page
