"""The safetensors files of a folder, as transformers chooses them, and what their headers say."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mikv.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@dataclass(frozen=True)
class Header:
    """One tensor: the file that holds it, its name, safetensors' name of its dtype, its shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor itself."""
        with opened(self.file) as tensors:
            tensor: Tensor = tensors.get_tensor(self.name)
            return tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the files of the index; else the only safetensors file or index, however it is named.

    Empty for a folder without safetensors. Raises CheckpointError for an index that is damaged or names files that are
    not there, and if several files could be meant.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    indexes = [folder / INDEX] if (folder / INDEX).is_file() else sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _files_of_index(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise CheckpointError(f"{folder} has {len(files)} .safetensors files and no {INDEX}; one is expected")
    return files


def opened(file: Path) -> Any:
    """A safetensors file, open. Raises CheckpointError if it is none, or cut off."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights of {file} are damaged or cut off: {error}") from error


def headers(files: Iterable[Path]) -> dict[str, Header]:
    """What is said of every tensor. Raises CheckpointError for a name that two files have."""
    found: dict[str, Header] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                if name in found:
                    raise CheckpointError(f"{name} is in {found[name].file.name} and in {file.name}; one is too many")
                part = tensors.get_slice(name)
                found[name] = Header(file, name, str(part.get_dtype()), tuple(part.get_shape()))
    return found


def _files_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map does not map tensors to files")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{index.parent} has no {', '.join(missing)}; the folder is incomplete")
    return files
