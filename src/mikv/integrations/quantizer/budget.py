"""How many bits each layer gets when their average is given: those whose rounding moves predictions most get most.

Sensitivity is measured: one layer at a time is rounded to 2 bits, and the KL divergence of the model's predictions from
the exact ones is its cost. With other numbers of bits the cost is taken to change as the error of rounding normal
numbers does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mikv.errors import ConfigError
from mikv.integrations.quantizer import modules
from mikv.integrations.quantizer.config import BCQConfig, ModuleSettings
from mikv.weights.solve import solve
from mikv.weights.weight import num_groups, require_group_size

_PROBE_BITS, _PROBE_METHOD = 2, "greedy"  # the fastest one; what counts is how layers compare
# Mean squared error of normal numbers rounded to the best 2**bits levels (J. Max 1960, table I).
_DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000642}

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Matrix:
    """A layer's size, and what rounding it to 2 bits costs."""

    rows: int
    columns: int
    cost: float

    def num_bits(self, settings: ModuleSettings, bits: int) -> int:
        """All that a coding with so many planes takes, scales and offsets included."""
        groups = num_groups(self.columns, require_group_size(self.columns, settings.group_size))
        scales = (1 if settings.uniform else bits) + settings.offset
        return self.rows * (8 * -(-self.columns // 8) * bits + 16 * groups * scales)


def bits_for_budget(
    model: PreTrainedModel,
    config: BCQConfig,
    budget_bits: float,
    chunks: list[Tensor],
    on_progress: OnProgress = lambda name, done, total: None,
) -> dict[str, int]:
    """Bits by layer, so that the quantized matrices take `budget_bits` per weight on average, scales included.

    `chunks` are token ids (1, T) on which sensitivity is measured. The model is as before. Raises ConfigError for a
    budget that no numbers of bits meet.
    """
    config = config.resolved(calibrated=True)
    modules.fix_skipped(model, config)
    names = modules.linear_names(model, config)
    if config.quantize_embeddings:
        names.append(modules.require_embeddings(model)[1])
    shapes = {name: Matrix(*modules.sizes(model.get_submodule(name)), cost=0.0) for name in names}
    settings = {name: config.of_module(name) for name in names}
    allocate(shapes, settings, budget_bits)  # refuses what cannot be before minutes of measuring
    exact = [_log_probabilities(model, chunk) for chunk in chunks]
    costs = {}
    for done, name in enumerate(names, start=1):
        costs[name] = _cost(model, name, settings[name], chunks, exact)
        on_progress(name, done, len(names))
    matrices = {name: Matrix(shape.rows, shape.columns, costs[name]) for name, shape in shapes.items()}
    return allocate(matrices, settings, budget_bits)


def allocate(
    matrices: Mapping[str, Matrix], settings: Mapping[str, ModuleSettings], budget_bits: float
) -> dict[str, int]:
    """2 bits for every layer, then one more where it saves most per bit, as long as the budget lasts."""
    fewest, most = min(_DISTORTION), max(_DISTORTION)
    budget = budget_bits * sum(matrix.rows * matrix.columns for matrix in matrices.values())
    bits = dict.fromkeys(matrices, fewest)
    left = budget - sum(matrix.num_bits(settings[name], fewest) for name, matrix in matrices.items())
    if left < 0:
        least = ceil(100 * budget_bits * (budget - left) / budget) / 100
        raise ConfigError(
            f"a budget of {budget_bits:g} bits per weight is less than {fewest} bits take with their scales; use "
            f"{least:.2f} or more, or larger groups"
        )

    def gain(name: str) -> float:
        saved = matrices[name].cost * (_DISTORTION[bits[name]] - _DISTORTION[bits[name] + 1])
        return saved / price(name)

    def price(name: str) -> int:
        matrix = matrices[name]
        return matrix.num_bits(settings[name], bits[name] + 1) - matrix.num_bits(settings[name], bits[name])

    while affordable := [name for name in bits if bits[name] < most and price(name) <= left]:
        best = max(affordable, key=gain)
        left -= price(best)
        bits[best] += 1
    return bits


def _cost(
    model: PreTrainedModel, name: str, settings: ModuleSettings, chunks: list[Tensor], exact: list[Tensor]
) -> float:
    """KL divergence per token with the layer rounded to 2 bits."""
    module: Any = model.get_submodule(name)
    weight = module.weight.data  # of the parameter, which a tied output head shares
    rounded = solve(modules.matrix(module), _PROBE_BITS, settings.group_size, _PROBE_METHOD).dequantize()
    module.weight.data = (rounded.T if isinstance(module, Conv1D) else rounded).to(weight.dtype)
    try:
        found = [_log_probabilities(model, chunk) for chunk in chunks]
    finally:
        module.weight.data = weight
    pairs = zip(found, exact, strict=True)
    return sum(float(kl_div(x, y, log_target=True, reduction="batchmean")) for x, y in pairs) / len(chunks)


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Of the next token after each: (T, V) float32."""
    return model(tokens.to(model.device), use_cache=False).logits[0].float().log_softmax(-1)
