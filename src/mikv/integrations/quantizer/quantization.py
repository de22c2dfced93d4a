"""`mikv.quantize`: exchange a model's linear layers for binary-coded ones, in place, one layer at a time."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mikv.cache.geometry import context_length
from mikv.errors import ConfigError, NumericsError, UnsupportedModelError
from mikv.integrations.quantizer import modules
from mikv.integrations.quantizer.budget import OnProgress, bits_for_budget, require_budget
from mikv.integrations.quantizer.calibrate import Stage, stages, token_chunks
from mikv.integrations.quantizer.config import BCQConfig
from mikv.integrations.quantizer.journal import Journal
from mikv.integrations.quantizer.reading import require_readable
from mikv.weights.drift import made_up
from mikv.weights.embedding import BCQEmbedding
from mikv.weights.linear import BCQLinear
from mikv.weights.module import BCQModule
from mikv.weights.nested import nest
from mikv.weights.solve import follows_drift, in_layer, needs_hessian, output_error, solve
from mikv.weights.weight import BCQWeight

MAX_TOKENS = 16384
SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    output_error  mean squared error of its output on the calibration inputs, relative to the output's mean square;
                  without calibration that of its weights
    seconds       that finding the coding took
    """

    name: str
    bits: int
    group_size: int
    bits_per_weight: float
    num_weights: int
    output_error: float
    seconds: float


@dataclass(frozen=True)
class QuantizationReport:
    """All quantized layers, in the order in which they were quantized."""

    layers: tuple[LayerReport, ...]
    method: str
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Average over the quantized matrices, scales and offsets included."""
        weights = sum(layer.num_weights for layer in self.layers)
        return sum(layer.bits_per_weight * layer.num_weights for layer in self.layers) / weights


def quantize(
    model: PreTrainedModel,
    config: BCQConfig,
    calibration: Iterable[str] | None = None,
    *,
    tokenizer: Any = None,
    max_tokens: int = MAX_TOKENS,
    sequence_length: int = SEQUENCE_LENGTH,
    budget_bits: float | None = None,
    on_progress: Callable[[LayerReport, int, int], None] | None = None,
    on_measured: OnProgress | None = None,
    journal: Journal | None = None,
) -> QuantizationReport:
    """Quantize `model` in place; `save_pretrained` then writes the result.

    `calibration` are texts; None takes a method that needs none. Up to `max_tokens` of their tokens go through the
    model in pieces of `sequence_length`, or less if the model reads less at once; `tokenizer` is by default the one of
    the model's folder. `budget_bits` gives each layer bits of its own, so that all take at most so many per weight,
    scales included; what rounding it does to predictions on the texts is measured first, and module_settings of the
    saved configuration has the result.

    `on_progress` is called with a layer's report, its number from 1, and the number of layers, `on_measured` for a
    budget with the name of a layer and these numbers. `journal` keeps what is finished: after an interruption, load
    the model again and pass a journal of the same folder, with the same settings and texts. The model is left in eval
    mode; after an error load it again.

    Raises:
        ConfigError: settings that cannot work, or no text to calibrate on.
        UnsupportedModelError: the model is quantized already, or has layers that mikv would get wrong.
        NumericsError: weights, or inputs of layers, that are not finite.
        CheckpointError: the journal cannot be written.

    """
    start = time.perf_counter()
    for name, value in (("max_tokens", max_tokens), ("sequence_length", sequence_length)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    require_plain(model)
    model.eval()
    if budget_bits is not None:
        require_budget(budget_bits, config, calibrated=calibration is not None)
    config = config.resolved(calibrated=calibration is not None)
    modules.fix_skipped(model, config)
    names = modules.linear_names(model, config)
    if config.quantize_embeddings:
        modules.require_embeddings(model)
    chunks = None
    if calibration is not None:
        longest = min(sequence_length, context_length(model.config) or sequence_length)
        chunks = token_chunks(calibration, tokenizer or _tokenizer_of(model), max_tokens, longest)
        require_readable(model, names, chunks)
    if budget_bits is not None:
        assert chunks is not None
        bits = bits_for_budget(model, config, budget_bits, chunks, on_measured or _ignore, journal)
        _set_module_bits(config, bits)
    reports: list[LayerReport] = []
    work = _Work(model, config, journal)
    total = len(names) + len(work.embeddings)
    for report in work.run(names, chunks):
        reports.append(report)
        if on_progress is not None:
            on_progress(report, len(reports), total)
    mark_quantized(model, config)
    return QuantizationReport(tuple(reports), config.method, time.perf_counter() - start)


def coded(
    weight: Tensor, name: str, config: BCQConfig, hessian: Tensor | None
) -> tuple[dict[int, BCQWeight], LayerReport]:
    """The codings of float32 (M, K) by their number of bits, and the report on the largest."""
    start = time.perf_counter()
    settings = config.of_module(name)
    if config.nested_bits:
        nested = nest(weight, settings.group_size, hessian if needs_hessian(config.method) else None)
        codings = {bits: nested.at(bits) for bits in config.precisions}
        num_bytes = nested.num_bytes
    else:
        single = solve(weight, settings.bits, settings.group_size, config.method, hessian)
        codings = {single.bits: single}
        num_bytes = single.num_bytes
    seconds = time.perf_counter() - start
    best = codings[settings.bits]
    error = output_error(weight, best, hessian)
    if not isfinite(error):
        raise NumericsError(f"the error of the coding is {error}; weights or inputs are too large for float32")
    bits_per_weight = 8 * num_bytes / weight.numel()
    report = LayerReport(name, best.bits, best.group_size, bits_per_weight, weight.numel(), error, seconds)
    return codings, report


def quantize_layer(
    model: PreTrainedModel, name: str, config: BCQConfig, stage: Stage | None, journal: Journal | None = None
) -> LayerReport:
    """Exchange the linear layer or embedding `name`, of whose inputs `stage` tells; the new one is not arranged yet."""
    old = model.get_submodule(name)
    weight, hessian = modules.matrix(old), None if stage is None else stage.hessian
    if stage is not None and stage.hessian is not None and stage.drift is not None:
        weight = made_up(weight, stage.hessian, stage.drift)
    codings, report = coded(weight, name, config, hessian)
    new: BCQModule
    if isinstance(old, nn.Embedding):
        new = BCQEmbedding.from_weights(codings)
        new.output_dtype = old.weight.dtype
    else:
        new = BCQLinear.from_weights(codings, bias=modules.bias_of(old))
    if journal is not None:
        journal.layers.keep(name, {part: x for part, x in new.canonical() if part != "bias"}, asdict(report))
    modules.exchange(model, name, new)
    return report


def _finished_layer(model: PreTrainedModel, name: str, config: BCQConfig, journal: Journal) -> LayerReport:
    """Exchange the layer `name` for the one that the journal has."""
    old = model.get_submodule(name)
    weight: Any = old.weight
    tensors, report = journal.layers.read(name)
    precisions = config.precisions if config.nested_bits else (config.of_module(name).bits,)
    new = modules.empty_like(old, config.of_module(name), precisions)
    for part, tensor in tensors.items():
        setattr(new, part, nn.Parameter(tensor.to(weight.device), requires_grad=False))
    new.require_sound(name)
    if isinstance(new, BCQEmbedding):
        new.output_dtype = weight.dtype
    modules.exchange(model, name, new)
    return LayerReport(**report)


def mark_quantized(model: PreTrainedModel, config: BCQConfig) -> None:
    """Tell transformers that the model is quantized, so that it saves it as such."""
    from mikv.integrations.quantizer.quantizer import BCQQuantizer

    quantizer: Any = BCQQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    quantizer.postprocess_model(model)


def set_bits(model: nn.Module, bits: int) -> None:
    """Read the weights of a model with nested precision with so many bits from now on.

    Raises ConfigError if it has no scales for that.
    """
    nested = [module for module in model.modules() if isinstance(module, BCQModule)]
    if not nested:
        raise ConfigError(f"set_bits({bits}): {type(model).__name__} is not quantized; mikv.quantize does that")
    for module in nested:
        module.set_bits(bits)


def require_plain(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if the model is quantized, or spread over devices or processes."""
    done = getattr(model, "quantization_method", None)
    if done or any(isinstance(module, BCQModule) for module in model.modules()):
        raise UnsupportedModelError(f"the model is quantized already ({done}); quantize the original")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise UnsupportedModelError("the model is spread over several devices; load it with one device_map entry")
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        raise UnsupportedModelError("the model is split over processes; quantize and save it in one process")


@dataclass
class _Work:
    """Goes through a model, one layer at a time."""

    model: PreTrainedModel
    config: BCQConfig
    journal: Journal | None

    def __post_init__(self) -> None:
        self.embeddings: list[str] = []
        self.head: str | None = None
        if self.config.quantize_embeddings:
            head, embedding = modules.require_embeddings(self.model)
            self.embeddings = [embedding]
            self.head = head if modules.is_tied(self.model) else None

    def run(self, names: list[str], chunks: list[Tensor] | None) -> Iterator[LayerReport]:
        """Quantize the layers and the embedding, as the reports are asked for."""
        observed = [*names, self.head] if self.head else names
        done = self._done()
        all_stages: Iterator[Stage | None] = iter([None])
        if set(observed) <= set(done):
            all_stages = iter([Stage([name for name in done if name in observed])])
        elif chunks is not None:
            follow = follows_drift(self.config.method)
            all_stages = stages(self.model, observed, chunks, with_drift=follow, done=done)
        of_head = None
        for stage in all_stages:
            for name in observed if stage is None else stage.names:
                if name == self.head:
                    of_head = stage
                else:
                    yield self._exchange(name, self.config, stage)
            del stage  # the next one is computed before this is let go
        for name in self.embeddings:
            yield self._quantize_embedding(name, of_head)

    def _done(self) -> list[str]:
        """What the journal has, in the order in which it was finished; the output head, if its embedding is there."""
        done = [] if self.journal is None else list(self.journal.layers)
        return [*done, self.head] if self.head and set(self.embeddings) <= set(done) else done

    def _exchange(self, name: str, config: BCQConfig, stage: Stage | None) -> LayerReport:
        if self.journal is not None and name in self.journal.layers:
            report = _finished_layer(self.model, name, config, self.journal)
        else:
            report = self._quantize(name, config, stage)
        new = self.model.get_submodule(name)
        assert isinstance(new, BCQModule)
        new.arrange()
        return report

    def _quantize(self, name: str, config: BCQConfig, stage: Stage | None) -> LayerReport:
        with in_layer(name):
            return quantize_layer(self.model, name, config, stage, self.journal)

    def _quantize_embedding(self, name: str, of_head: Stage | None) -> LayerReport:
        config = self.config
        if of_head is None and needs_hessian(config.method):  # an untied embedding has no inputs to calibrate on
            config = replace(config, method="rtn" if config.of_module(name).uniform else "offset")
        report = self._exchange(name, config, of_head)
        if self.head is not None:
            modules.tie_head(self.model, self.head, name)
        return report


def _set_module_bits(config: BCQConfig, bits: dict[str, int]) -> None:
    """Write the bits of each layer into `config`, beside what module_settings says of it already."""
    for name, own in bits.items():
        if own != config.of_module(name).bits:
            config.module_settings[name] = config.module_settings.get(name, {}) | {"bits": own}


def _ignore(name: str, done: int, total: int) -> None:
    """No one wants to know."""


def _tokenizer_of(model: PreTrainedModel) -> Any:
    from transformers import AutoTokenizer

    source = getattr(model.config, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError("calibration needs the model's tokenizer; pass tokenizer=...") from error
