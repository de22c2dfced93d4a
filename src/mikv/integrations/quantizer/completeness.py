"""Whether a folder's files have what a model needs, by their headers: asked before memory is taken for any of it.

Checkpoints with checksums have been compared with what was written already; this is for those of format 1, and for
models of another class than the one that was saved.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mikv.errors import CheckpointError, UnsupportedModelError
from mikv.integrations.quantizer.tensor_files import Header, headers
from mikv.weights.module import BCQModule

_CODED = {torch.uint8: "U8", torch.float16: "F16"}  # the dtypes of a coding's parts, as safetensors calls them


def require_complete(model: PreTrainedModel, files: Sequence[Path], passed_over: Sequence[str] = ()) -> None:
    """Raise CheckpointError, naming the tensor, for one that is missing or of another shape than the model's, and for
    parts of a coding of another dtype.

    Names that transformers translates are its to check: if the files have other names than the model, fewer of them
    prove nothing.
    """
    found = {_within(model, name): header for name, header in headers(files).items() if name not in passed_over}
    wanted = {_within(model, name): (name, tensor) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() & found.keys()):
        full_name, tensor = wanted[name]
        _require_shape(full_name, tensor, found[name])
        layer, _, part = full_name.rpartition(".")
        if part != "bias" and isinstance(model.get_submodule(layer), BCQModule):
            _require_dtype(full_name, tensor, found[name])  # transformers 5.16 would cast it into shape
    tied = {_within(model, name) for pair in model.all_tied_weights_keys.items() for name in pair}
    missing = sorted(wanted.keys() - found.keys() - tied)
    if missing and (found.keys() <= wanted.keys() or not _is_saved_class(model)):
        raise missing_tensor(model, wanted[missing[0]][0])


def require_layers(num_layers: object, files: Sequence[Path]) -> None:
    """Raise CheckpointError for a configuration with more layers than the files have tensors."""
    if isinstance(num_layers, int) and num_layers > (have := len(headers(files))):
        raise CheckpointError(f"config.json says {num_layers} layers, but the files have {have} tensors; it is damaged")


def missing_tensor(model: PreTrainedModel, name: str) -> CheckpointError | UnsupportedModelError:
    """The error for a tensor that a model needs and files do not have."""
    if not _is_saved_class(model):
        return UnsupportedModelError(
            f"the checkpoint has no {name}, which a {type(model).__name__} needs: it holds a "
            f"{' or '.join(model.config.architectures)}; load it as that"
        )
    return CheckpointError(f"the checkpoint has no {name}; it is damaged or was not written by mikv")


def _is_saved_class(model: PreTrainedModel) -> bool:
    """Whether the model is of the class that was saved, or its part without a head."""
    saved = model.config.architectures or [type(model).__name__]
    return type(model).__name__ in saved or model.base_model is model


def _require_shape(name: str, tensor: torch.Tensor, found: Header) -> None:
    if found.shape != tuple(tensor.shape):
        raise CheckpointError(
            f"{name} is {found.dtype} {found.shape}, but {tuple(tensor.shape)} by config.json; one of them is damaged "
            "or another's"
        )


def _require_dtype(name: str, tensor: torch.Tensor, found: Header) -> None:
    if found.dtype != _CODED[tensor.dtype]:
        raise CheckpointError(f"{name} is {found.dtype}, but {_CODED[tensor.dtype]} in what mikv writes; it is damaged")


def _within(model: PreTrainedModel, name: str) -> str:
    """The name without the prefix that models with a head have and their bodies have not."""
    return name.removeprefix(f"{model.base_model_prefix}.")
