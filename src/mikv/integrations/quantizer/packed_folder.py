"""The tensors of a folder with weights that GPTQ or AWQ packed: found, checked and read, one layer at a time.

Knows nothing of transformers' models; which layers there are and how large, it is told.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mikv.errors import CheckpointError, UnsupportedModelError
from mikv.integrations.quantizer.packed_settings import PackedSettings
from mikv.integrations.quantizer.tensor_files import Header, headers, weight_files

_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32")}  # safetensors' names
_GROUPS = "g_idx"


@dataclass(frozen=True)
class PackedFolder:
    """`tensors` has the header of every tensor by its name."""

    folder: Path
    settings: PackedSettings
    tensors: Mapping[str, Header]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read config.json and the names of all tensors. Raises MiKVError for what cannot be imported."""
        settings = PackedSettings.read(folder)
        if not (files := weight_files(folder)):
            raise CheckpointError(
                f"{folder} has no .safetensors file; the folder is incomplete, or holds another format"
            )
        return cls(folder, settings, headers(files))

    @cached_property
    def layers(self) -> list[str]:
        """Names of the packed layers. Raises CheckpointError for parts of one that has no codes."""
        found = {name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight")}
        for name in sorted(self.tensors):
            layer, _, part = name.rpartition(".")
            if part in (*_DTYPES, _GROUPS) and layer not in found:
                raise CheckpointError(
                    f"{self.folder} has {name}, but no {layer}.qweight; the folder is incomplete, or AWQ scaled the "
                    "activations of the model, which cannot be imported"
                )
        return sorted(found)

    @cached_property
    def plain(self) -> list[str]:
        """Names of all tensors but the packed matrices."""
        packed = {f"{layer}.{part}" for layer in self.layers for part in (*_DTYPES, _GROUPS)}
        return sorted(set(self.tensors) - packed)

    def read(self, name: str) -> Tensor:
        """One tensor. Raises CheckpointError if it is not there or cut off."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no {name}; the folder is incomplete")
        return self.tensors[name].read()

    def read_layer(self, layer: str) -> dict[str, Tensor]:
        """What its matrix is made of."""
        return {part: self.read(f"{layer}.{part}") for part in _DTYPES}

    def require_shape(self, name: str, wanted: tuple[int, ...], reason: str) -> str:
        """The dtype of a tensor, which is not read. Raises CheckpointError unless it is there and of this shape."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no {name}; the folder is incomplete")
        found = self.tensors[name]
        if found.shape != wanted:
            raise CheckpointError(f"{name} is {found.shape}, but {wanted} {reason}; one of them is wrong")
        return found.dtype

    def require_layer(self, layer: str, out_features: int, in_features: int) -> None:
        """Raise CheckpointError or UnsupportedModelError, naming the tensor, unless a layer can be imported."""
        try:
            shapes = self.settings.layout.shapes(out_features, in_features)
        except CheckpointError as error:
            raise CheckpointError(f"{layer}: {error}") from error
        reason = f"by config.json ({self.settings}) for {out_features} outputs and {in_features} inputs"
        for part, shape in shapes.items():
            dtype = self.require_shape(f"{layer}.{part}", shape, reason)
            if dtype not in _DTYPES[part]:
                raise CheckpointError(f"{layer}.{part} is {dtype}, not {' or '.join(_DTYPES[part])}")
        if self.settings.desc_act or f"{layer}.{_GROUPS}" in self.tensors:
            self._require_order(f"{layer}.{_GROUPS}", in_features)
        self._require_zeros(f"{layer}.qzeros")

    def _require_order(self, name: str, in_features: int) -> None:
        in_order = torch.arange(in_features, dtype=torch.int64, device="cpu") // (
            self.settings.layout.group_size or in_features
        )
        if not torch.equal(self.read(name).long(), in_order):
            raise UnsupportedModelError(
                f"{name}: groups of inputs out of order (desc_act, also called act-order) cannot be imported; "
                "use a model that was quantized with desc_act=False"
            )

    def _require_zeros(self, name: str) -> None:
        layout = self.settings.layout
        try:
            zeros = layout.zeros(self.read(name))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        first, middle = int(zeros[0, 0]), 2 ** (layout.bits - 1)
        if self.settings.is_symmetric and first != middle and bool((zeros == first).all()):
            raise CheckpointError(
                f"{name}: all zero-points are {first}, where symmetric weights (sym) of {layout.bits} bits have "
                f"{middle}; checkpoint_format in config.json should be the other one of gptq and gptq_v2"
            )
