"""Folders as the programs of GPTQ and AWQ write them, made of tiny models by the layouts that those publish.

Packing is spelt out number by number, as in AutoGPTQ's and AutoAWQ's packers, so that it shares no idea with how mikv
unpacks. Matrices are (M, K), grids (M, N).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import tiny_model, tiny_tokenizer

OUTPUTS_OF_A_WORD = (0, 2, 4, 6, 1, 3, 5, 7)  # of AWQ, from the lowest bits on

Tensors = dict[str, Tensor]
Grid = tuple[Tensor, Tensor, Tensor]  # codes (M, K), float16 scales and whole zeros (M, N)


@dataclass(frozen=True)
class Written:
    """What a folder stands for: the model with float32 weights, and the grid of every packed layer."""

    model: PreTrainedModel
    grids: dict[str, Grid]

    def weight(self, name: str) -> Tensor:
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight


@dataclass(frozen=True)
class Program:
    """What was asked of the program that quantized."""

    method: str = "gptq"
    format: str = "gptq"
    bits: int = 4
    group_size: int = 32
    sym: bool = False
    desc_act: bool = False

    def settings(self) -> dict[str, Any]:
        common = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return common | {"version": self.format, "zero_point": True, "modules_to_not_convert": None}
        return common | {"checkpoint_format": self.format, "sym": self.sym, "desc_act": self.desc_act}


def rounded(weight: Tensor, program: Program) -> Grid:
    """The nearest grid whose zeros are never 0, for which version 1 has no word."""
    size, last = columns(weight, program), 2**program.bits - 1
    groups = weight.split(size, dim=1)
    low = torch.stack([g.amin(1) for g in groups], 1).clamp_max(-1e-3)
    high = torch.stack([g.amax(1) for g in groups], 1).clamp_min(1e-3)
    if program.sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / last).half()
    zero = torch.full_like(low, 2 ** (program.bits - 1)) if program.sym else (-low / scale).round().clamp(1, last)
    spread = [x.float().repeat_interleave(size, 1)[:, : weight.shape[1]] for x in (scale, zero)]
    return (weight / spread[0] + spread[1]).round().clamp(0, last).long(), scale, zero.long()


def exact(codes: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    """Float32 (M, K), without rounding."""
    group = torch.arange(codes.shape[1]) // size
    return scale.float()[:, group] * (codes - zero[:, group]).float()


def columns(weight: Tensor, program: Program) -> int:
    return weight.shape[1] if program.group_size == -1 else program.group_size


def gptq_words(numbers: Tensor, bits: int) -> Tensor:
    """The first axis of numbers (n, ...) packed: int32 (n bits / 32, ...)."""
    v = numbers.numpy().astype(np.uint64)
    words = []
    if bits == 3:
        for i in range(0, len(v), 32):
            words.append(sum(v[i + j] << np.uint64(3 * j) for j in range(10)) | v[i + 10] << np.uint64(30))
            second = sum(v[i + 11 + j] << np.uint64(3 * j + 1) for j in range(10)) | v[i + 21] << np.uint64(31)
            words.append(v[i + 10] >> np.uint64(2) | second)
            words.append(v[i + 21] >> np.uint64(1) | sum(v[i + 22 + j] << np.uint64(3 * j + 2) for j in range(10)))
    else:
        per_word = 32 // bits
        for i in range(0, len(v), per_word):
            words.append(sum(v[i + j] << np.uint64(bits * j) for j in range(per_word)))
    return torch.from_numpy((np.stack(words) & np.uint64(2**32 - 1)).astype(np.uint32).view(np.int32))


def awq_words(numbers: Tensor) -> Tensor:
    """The second axis of numbers (n, M) packed: int32 (n, M / 8)."""
    v = numbers.numpy().astype(np.uint64)
    words = [
        sum(v[:, i + output] << np.uint64(4 * place) for place, output in enumerate(OUTPUTS_OF_A_WORD))
        for i in range(0, v.shape[1], 8)
    ]
    return torch.from_numpy(np.stack(words, 1).astype(np.uint32).view(np.int32))


def packed(codes: Tensor, scale: Tensor, zero: Tensor, program: Program) -> Tensors:
    """The tensors of a layer."""
    scales = scale.T.contiguous()
    if program.method == "awq":
        return {"qweight": awq_words(codes.T), "qzeros": awq_words(zero.T), "scales": scales}
    stored = zero - 1 if program.format == "gptq" else zero
    qzeros = gptq_words(stored, program.bits).T.contiguous()
    g_idx = torch.arange(codes.shape[1], dtype=torch.int32) // columns(codes, program)
    return {"qweight": gptq_words(codes.T, program.bits), "qzeros": qzeros, "scales": scales, "g_idx": g_idx.int()}


def quantized_names(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]


def write(
    folder: Path,
    program: Program,
    family: str = "llama",
    edit: Callable[[Tensors, dict[str, Any]], object] | None = None,
    names: Callable[[PreTrainedModel], list[str]] = quantized_names,
    **config: Any,
) -> Written:
    """Write a packed model into `folder`, after `edit` of its tensors and settings."""
    model = tiny_model(family, **config)
    written = Written(model, {})
    tensors = {name: x.detach().clone() for name, x in model.state_dict().items()}
    for name in names(model):
        weight = tensors.pop(f"{name}.weight")
        written.grids[name] = grid = rounded(weight, program)
        tensors |= {f"{name}.{part}": x for part, x in packed(*grid, program).items()}
        model.get_submodule(name).weight.data = exact(*grid, columns(weight, program))
    settings = program.settings()
    if edit is not None:
        edit(tensors, settings)
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"quantization_config": settings}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return written
