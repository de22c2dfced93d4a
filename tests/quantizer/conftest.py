"""Text for a tiny model, and a folder with it quantized."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import edit_config, quantized
from torch import Tensor

from tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 96, (20, 50), generator=generator)
    return [" ".join(f"w{i}" for i in row) for row in words.tolist()]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a quantized model and its tokenizer."""
    folder = tmp_path / "quantized"
    quantized().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def damage(saved: Path) -> Callable[[Callable[[dict[str, Tensor]], object]], Path]:
    """Change the tensors of the saved model, which has no checksums, as before format 2."""
    from safetensors.torch import load_file, save_file

    def change(edit: Callable[[dict[str, Tensor]], object]) -> Path:
        file = saved / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        edit_config(saved, format=1)
        save_file(tensors, file, metadata={"format": "pt"})
        return saved

    return change
