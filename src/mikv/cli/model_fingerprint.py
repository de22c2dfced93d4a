"""A fingerprint of what makes keys and values of tokens: every weight, and the numbers of the configuration."""

import json
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 4096  # bytes that share a sum; hashing the sums costs nothing beside reading the weights once
_NUMBERS = (
    "rope",
    "rotary",
    "theta",
    "eps",
    "scal",
    "softcap",
    "window",
    "layer",
    "head",
    "act",
    "multiplier",
    "factor",
)


def fingerprint(model: nn.Module) -> str:
    """The same for the same weights in the same dtype, wherever they lie; another one if any weight differs."""
    digest = sha256(json.dumps(_numbers(model.config), sort_keys=True, default=str).encode())
    seen = set()
    for name, tensor in model.state_dict().items():
        if (place := (tensor.data_ptr(), tensor.shape)) in seen:  # tied to one before
            continue
        seen.add(place)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _checksum(tensor):
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _checksum(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of all whole blocks, as numbers of 64 bits, and the bytes that are left over."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    end = flat.numel() // _BLOCK * _BLOCK
    return flat[:end].view(torch.int64).view(-1, _BLOCK // 8).sum(1), flat[end:]


def _numbers(config: Any) -> dict[str, Any]:
    """Whatever the text configuration sets that may enter keys and values besides the weights, names and paths not."""
    settings = config.get_text_config().to_dict()
    return {
        name: value
        for name, value in settings.items()
        if not name.startswith("_") and value is not None and any(part in name for part in _NUMBERS)
    }
