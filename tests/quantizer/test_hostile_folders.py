"""No mutant of a saved model loads to other answers, raises an error that is not mikv's, or takes long."""

from pathlib import Path
from typing import Any

import pytest
from hostile_folders import fuzz, make_folder

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "embeddings": {"settings": {"tie_word_embeddings": True}, "quantize_embeddings": True},
    "nested": {"nested_bits": (2, 3)},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_mutant_is_refused_or_the_same(tmp_path: Path, kind: str) -> None:
    outcomes, faults = fuzz(12, 100, make_folder(tmp_path / "model", **SETTINGS[kind]))
    assert not faults, "\n".join(faults)
    assert outcomes["CheckpointError"] > 50
