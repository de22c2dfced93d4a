"""How many bits each layer gets when their average is given: those whose rounding moves predictions most get most.

Sensitivity is measured: one layer at a time is rounded to 2 bits, and the KL divergence of the model's predictions from
the exact ones is its cost. For calibrated methods it is rounded with calibration, which helps some layers much more
than others. With other numbers of bits the cost is taken to change as the error of rounding normal numbers does. Which
widths together cost least is found by mikv.weights.allocation.
"""

from collections.abc import Callable, Iterator, Mapping
from math import ceil, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mikv.errors import ConfigError, NumericsError
from mikv.integrations.quantizer import modules
from mikv.integrations.quantizer.calibrate import stages
from mikv.integrations.quantizer.config import BCQConfig, ModuleSettings
from mikv.integrations.quantizer.journal import Journal
from mikv.weights.allocation import Offer, allocate
from mikv.weights.solve import follows_drift, in_layer, needs_hessian, solve
from mikv.weights.weight import MOST_BITS, num_groups, require_group_size

_PROBE_BITS = 2
_DATA_FREE, _CALIBRATED = "greedy", "gptq-bcq"  # the fastest ones; what counts is how layers compare
_PROBES, _PROBE_TOKENS = 2, 256  # every layer is one pass over them
_CALIBRATION_SHARE = 4  # every fourth chunk
# Mean squared error of normal numbers rounded to the best 2**bits levels (J. Max 1960, table I).
_DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000642}

OnProgress = Callable[[str, int, int], None]
Offers = dict[int, Offer]  # by bits


def require_budget(budget_bits: float, config: BCQConfig, *, calibrated: bool, name: str = "budget_bits") -> None:
    """Raise ConfigError for a budget that goes together with nothing; messages call it `name`."""
    if not calibrated:
        raise ConfigError(f"{name} measures what layers do to predictions, which needs calibration texts; give some")
    if config.nested_bits:
        raise ConfigError(f"{name} and nested precision exclude each other: nested layers have equal bits")
    if not 0 < budget_bits < MOST_BITS:
        raise ConfigError(f"{name} {budget_bits:g} must be between 0 and {MOST_BITS}")


def bits_for_budget(
    model: PreTrainedModel,
    config: BCQConfig,
    budget_bits: float,
    chunks: list[Tensor],
    on_progress: OnProgress = lambda name, done, total: None,
    journal: Journal | None = None,
) -> dict[str, int]:
    """Bits by layer, so that the quantized matrices take at most `budget_bits` per weight, scales included.

    `chunks` are token ids (1, T), of which two pieces are predicted and a quarter calibrated on. Layers whose bits
    `config.module_settings` gives keep them; costs that `journal` has are taken from it, and others go there. The model
    is as before. Raises ConfigError for a budget that no numbers of bits meet and for a layer that no token reaches,
    NumericsError for predictions that are not finite.
    """
    config = config.resolved(calibrated=True)
    modules.fix_skipped(model, config)
    names = modules.linear_names(model, config)
    if config.quantize_embeddings:
        names.append(modules.require_embeddings(model)[1])
    sizes = {name: modules.sizes(model.get_submodule(name)) for name in names}
    settings = {name: config.of_module(name) for name in names}
    fixed = {name for name in names if "bits" in config.module_settings.get(name, {})}
    offers = {
        name: _only(size, settings[name]) if name in fixed else offers_of(size, settings[name], cost=0.0)
        for name, size in sizes.items()
    }
    num_weights = sum(rows * columns for rows, columns in sizes.values())
    _require_enough(offers, num_weights, budget_bits)  # before minutes of measuring
    measured = [name for name in names if name not in fixed]
    known = {} if journal is None else {name: cost for name in measured if (cost := journal.cost(name)) is not None}
    probes = [chunk[:, :_PROBE_TOKENS] for chunk in chunks[:: -(-len(chunks) // _PROBES)]]
    exact = [_log_probabilities(model, probe) for probe in probes] if set(measured) - set(known) else []
    unknown = with_hessians(model, [name for name in measured if name not in known], config, chunks)
    for done, (name, hessian) in enumerate(unknown, start=1 + len(known)):
        known[name] = _cost(model, name, settings[name], hessian, probes, exact)
        if journal is not None:
            journal.keep_cost(name, known[name])
        on_progress(name, done, len(measured))
    offers |= {name: offers_of(sizes[name], settings[name], cost) for name, cost in known.items()}
    return within_budget(offers, num_weights, budget_bits)


def offers_of(size: tuple[int, int], settings: ModuleSettings, cost: float) -> Offers:
    """What a layer (M, K) costs with each number of bits, `cost` being that of 2."""
    return {
        bits: Offer(cost * distortion / _DISTORTION[_PROBE_BITS], num_bytes(size, settings, bits))
        for bits, distortion in _DISTORTION.items()
    }


def num_bytes(size: tuple[int, int], settings: ModuleSettings, bits: int) -> int:
    """All that a coding of (M, K) with so many planes takes, scales and offsets included."""
    rows, columns = size
    groups = num_groups(columns, require_group_size(columns, settings.group_size))
    scales = (1 if settings.uniform else bits) + settings.offset
    return rows * (-(-columns // 8) * bits + 2 * groups * scales)


def within_budget(offers: Mapping[str, Offers], num_weights: int, budget_bits: float) -> dict[str, int]:
    """The bits of each layer that cost least in all. Layers with the same offers get the same: more would be chance."""
    alike: dict[tuple[tuple[int, Offer], ...], list[str]] = {}
    for name, own in offers.items():
        alike.setdefault(tuple(own.items()), []).append(name)
    together = {
        names[0]: {bits: Offer(len(names) * offer.error, len(names) * offer.num_bytes) for bits, offer in own}
        for own, names in alike.items()
    }
    _require_enough(offers, num_weights, budget_bits)
    chosen = allocate(together, _budget_bytes(num_weights, budget_bits))
    first = {name: names[0] for names in alike.values() for name in names}
    return {name: chosen[first[name]] for name in offers}


def _only(size: tuple[int, int], settings: ModuleSettings) -> Offers:
    return {settings.bits: Offer(0.0, num_bytes(size, settings, settings.bits))}


def _budget_bytes(num_weights: int, budget_bits: float) -> int:
    return int(budget_bits * num_weights / 8 + 1e-6)  # a budget that is met exactly is not lost to its rounding


def _require_enough(offers: Mapping[str, Offers], num_weights: int, budget_bits: float) -> None:
    least = sum(min(offer.num_bytes for offer in own.values()) for own in offers.values())
    if least > _budget_bytes(num_weights, budget_bits):
        raise ConfigError(
            f"a budget of {budget_bits:g} bits per weight is less than layers take at the least, with their scales; "
            f"use {ceil(800 * least / num_weights) / 100:.2f} or more, or larger groups"
        )


def with_hessians(
    model: PreTrainedModel, names: list[str], config: BCQConfig, chunks: list[Tensor]
) -> Iterator[tuple[str, Tensor | None]]:
    """All layers, and what the method would know of their inputs; a tied embedding has the output head's."""
    if not needs_hessian(config.method):
        yield from ((name, None) for name in names)
        return
    observed = {name: name for name in names}
    if config.quantize_embeddings:
        head, embedding = modules.require_embeddings(model)
        if embedding in observed:  # else its bits are given
            del observed[embedding]
            if modules.is_tied(model):
                observed[head] = embedding
            else:  # it has no inputs to calibrate on
                yield embedding, None
    drift = follows_drift(config.method)
    for stage in stages(model, list(observed), chunks[::_CALIBRATION_SHARE], with_drift=drift):
        yield from ((observed[name], stage.hessian) for name in stage.names)


def _cost(
    model: PreTrainedModel,
    name: str,
    settings: ModuleSettings,
    hessian: Tensor | None,
    chunks: list[Tensor],
    exact: list[Tensor],
) -> float:
    """KL divergence per token with the layer rounded to 2 bits."""
    module: Any = model.get_submodule(name)
    weight = module.weight.data  # of the parameter, which a tied output head shares
    method = _DATA_FREE if hessian is None else _CALIBRATED
    with in_layer(name):
        rounded = solve(modules.matrix(module), _PROBE_BITS, settings.group_size, method, hessian).dequantize()
    module.weight.data = (rounded.T if isinstance(module, Conv1D) else rounded).to(weight.dtype)
    try:
        found = [_log_probabilities(model, chunk) for chunk in chunks]
    finally:
        module.weight.data = weight
    pairs = zip(found, exact, strict=True)
    total = sum(float(kl_div(x, y, log_target=True, reduction="batchmean")) for x, y in pairs)
    if not isfinite(total):
        raise NumericsError(f"{name}: rounding it makes predictions NaN or infinite; load the model in float32")
    return max(0.0, total / len(chunks))  # rounding can make nothing less than nothing


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Of the next token after each: (T, V) float32."""
    logits: Tensor = model(tokens.to(model.device), use_cache=False).logits[0].float()
    if not bool((logits < torch.inf).all()):
        raise NumericsError("the model's predictions on the calibration text are NaN or infinite; load it in float32")
    return logits.log_softmax(-1)
