"""The code in the guide to weights runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest

import mikv
from tiny import tiny_model

GUIDE = Path(__file__).parents[2] / "docs/guides/weights.md"


def test_guide_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], tokenizer: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("plain-model")
    names: dict[str, Any] = {"mikv": mikv, "model": tiny_model(), "tokenizer": tokenizer, "texts": texts}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(block, names)
