"""What is finished of a model that is being quantized, in a folder: work that is interrupted goes on from there.

    layers/0007-<digest>.safetensors    the coding of a layer, its name and its report
    costs/0007-<digest>.safetensors     what rounding a layer costs, for a budget

The digest is of the file's bytes: a file that was cut off or changed does not count. Knows neither models nor settings;
whoever opens a journal answers for its being of the same ones.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mikv.errors import CheckpointError

_DIGEST_BYTES = 16
_UNFINISHED = ".partial"


class Records:
    """Tensors and JSON by name, a file each, in the order in which they were finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            if _is_whole(file):
                with safe_open(file, "pt") as content:
                    self.files[content.metadata()["name"]] = file

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, name: str) -> tuple[dict[str, Tensor], Any]:
        """The tensors and the JSON of a name that is there."""
        with safe_open(self.files[name], "pt") as content:
            return {key: content.get_tensor(key) for key in list(content.keys())}, json.loads(
                content.metadata()["json"]
            )

    def keep(self, name: str, tensors: Mapping[str, Tensor], about: Any) -> None:
        """Write a file, whole or not at all. Raises CheckpointError where that fails."""
        contiguous = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        content = save(contiguous, metadata={"name": name, "json": json.dumps(about)})
        digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
        number = 1 + max((int(file.name.partition("-")[0]) for file in self.files.values()), default=0)
        file = self.folder / f"{number:04}-{digest}.safetensors"
        partial = file.with_suffix(_UNFINISHED)
        try:
            self.folder.mkdir(exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"cannot keep {name} in {self.folder}: {error.strerror or error}") from error
        self.files[name] = file


@dataclass(frozen=True)
class Journal:
    """See the module."""

    layers: Records
    costs: Records

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The journal in a folder that exists, empty or not."""
        return cls(Records(folder / "layers"), Records(folder / "costs"))

    def cost(self, name: str) -> float | None:
        """What rounding the layer costs, if that is known."""
        return float(self.costs.read(name)[0]["cost"]) if name in self.costs else None

    def keep_cost(self, name: str, cost: float) -> None:
        """Raises CheckpointError."""
        self.costs.keep(name, {"cost": torch.tensor(cost, dtype=torch.float64, device="cpu")}, None)


def _is_whole(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
    except OSError:
        return False
    return file.stem.partition("-")[2] == digest.hexdigest()
