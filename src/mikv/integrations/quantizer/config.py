"""`BCQConfig`: how a model's weights are quantized, and what its config.json says of them. Plain JSON types only."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from typing import Any, Self

from transformers.utils.quantization_config import QuantizationConfigMixin

from mikv.choices import did_you_mean, require_one_of
from mikv.errors import CheckpointError, ConfigError
from mikv.integrations.discovery import QUANT_METHOD
from mikv.weights.nested import PRECISIONS
from mikv.weights.solve import METHODS, needs_hessian
from mikv.weights.weight import GROUP_STEP, MOST_BITS

FORMAT_VERSION = 2  # 2: with checksums
AUTO = "auto"
IMPORT = "import"  # codes that a file has already
_NESTED_BITS = PRECISIONS[:-1]
_UNIFORM = ("rtn", "gptq", "refined-uniform", IMPORT)
_WITHOUT_OFFSET = ("greedy", "alternating")
_NESTED_METHODS = ("refined", "offset")  # with calibration and without
_OF_A_MODULE = ("bits", "group_size", "uniform", "offset")


@dataclass(kw_only=True)
class BCQConfig(QuantizationConfigMixin):
    """Binary-coding quantization of a model's linear layers.

    bits                    sign planes per weight, 1 to 8
    group_size              columns that share scales: a multiple of 32, or None for whole rows
    method                  how the coding is found (mikv.weights.solve); auto is "refined" with calibration, "offset"
                            without; "import" is what `import_gguf` and `import_packed` write
    modules_to_not_convert  names of layers that stay as they are, with all below them; or the ends of names
    module_settings         settings of single layers by full name: {"model.layers.0.mlp.down_proj": {"bits": 4}};
                            bits and group_size
    quantize_embeddings     also the output head and the token embedding, which share one coding where they are tied
    nested_bits             (2, 3) with bits=4: the same planes can be read with fewer bits too (`set_bits`)

    `uniform`, `offset` (which scales there are), `version` and `format` are filled in by quantization. Impossible
    values raise ConfigError, unknown settings of a saved model too; a newer format raises CheckpointError.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False)
    bits: int = 4
    group_size: int | None = 128
    method: str = AUTO
    modules_to_not_convert: list[str] | None = None
    module_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantize_embeddings: bool = False
    nested_bits: tuple[int, ...] = ()
    uniform: bool | None = None
    offset: bool | None = None
    format: int = FORMAT_VERSION
    version: str = field(default_factory=partial(version, "mikv"))

    def __post_init__(self) -> None:
        _require_format(self.format)
        _require_bits("bits", self.bits)
        _require_group_size("group_size", self.group_size)
        require_one_of("method", self.method, (AUTO, *METHODS, IMPORT))
        for name in ("quantize_embeddings", "uniform", "offset"):
            _require_flag(name, getattr(self, name), name != "quantize_embeddings")
        self._check_modules()
        self._check_nested_bits()

    def _check_modules(self) -> None:
        names = self.modules_to_not_convert
        if names is not None:
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
                raise ConfigError(f"modules_to_not_convert={names!r} must be a list of names, such as ['lm_head']")
            self.modules_to_not_convert = list(names)
        settings = self.module_settings
        if not isinstance(settings, Mapping) or not all(isinstance(s, Mapping) for s in settings.values()):
            raise ConfigError(f'module_settings={settings!r} must map layers to settings: {{"lm_head": {{"bits": 4}}}}')
        self.module_settings = {name: dict(changes) for name, changes in settings.items()}
        for name, changes in self.module_settings.items():
            if unknown := sorted(set(changes) - set(_OF_A_MODULE)):
                known = ", ".join(_OF_A_MODULE)
                raise ConfigError(f"module_settings of {name!r}: unknown setting {unknown[0]!r}; there are {known}")
            _require_bits(f"module_settings of {name!r}: bits", changes.get("bits", self.bits))
            _require_group_size(f"module_settings of {name!r}: group_size", changes.get("group_size", self.group_size))

    def _check_nested_bits(self) -> None:
        nested = self.nested_bits
        if not isinstance(nested, (list, tuple)):
            raise ConfigError(f"nested_bits={nested!r} must be a list of numbers of bits, such as {_NESTED_BITS}")
        self.nested_bits = tuple(nested)
        if not nested:
            return
        if self.precisions != PRECISIONS:
            raise ConfigError(
                f"nested_bits={nested!r} with bits={self.bits}: what can be nested is nested_bits={_NESTED_BITS} in "
                f"bits={PRECISIONS[-1]}"
            )
        if self.method not in (AUTO, *_NESTED_METHODS):
            raise ConfigError(f"method={self.method!r} cannot find nested weights; use 'auto' with nested_bits")
        if any("bits" in changes for changes in self.module_settings.values()):
            raise ConfigError("nested_bits cannot be combined with bits of single layers in module_settings")

    @property
    def has_checksums(self) -> bool:
        """Whether a saved model has a checksum of every tensor."""
        return self.format >= 2

    @property
    def precisions(self) -> tuple[int, ...]:
        """All numbers of bits that the weights can be read with."""
        return (*self.nested_bits, self.bits)

    def resolved_method(self, *, calibrated: bool) -> str:
        """The method by name. Raises ConfigError if it needs calibration and there is none."""
        method = self.method
        if method == AUTO:
            return "refined" if calibrated else "offset"
        if method == IMPORT:
            return IMPORT
        if needs_hessian(method) and not calibrated:
            raise ConfigError(
                f"method={method!r} needs calibration, which loading a model cannot do; load the model without "
                "quantization_config and call mikv.quantize(model, config, calibration=texts), or use method='offset'"
            )
        return method

    def of_module(self, name: str) -> "ModuleSettings":
        """What holds for the layer `name`."""
        changes = self.module_settings.get(name, {})
        method = self.resolved_method(calibrated=True)
        uniform = method in _UNIFORM if self.uniform is None else self.uniform
        offset = method not in _WITHOUT_OFFSET if self.offset is None else self.offset
        return ModuleSettings(
            bits=changes.get("bits", self.bits),
            group_size=changes.get("group_size", self.group_size),
            uniform=changes.get("uniform", uniform),
            offset=changes.get("offset", offset),
        )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of `to_dict`, with transformers' signature. Raises ConfigError naming an unknown setting."""
        settings = dict(config_dict)
        method = settings.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ConfigError(f"quant_method={method!r} is not {QUANT_METHOD}")
        _require_format(settings.get("format", FORMAT_VERSION))
        known = sorted(f.name for f in fields(cls) if f.init)
        if unknown := sorted(set(settings) - set(known)):
            near = did_you_mean(unknown[0], known)
            raise ConfigError(f"unknown setting {unknown[0]!r}; the settings are {', '.join(known)}{near}")
        config = cls(**settings)
        return (config, kwargs) if return_unused_kwargs else config

    def resolved(self, *, calibrated: bool) -> Self:
        """A copy for one model: the method and which scales there are by name. Raises ConfigError for imports."""
        if self.method == IMPORT:
            raise ConfigError(
                f"method={IMPORT!r} takes codes that files have; call import_gguf or import_packed, or use "
                f"`mikv quantize FILE.gguf OUT --method {IMPORT}`"
            )
        config: Self = self.from_dict(self.to_dict())
        config.method = self.resolved_method(calibrated=calibrated)
        sample = config.of_module("")
        config.uniform, config.offset = sample.uniform, sample.offset
        return config


@dataclass(frozen=True)
class ModuleSettings:
    """What holds for one layer."""

    bits: int
    group_size: int | None
    uniform: bool
    offset: bool


def _require_format(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"quantization format={value!r} is not a version number; the config.json is damaged")
    if value > FORMAT_VERSION:
        raise CheckpointError(
            f"the weights have quantization format {value}, this mikv reads up to {FORMAT_VERSION}; update mikv"
        )


def _is_bits(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_BITS


def _require_bits(name: str, value: object) -> None:
    if not _is_bits(value):
        raise ConfigError(f"{name}={value!r} must be a whole number from 1 to {MOST_BITS}")


def _require_group_size(name: str, value: object) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_number and value >= GROUP_STEP and value % GROUP_STEP == 0):  # type: ignore[operator]
        raise ConfigError(f"{name}={value!r} is not a multiple of {GROUP_STEP}; use 32, 64, 128 or None for rows")


def _require_flag(name: str, value: object, optional: bool) -> None:
    if not isinstance(value, bool) and not (optional and value is None):
        raise ConfigError(f"{name}={value!r} must be True or False")
