"""A checkpoint that mikv quantized, as a WeightFormat: its config.json says how each layer is stored."""

from collections.abc import Iterator, Mapping

from mikv.errors import ConfigError
from mikv.integrations.discovery import QUANT_METHOD
from mikv.integrations.quantizer.config import BCQConfig, ModuleSettings
from mikv.plan.shapes import ModelShape
from mikv.plan.weight_formats import WeightFormat

# ends of the names of layers, and their places in ModelShape.matrices
_PLACES = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "o_proj": 3, "out_proj": 3, "gate_proj": 4, "up_proj": 5}
_PLACES |= {"fc1": 4, "fc2": -1, "down_proj": -1}
_EMBEDDINGS = ("lm_head", "embed_tokens", "embed_positions")


def quantization_of(shape: ModelShape) -> BCQConfig:
    """What its config.json says. Raises ConfigError for other quantizers, and for layers that stayed as they were."""
    settings = shape.quantization or {}
    if (method := settings.get("quant_method")) != QUANT_METHOD:
        raise ConfigError(
            f"{shape.name} was quantized by {method!r}, whose bytes are not known here; "
            "say what they are: --weights int4, or a number of bits per weight"
        )
    config: BCQConfig = BCQConfig.from_dict(settings)
    kept = [name for name in config.modules_to_not_convert or [] if name.split(".")[-1] not in _EMBEDDINGS]
    if kept:
        raise ConfigError(f"{shape.name} has layers that are not quantized ({kept[0]}); give the mean as --weights 3.5")
    return config


def quantized_format(shape: ModelShape) -> WeightFormat:
    """The format of all its layers: one of binary codes, or the mean number of bits where layers differ."""
    config = quantization_of(shape)
    usual = _format(config.of_module(""))
    if not config.module_settings:
        return usual
    size = shape.num_layers * sum(usual.matrix_bytes(*matrix) for matrix in shape.matrices)
    for matrix, own in _exceptions(shape, config):
        size += own.matrix_bytes(*matrix) - usual.matrix_bytes(*matrix)
    return WeightFormat(f"bcq {8 * size / shape.matrix_parameters:.2f}", "lut", 8 * size / shape.matrix_parameters)


def _exceptions(shape: ModelShape, config: BCQConfig) -> Iterator[tuple[tuple[int, int], WeightFormat]]:
    names: Mapping[str, object] = config.module_settings
    for name in names:
        end = name.split(".")[-1]
        if end in _EMBEDDINGS:
            continue
        if end not in _PLACES:
            raise ConfigError(f"{shape.name} has settings for {name!r}, whose size is not known; give --weights")
        yield shape.matrices[_PLACES[end]], _format(config.of_module(name))


def _format(settings: ModuleSettings) -> WeightFormat:
    numbers = (1 if settings.uniform else settings.bits) + settings.offset
    return WeightFormat(f"bcq{settings.bits}", "lut", settings.bits, numbers, settings.group_size)
