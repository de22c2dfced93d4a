"""Tiny models, quantized, and what they answer."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import mikv
from tiny import tiny_model

TOKENS = torch.arange(3, 43)[None]


def reload(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """The model after saving and loading."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | settings)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def quantized(family: str = "llama", settings: dict[str, Any] | None = None, **config: Any) -> PreTrainedModel:
    """A tiny model with weights of 4 bits, without calibration."""
    model = tiny_model(family, **settings or {})
    mikv.quantize(model, mikv.BCQConfig(**{"bits": 4, "group_size": 32} | config))
    return model


def edit_config(folder: Path, **settings: Any) -> None:
    """Change the quantization_config of a saved model."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= settings
    file.write_text(json.dumps(config))
