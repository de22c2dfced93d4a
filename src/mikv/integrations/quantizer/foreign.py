"""Which program quantized the weights of a model, by its config.json and the files beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mikv.errors import UnsupportedModelError
from mikv.integrations.discovery import QUANT_METHOD

_KEYS = ("quantization_config", "compression_config", "quantization")
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_IMPORTED = ("gptq", "awq")
_UNPACKED = ("mxfp4",)  # transformers turns it into plain weights where there is no GPU


def method_of(config: Mapping[str, Any], folder: Path | None = None) -> str | None:
    """The name of the method, None for plain weights. `folder` is where files beside config.json may tell."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]  # such as text_config
    for part in parts:
        for key in _KEYS:
            if found := part.get(key):
                return _name(key, found)
    for file, method in _FILES.items() if folder is not None else ():
        if (folder / file).is_file():  # type: ignore[operator]
            return method
    return None


def require_readable(name: str, config: Mapping[str, Any], folder: Path | None = None) -> None:
    """Raise UnsupportedModelError for weights that another program quantized, with what to do about it."""
    method = method_of(config, folder)
    if method in (None, QUANT_METHOD, *_UNPACKED):
        return
    said = f"the weights of {name} are quantized by {method}"
    if method in _IMPORTED and "quantization_config" in config:
        raise UnsupportedModelError(
            f"{said}; `mikv quantize {name} OUT --method import` takes their codes over, then use OUT as the model"
        )
    raise UnsupportedModelError(
        f"{said}, which mikv does not read; use the model that it was made from (`mikv quantize` makes it small), or "
        "load it in Python with transformers and what that needs, and give the model to MiKVCache"
    )


def _name(key: str, found: object) -> str:
    if not isinstance(found, Mapping):
        return f"a method that {key} does not name"
    method = found.get("quant_method") or found.get("quant_algo")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and key == "quantization":
        return "mlx"
    return str(method) if method is not None else f"a method that {key} does not name"
