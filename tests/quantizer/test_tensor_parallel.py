"""Two processes that split every layer say what one says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import quantized

from mikv.weights.module import BCQModule

pytest.importorskip("accelerate", reason="transformers splits models with accelerate")


def in_two_processes(*folders: Path) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, *map(str, folders)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_two_processes_say_what_one_says_and_refuse_what_does_not_split(tmp_path: Path) -> None:
    settings = {"attention_bias": True, "mlp_bias": True, "intermediate_size": 128, "tie_word_embeddings": True}
    model = quantized(settings=settings)
    model.save_pretrained(tmp_path / "groups")
    quantized(group_size=None).save_pretrained(tmp_path / "rows")
    expected = model.generate(torch.arange(3, 20)[None], max_new_tokens=8, do_sample=False)[0].tolist()
    num_weights = sum(m.shape.out_features * m.shape.in_features for m in model.modules() if isinstance(m, BCQModule))
    groups, rows = in_two_processes(tmp_path / "groups", tmp_path / "rows")
    assert groups["tokens"] == expected
    assert groups["weights"] == num_weights // 2
    assert groups["error"].startswith("CacheStateError: the model is split over processes; save it")
    assert rows["error"].startswith("ConfigError: group_size=")
    assert "cannot be split over 2 processes" in rows["error"]
