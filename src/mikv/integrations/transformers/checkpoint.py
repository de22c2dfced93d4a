"""A MiKVCache as one safetensors file: tensors named `layer.part`, everything else as JSON in the header."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mikv.cache.config import MiKVConfig
from mikv.errors import CacheStateError, CheckpointError, ConfigError
from mikv.integrations.transformers.cache import MiKVCache, MiKVLayer

FORMAT_VERSION = 3  # 1 had no blocks of 32 tokens in the high tier and another order of bytes, 2 had no key_rounding
_OLDEST_VERSION = 2
_KEY = "mikv"
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def save_cache(cache: MiKVCache, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write `cache` to `path`, all or nothing.

    Raises CheckpointError if `path` exists and `overwrite` is False or the folder does not exist, CacheStateError for
    layers whose state cannot be saved (linear attention).
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists; pass overwrite=True or choose another name")
    if not path.parent.is_dir():
        raise CheckpointError(f"the folder {path.parent} does not exist")
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for i, layer in enumerate(cache.layers):
        part, meta = _layer_state(layer, i)
        tensors |= {f"{i}.{name}": tensor.detach().contiguous().cpu() for name, tensor in part.items()}
        layers.append(meta)
    header = {
        "version": FORMAT_VERSION,
        "config": cache.config.to_dict(),
        "layer_types": cache.layer_types,
        "layers": layers,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_cache(path: str | os.PathLike[str], model_config: PreTrainedConfig) -> MiKVCache:
    """Read a cache for the model of `model_config`.

    Raises CheckpointError if the file is missing, damaged, of another version, or of a model of another shape.
    """
    header, tensors = _read(Path(path))
    try:
        if header["version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {header['version']}, this mikv reads up to {FORMAT_VERSION}; update mikv"
            )
        if header["version"] < _OLDEST_VERSION:
            raise CheckpointError(
                f"{path} has format version {header['version']}, whose layout of the tiers this mikv no longer reads; "
                "fill a cache again and save it"
            )
        config = MiKVConfig.from_dict({"key_rounding": "nearest"} | header["config"])
        cache = MiKVCache(model_config, config)
        if header["layer_types"] != cache.layer_types:
            raise CheckpointError(
                f"{path} was saved from a model with layers {_counts(header['layer_types'])}; "
                f"this one has {_counts(cache.layer_types)}"
            )
        for i, (layer, meta) in enumerate(zip(cache.layers, header["layers"], strict=True)):
            prefix = f"{i}."
            part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            _restore_layer(layer, part, meta)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ConfigError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a complete MiKV cache: {error!r}") from error
    _require_model_shape(cache, model_config, path)
    return cache


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if _KEY not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not one that MiKVCache.save wrote")
    try:
        header = json.loads(metadata[_KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header")
    return header, tensors


def _layer_state(layer: Any, layer_idx: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if isinstance(layer, MiKVLayer):
        return layer.tokens.state()
    if type(layer) not in _PLAIN_LAYERS:
        raise CacheStateError(f"layer {layer_idx} is a {type(layer).__name__}, whose state mikv cannot save")
    if not layer.is_initialized:
        return {}, {"kind": "plain", "seen": 0}
    return {"keys": layer.keys, "values": layer.values}, {"kind": "plain", "seen": layer.get_seq_length()}


def _restore_layer(layer: Any, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    if isinstance(layer, MiKVLayer):
        layer.tokens.restore(tensors, meta)
        if tensors:
            layer.dtype, layer.device = getattr(torch, meta["dtype"]), torch.device("cpu")
            layer.is_initialized = True
    elif tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = meta["seen"]


def _require_model_shape(cache: MiKVCache, model_config: PreTrainedConfig, path: Any) -> None:
    from mikv.cache.geometry import CacheGeometry

    geometry = CacheGeometry.from_model_config(model_config)
    for i, (layer, own) in enumerate(zip(cache.layers, geometry.layers, strict=False)):
        expected = (own.num_kv_heads, own.head_dim)
        if isinstance(layer, MiKVLayer) and layer.tokens.shape is not None and layer.tokens.shape[1:] != expected:
            raise CheckpointError(
                f"{path} holds {layer.tokens.shape[1]} KV heads of dim {layer.tokens.shape[2]} in layer {i}; "
                f"this model has {expected[0]} of dim {expected[1]} there"
            )


def _counts(layer_types: list[str]) -> str:
    return ", ".join(f"{layer_types.count(kind)} {kind}" for kind in sorted(set(layer_types)))
