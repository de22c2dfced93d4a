"""The code in README and the guides runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

import mikv
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
    "page", ["README.md", "CONTRIBUTING.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
)
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for target in filter(None, targets):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_readme_repeats_the_numbers_of_the_sweep() -> None:
    sweep = {}
    for line in (ROOT / "docs/results/sweep.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        if len(cells) == 8:
            arm, ratio, qwen, smollm = cells[0], cells[1], cells[2], cells[5]
            sweep[arm] = [ratio, smollm, qwen]
    rows = re.findall(
        r"^\| .*\(([^()]+)\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) >= 8
    for arm, *numbers in rows:
        assert sweep[arm] == numbers
