"""What the config.json of a folder says of weights that GPTQ or AWQ packed; what cannot be imported is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mikv.errors import CheckpointError, ConfigError, UnsupportedModelError
from mikv.integrations.quantizer.config import IMPORT, BCQConfig
from mikv.integrations.quantizer.foreign import method_of
from mikv.integrations.quantizer.tensor_files import read_json
from mikv.weights.packed import AWQLayout, GPTQLayout, Layout

_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_ZERO_SHIFTS = {"gptq": {"gptq": 1, "gptq_v2": 0}, "awq": {"gemm": 0}}  # by format
_WHOLE_ROWS = -1


@dataclass(frozen=True)
class PackedSettings:
    """What only GPTQ's programs say: `is_symmetric`, all zero-points in the middle; `desc_act`, inputs in any order."""

    layout: Layout
    is_symmetric: bool = False
    desc_act: bool = False

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises ConfigError if there is nothing to import, UnsupportedModelError or CheckpointError if it cannot."""
        found = _quantization_config(folder)
        method = found.get("quant_method")
        if method not in tuple(_BITS):
            method = method_of(read_json(folder / "config.json"), folder)
            raise ConfigError(
                f"{folder} has nothing to import (quant_method {method!r}); it is the folders whose config.json has a "
                f"quantization_config with quant_method {' or '.join(_BITS)} that can be imported, and .gguf files"
            )
        name, bits = _format(method, found), found.get("bits")
        where = f"{folder}: quant_method {method!r} with"
        if name not in _ZERO_SHIFTS[method]:
            known = " or ".join(_ZERO_SHIFTS[method])
            raise UnsupportedModelError(f"{where} the packed format {name!r} cannot be imported; {known} can")
        if bits not in _BITS[method]:
            known = ", ".join(map(str, _BITS[method]))
            raise UnsupportedModelError(f"{where} bits={bits!r} cannot be imported; {known} can")
        if any(not pattern.startswith("-:") for pattern in found.get("dynamic") or {}):
            raise UnsupportedModelError(f"{where} other settings for some layers (dynamic) cannot be imported")
        group_size = _group_size(found.get("group_size"), where)
        if method == "awq":
            return cls(AWQLayout(group_size))
        layout = GPTQLayout(bits, group_size, _ZERO_SHIFTS[method][name])
        return cls(layout, found.get("sym") is True, bool(found.get("desc_act")))

    def config(self) -> BCQConfig:
        """The configuration of the imported model. Raises ConfigError for groups that mikv cannot have."""
        config = BCQConfig(bits=self.layout.bits, group_size=self.layout.group_size, method=IMPORT)
        config.uniform = config.offset = True
        return config

    def __str__(self) -> str:
        size = self.layout.group_size
        return f"{self.layout.bits} bits, " + ("one group per row" if size is None else f"groups of {size}")


def is_packed(source: Path) -> bool:
    """Whether `source` is a folder whose config.json names a quant_method that can be imported."""
    return (source / "config.json").is_file() and _quantization_config(source).get("quant_method") in tuple(_BITS)


def _quantization_config(folder: Path) -> Mapping[str, Any]:
    """Empty for a model that is not quantized."""
    found = read_json(folder / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else {}


def _format(method: str, found: Mapping[str, Any]) -> str:
    """By the names that the programs have given it over the years."""
    if method == "awq":
        of_backend = "llm-awq" if found.get("backend") == "llm-awq" else None
        name = of_backend or found.get("version") or found.get("format") or "gemm"
    else:
        of_marlin = "marlin" if found.get("is_marlin_format") else None
        name = of_marlin or found.get("checkpoint_format") or found.get("format") or "gptq"
    return str(name).lower()


def _group_size(value: object, where: str) -> int | None:
    if value == _WHOLE_ROWS:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where} group_size={value!r} is damaged; it is a number of inputs, or -1 for all")
    return value
