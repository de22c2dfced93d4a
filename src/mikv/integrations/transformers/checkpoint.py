"""A MiKVCache as one safetensors file: tensors named `layer.part`, everything else as JSON in the header.

The header has a checksum of every tensor, the file one of the header: what changed since it was written is refused.
What fits its checksums is checked once more for whether it can be a cache at all, and one of this model.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mikv.atomic_file import require_file, write_file
from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import CacheGeometry, text_config
from mikv.cache.saved import (
    MODEL_DTYPES,
    require_alike,
    require_fields,
    require_layer,
    require_plain_layer,
    whole_number,
)
from mikv.errors import CacheStateError, CheckpointError, UnsupportedModelError
from mikv.integrations.transformers.cache import MiKVCache
from mikv.integrations.transformers.layer import MiKVLayer

FORMAT_VERSION = 4  # 3 and those before had no checksums
_KEY, _CHECKSUM = "mikv", "mikv_sha256"
_FIELDS = ("version", "config", "model", "layer_types", "layers", "tensors")
_MODEL_FIELDS = ("model_type", "hidden_size", "num_attention_heads")
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_STORES_NOTHING = "dummy"  # transformers' name for layers without a cache of their own

Tensors = dict[str, Tensor]


def save_cache(cache: MiKVCache, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write `cache` to `path`, all or nothing, readable for its owner only: it holds what was said.

    Raises CheckpointError if `path` exists and `overwrite` is False or nothing can be written there (`write_file`),
    CacheStateError for layers whose state cannot be saved (linear attention) or which an interrupted step left
    different, or with NaN.
    """
    write_file(path, lambda temporary: _write(cache, temporary), overwrite=overwrite)


def load_cache(path: str | os.PathLike[str], model_config: PreTrainedConfig) -> MiKVCache:
    """Read a cache for the model of `model_config`.

    Raises CheckpointError if the file is missing, damaged, of another version, or of another model.
    """
    header, tensors = _read(Path(path))
    with _refusing(f"{path} is not a complete MiKV cache"):
        require_fields(header, _FIELDS, "the header")
        config = MiKVConfig.from_dict(header["config"])
        parts = _parts(tensors, header["layers"])
        _require_whole(config, parts, header["layers"])
    with _refusing(f"{path} was saved from another model"):
        _require_same(header["model"], _model(model_config))
        cache = MiKVCache(model_config, config)
        if header["layer_types"] != cache.layer_types:
            raise ValueError(f"one with layers {_counts(header['layer_types'])}; this has {_counts(cache.layer_types)}")
        _require_model_shape(cache, parts, header["layers"], model_config)
    for layer, part, meta in zip(cache.layers, parts, header["layers"], strict=True):
        _restore_layer(layer, part, meta)
    return cache


def _write(cache: MiKVCache, path: Path) -> None:
    parts, layers = [], []
    for i, layer in enumerate(cache.layers):
        part, meta = _layer_state(layer, i, cache.layer_types[i])
        parts.append({name: tensor.detach().contiguous().cpu() for name, tensor in part.items()})
        layers.append(json.loads(json.dumps(meta)))
    try:
        _require_whole(cache.config, parts, layers)
    except ValueError as error:
        raise CacheStateError(f"the cache cannot be saved: {error}; call cache.reset() and fill it again") from error
    tensors = {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}
    header = {
        "version": FORMAT_VERSION,
        "config": cache.config.to_dict(),
        "model": _model(cache._model_config),
        "layer_types": cache.layer_types,
        "layers": layers,
        "tensors": {name: _checksum(tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    try:
        save_file(tensors, path, metadata={_KEY: text, _CHECKSUM: hashlib.sha256(text.encode()).hexdigest()})
    except SafetensorError as error:  # of the operating system, but not as Python has it
        raise OSError(str(error)) from error


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """The header and all tensors, which are as they were written."""
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata() or {}, path)
            names = file.keys()
            require_fields(header.get("tensors"), names, "the table of checksums")
            tensors = {
                name: file.get_tensor(name).clone() for name in names
            }  # the file may change while the cache lives
    except CheckpointError:
        raise
    except Exception as error:  # readers meet damaged files with whatever their parsing runs into
        raise CheckpointError(f"{path} is not an intact safetensors file: {error}; save the cache again") from error
    for name, tensor in tensors.items():
        if _checksum(tensor) != header["tensors"][name]:
            raise CheckpointError(f"{path} is damaged: the tensor {name} is not what was saved; save the cache again")
    return header, tensors


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if _KEY not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not one that MiKVCache.save wrote")
    try:
        header = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict) or type(header.get("version")) is not int:
        raise CheckpointError(f"{path} has a damaged header: it names no version")
    version = header["version"]
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, this mikv reads {FORMAT_VERSION}; update mikv")
    if version < FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, which has no checksums and is no longer read (this mikv reads "
            f"{FORMAT_VERSION}); fill a cache again and save it"
        )
    if metadata.get(_CHECKSUM) != hashlib.sha256(metadata[_KEY].encode()).hexdigest():
        raise CheckpointError(f"{path} is damaged: its header is not what was saved; save the cache again")
    return header


def _checksum(tensor: Tensor) -> str:
    """Of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Say of an error what it means."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{what}: {error}") from error


@contextmanager
def _naming(layer_idx: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer_idx}: {error}") from error


def _parts(tensors: Tensors, layers: object) -> list[Tensors]:
    """The tensors of each layer."""
    if not isinstance(layers, list):
        raise ValueError("layers is not a list")
    parts: dict[str, Tensors] = {str(i): {} for i in range(len(layers))}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".")
        if layer not in parts:
            raise ValueError(f"the tensor {name} belongs to none of its {len(layers)} layers")
        parts[layer][part] = tensor
    return list(parts.values())


def _require_whole(config: MiKVConfig, parts: list[Tensors], layers: list[Any]) -> None:
    """Raise ValueError unless these can be the layers of one cache."""
    extents = {}
    for i, (part, meta) in enumerate(zip(parts, layers, strict=True)):
        with _naming(i):
            if not isinstance(meta, dict):
                raise ValueError("it is not described")
            if meta.get("kind") == "nothing":
                require_fields(meta, ("kind",), "the layer")
                require_fields(part, (), "the layer")
            elif meta.get("kind") == "plain":
                require_fields(meta, ("kind", "seen", "window"), "the layer")
                window = None if meta["window"] is None else whole_number(meta["window"], "window", at_least=1)
                extents[i] = require_plain_layer(part, whole_number(meta["seen"], "seen"), window)
            else:
                extents[i] = require_layer(config.for_layer(i, len(layers)), part, meta)
    require_alike(extents)


def _layer_state(layer: Any, layer_idx: int, layer_type: str) -> tuple[Tensors, dict[str, Any]]:
    if isinstance(layer, MiKVLayer):
        return layer.tokens.state()
    if layer_type == _STORES_NOTHING:
        return {}, {"kind": "nothing"}
    if type(layer) not in _PLAIN_LAYERS:
        raise CacheStateError(f"layer {layer_idx} is a {type(layer).__name__}, whose state mikv cannot save")
    meta = {"kind": "plain", "seen": layer.get_seq_length(), "window": _window(layer)}
    if not layer.is_initialized:
        return {}, meta
    keys, values = layer.keys, layer.values
    if meta["window"] is not None:  # while past is recorded, more is kept than the window needs
        surplus = max(0, keys.shape[2] - (meta["window"] - 1))
        keys, values = keys[:, :, surplus:], values[:, :, surplus:]
    return {"keys": keys, "values": values}, meta


def _window(layer: Any) -> int | None:
    return getattr(layer, "sliding_window", None)


def _restore_layer(layer: Any, tensors: Tensors, meta: dict[str, Any]) -> None:
    if isinstance(layer, MiKVLayer):
        layer.tokens.restore(tensors, meta)
        if tensors:
            layer.dtype, layer.device = MODEL_DTYPES[meta["dtype"]], torch.device("cpu")
            layer.is_initialized = True
    elif tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = meta["seen"]


def _model(model_config: PreTrainedConfig) -> dict[str, Any]:
    """What tells models of the same shapes apart, as JSON types."""
    config = text_config(model_config)
    return json.loads(json.dumps({name: getattr(config, name, None) for name in _MODEL_FIELDS}, default=str))


def _require_same(saved: object, own: dict[str, Any]) -> None:
    require_fields(saved, own, "the model")
    assert isinstance(saved, dict)
    for name, value in own.items():
        if saved[name] != value:
            raise ValueError(f"one with {name} {saved[name]!r}; this has {value!r}")


def _require_model_shape(
    cache: MiKVCache, parts: list[Tensors], layers: list[dict[str, Any]], model_config: PreTrainedConfig
) -> None:
    """Raise ValueError unless every layer is of the model's kind and shape."""
    if len(layers) != len(cache.layers):
        raise ValueError(f"one of {len(layers)} layers; this has {len(cache.layers)}")
    geometry = CacheGeometry.from_model_config(model_config)
    for i, (layer, part, meta) in enumerate(zip(cache.layers, parts, layers, strict=True)):
        kind = meta["kind"] if meta["kind"] in ("plain", "nothing") else "compressed"
        if kind != _kind(layer, cache.layer_types[i]):
            raise ValueError(f"one whose layer {i} is {kind}; here it is {_kind(layer, cache.layer_types[i])}")
        if kind == "plain" and meta["window"] != _window(layer):
            raise ValueError(f"one whose layer {i} has a window of {meta['window']}; here it is {_window(layer)}")
        if part:
            own = geometry.layers[i]
            _require_heads(i, _heads(part, meta), (own.num_kv_heads, own.head_dim, own.value_dim or own.head_dim))


def _heads(part: Tensors, meta: dict[str, Any]) -> tuple[int, int, int]:
    """KV heads, head dim of keys and of values that a layer holds."""
    if "shape" in meta:
        _, num_heads, head_dim = meta["shape"]
        return num_heads, head_dim, head_dim
    return part["keys"].shape[1], part["keys"].shape[3], part["values"].shape[3]


def _require_heads(layer_idx: int, saved: tuple[int, int, int], own: tuple[int, int, int]) -> None:
    if saved != own:
        held, has = (
            f"{heads} KV heads of dim {' and '.join(map(str, sorted({*dims})))}" for heads, *dims in (saved, own)
        )
        raise ValueError(f"layer {layer_idx} holds {held}; this model has {has}")


def _kind(layer: Any, layer_type: str) -> str:
    if isinstance(layer, MiKVLayer):
        return "compressed"
    return "nothing" if layer_type == _STORES_NOTHING else "plain"


def _counts(layer_types: object) -> str:
    if not isinstance(layer_types, list):
        return repr(layer_types)
    return ", ".join(f"{layer_types.count(kind)} {kind}" for kind in sorted(set(map(str, layer_types))))
