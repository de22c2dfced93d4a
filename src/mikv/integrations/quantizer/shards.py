"""A checkpoint written tensor by tensor: safetensors files of bounded size with an index, as transformers reads it."""

import json
from pathlib import Path
from typing import Self

from safetensors.torch import save_file
from torch import Tensor

from mikv.integrations.quantizer import checksums
from mikv.integrations.quantizer.tensor_files import INDEX

_BYTES = 2**28  # of a file, or one tensor's if that is more: many small files would all be open while they are read


class Shards:
    """`with Shards(folder) as shards: shards.add(...)`. Memory holds what one file takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, Tensor] = {}
        self.file_of: dict[str, str] = {}
        self.checksums: dict[str, str] = {}

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write these now or later."""
        self.pending |= tensors
        if sum(tensor.nbytes for tensor in self.pending.values()) >= _BYTES:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Write the rest and the index, unless there was an error."""
        if kind is not None:
            return
        self._write()
        about = checksums.of_tensors(self.checksums)
        (self.folder / INDEX).write_text(json.dumps({"metadata": about, "weight_map": self.file_of}), encoding="utf-8")

    def _write(self) -> None:
        if not self.pending:
            return
        name = f"model-{len(set(self.file_of.values())) + 1}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in self.pending.items()}
        save_file(tensors, self.folder / name, metadata={"format": "pt"})
        self.file_of |= dict.fromkeys(self.pending, name)
        self.checksums |= {name: checksums.checksum(tensor) for name, tensor in tensors.items()}
        self.pending = {}
