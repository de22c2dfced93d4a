"""What a folder that mikv wrote says of itself, so that no change of it goes unnoticed.

The metadata of its safetensors files hold a JSON object under `KEY`, the same in each:

    tensors   [{name: checksum}]   of every tensor of the model, by the names that files have; a second entry where
                                   transformers may write its own names instead
    config    config.json as it was written with them

A checksum is of dtype, shape and bytes. Folders of format 1 have none.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mikv.errors import CheckpointError
from mikv.integrations.quantizer.tensor_files import INDEX, headers, opened, read_json

KEY = "mikv"
CONFIG = "config.json"
_DIGITS = 32
_VOLATILE = ("transformers_version", "_name_or_path", "name_or_path")  # of config.json; they change no number


def checksum(tensor: Tensor) -> str:
    """Of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def describe(model: PreTrainedModel, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_pretrained` is to write of `state`, all that files hold, and the metadata about it."""
    kept = {name: x for name, x in state.items() if name not in (model._keys_to_ignore_on_save or ())}
    kept = remove_tied_weights_from_state_dict(kept, model)
    tensors = [_checksums(revert_weight_conversion(model, dict(kept)))]
    if set(tensors[0]) != set(kept):
        tensors.append(_checksums(kept))  # save_original_format=False
    config = model.config
    config.dtype = str(model.dtype).removeprefix("torch.")  # as save_pretrained does next
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    written = json.loads(config.to_json_string())
    written.pop("transformers_weights", None)
    return kept, {KEY: json.dumps({"tensors": tensors, "config": written})}


def of_tensors(tensors: Mapping[str, str]) -> dict[str, str]:
    """The metadata about tensors whose config.json is not written yet."""
    return {KEY: json.dumps({"tensors": [tensors]})}


def require_config(folder: Path, files: Sequence[Path]) -> None:
    """Raise CheckpointError, naming the entry, if config.json is not the one that was written with the weights."""
    now = read_json(folder / CONFIG)
    was = _about(files).get("config", now)
    for name in sorted(was.keys() | now.keys()):
        if name not in _VOLATILE and was.get(name) != now.get(name):
            raise CheckpointError(
                f"{folder / CONFIG} was changed after mikv wrote it: {name} is {_short(now.get(name))}, it was "
                f"{_short(was.get(name))}; put that back, and pass changes to from_pretrained({name}=...)"
            )


def require_tensors(files: Sequence[Path]) -> None:
    """Raise CheckpointError, naming the tensor, unless the files hold what was written, bit for bit."""
    found = headers(files)
    known = min(_about(files)["tensors"], key=lambda tensors: len(tensors.keys() ^ found.keys()))
    if missing := sorted(known.keys() - found.keys()):
        raise CheckpointError(f"the checkpoint has no {missing[0]}; the folder is incomplete")
    if unknown := sorted(found.keys() - known.keys()):
        raise CheckpointError(f"{unknown[0]} in {found[unknown[0]].file} was not written by mikv with the others")
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                if checksum(tensors.get_tensor(name)) != known[name]:
                    raise CheckpointError(f"{name} in {file} is damaged: its checksum is not the one it was saved with")


def _about(files: Sequence[Path]) -> dict[str, Any]:
    """What the files say, if they agree."""
    found = {text for file in files for text in [_metadata(file).get(KEY)]}
    if found == {None} and (index := files[0].parent / INDEX).is_file():
        about = read_json(index).get("metadata")
        found = {about.get(KEY)} if isinstance(about, dict) else found
    if None in found or len(found) != 1:
        raise CheckpointError(
            f"{files[0].parent}: the checksums of the weights are missing or contradict each other; the files were "
            "changed after mikv wrote them, quantize again"
        )
    try:
        said: dict[str, Any] = json.loads(found.pop() or "")
        is_sound = all(
            isinstance(part, dict) for part in (said["tensors"][0], *said["tensors"], said.get("config", {}))
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{files[0].parent}: the checksums of the weights are damaged: {error!r}") from error
    if not is_sound:
        raise CheckpointError(f"{files[0].parent}: the checksums of the weights are damaged")
    return said


def _metadata(file: Path) -> Mapping[str, str]:
    with opened(file) as tensors:
        return tensors.metadata() or {}


def _checksums(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in state.items()}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
