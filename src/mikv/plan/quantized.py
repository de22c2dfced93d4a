"""Weights as a checkpoint stores them, as a WeightFormat: one that mikv quantized, or a GGUF file.

A config.json says how each layer is stored, and which ones stayed as they were.
"""

from collections.abc import Iterator
from dataclasses import replace

from mikv.errors import ConfigError
from mikv.integrations.discovery import QUANT_METHOD
from mikv.integrations.quantizer.config import BCQConfig, ModuleSettings
from mikv.plan.gguf_shape import METHOD as GGUF_METHOD
from mikv.plan.shapes import ModelShape
from mikv.plan.weight_formats import WeightFormat

# names of the matrices of a layer below it, in the order of ModelShape.matrices
_PROJECTED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = (*_PROJECTED, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_UNGATED = (*_PROJECTED, "self_attn.out_proj", "fc1", "fc2")
_EMBEDDINGS = ("lm_head", "embed_tokens", "embed_positions")
_PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers")


def stored_format(shape: ModelShape) -> WeightFormat:
    """The format of all its layers: one of binary codes, or the mean number of bits where layers differ.

    Raises ConfigError for other quantizers, and for settings of layers whose size is not known.
    """
    settings = shape.quantization or {}
    if settings.get("quant_method") == GGUF_METHOD:
        return _gguf_format(shape)
    config = quantization_of(shape)
    usual = _format(config.of_module(""))
    changes = list(_exceptions(shape, config))
    if not changes:
        return usual
    size = sum(number * usual.matrix_bytes(*matrix) for matrix, number in shape.all_matrices)
    for matrix, own in changes:
        size += own.matrix_bytes(*matrix) - usual.matrix_bytes(*matrix)
    bits = 8 * size / shape.matrix_parameters
    return WeightFormat(f"bcq {bits:.2f}", "lut", bits)


def has_quantized_embeddings(shape: ModelShape) -> bool:
    """Whether the token embedding and the output head are stored as the layers are."""
    is_gguf = (shape.quantization or {}).get("quant_method") == GGUF_METHOD
    return not is_gguf and quantization_of(shape).quantize_embeddings


def quantization_of(shape: ModelShape) -> BCQConfig:
    """What its config.json says. Raises ConfigError for other quantizers."""
    settings = shape.quantization or {}
    if (method := settings.get("quant_method")) != QUANT_METHOD:
        raise ConfigError(
            f"{shape.name} was quantized by {method!r}, whose bytes are not known here; "
            "say what they are: --weights int4, or a number of bits per weight"
        )
    config: BCQConfig = BCQConfig.from_dict(settings)
    return config


def _gguf_format(shape: ModelShape) -> WeightFormat:
    stored = shape.quantization or {}
    bits, head_bits = float(str(stored["bits"])), float(str(stored["head_bits"]))
    floats = {"f32": "dense32", "f16": "dense16", "bf16": "dense16"}
    kernel = floats.get(str(stored["type"]), "dense8" if bits > 7 else "int4" if bits > 3.5 else "int3")
    return replace(WeightFormat(f"{stored['type']} {bits:.2f}", kernel, bits), head_bits=head_bits)


def _exceptions(shape: ModelShape, config: BCQConfig) -> Iterator[tuple[tuple[int, int], WeightFormat]]:
    """Matrices that are stored otherwise than most: with settings of their own, or as they were."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = config.modules_to_not_convert or []
    names = _GATED if shape.is_gated else _UNGATED
    known = set()
    as_it_was = WeightFormat("as it was", "dense16", 32 if shape.dtype == "float32" else 16)
    prefix = _prefix(config) if shape.is_gated else "model.decoder.layers"
    for layer in range(shape.num_layers):
        for name, matrix in zip(names, shape.matrices, strict=False):
            full = f"{prefix}.{layer}.{name}"
            known.add(full)
            if not should_convert_module(full, kept):
                yield matrix, as_it_was
            elif full in config.module_settings:
                yield matrix, _format(config.of_module(full))
    unknown = [n for n in config.module_settings if n not in known and n.split(".")[-1] not in _EMBEDDINGS]
    if shape.num_experts or shape.counted is not None:  # whose matrices have other names or sizes
        unknown = [*config.module_settings, *(n for n in kept if not n.endswith((*_EMBEDDINGS, "norm")))]
    if unknown:
        name = unknown[0]
        raise ConfigError(f"{shape.name} has settings for {name!r}, whose size is not known; give --weights")


def _prefix(config: BCQConfig) -> str:
    """Where the layers are in the model: what any name says that the configuration has."""
    named = [*config.module_settings, *(config.modules_to_not_convert or [])]
    return next((p for p in _PREFIXES if any(name.startswith(f"{p}.") for name in named)), _PREFIXES[0])


def _format(settings: ModuleSettings) -> WeightFormat:
    numbers = (1 if settings.uniform else settings.bits) + settings.offset
    return WeightFormat(f"bcq{settings.bits}", "lut", settings.bits, numbers, settings.group_size)
