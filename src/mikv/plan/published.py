"""Latencies of LUT-GEMM (arXiv 2206.09557v4, ICLR 2024) on A100-80 and what this planner says of the same.

Batch 1, FasterTransformer. The length of the context is not given; it is taken to be short.
"""

from dataclasses import dataclass

from mikv.plan.cache_formats import parse_cache_format
from mikv.plan.constants import GPU
from mikv.plan.deployment import Deployment
from mikv.plan.hardware import GPUS
from mikv.plan.models import model_shape
from mikv.plan.plan import Plan, plan
from mikv.plan.weight_formats import WeightFormat, parse_weights

_CONTEXT = 32

# ms per token by number of GPUs; None: out of memory. Group sizes None: one scale per row and plane.
_TABLE_4: dict[str, dict[int, float | None]] = {
    "fp16": {1: None, 2: None, 4: None, 8: 42.4},
    "int3": {1: 106.5},
    "bcq1": {1: 30.4, 2: 25.2, 4: 20.3, 8: 20.1},
    "bcq2": {1: 40.1, 2: 30.1, 4: 23.8, 8: 22.4},
    "bcq3": {1: 51.6, 2: 35.8, 4: 27.2, 8: 24.2},
    "bcq4": {1: None, 2: 41.2, 4: 30.1, 8: 25.8},
}
_TABLE_3: dict[str, dict[str, dict[int, float | None]]] = {
    "llama-30b": {
        "fp16": {1: 43.6, 2: 25.1, 4: 16.9},
        "bcq4": {1: 20.7, 2: 15.5, 4: 12.2},
        "bcq3": {1: 18.1, 2: 13.7, 4: 11.2},
    },
    "llama-65b": {
        "fp16": {1: None, 2: 46.9, 4: 29.1},
        "bcq4": {1: 35.7, 2: 25.4, 4: 19.9},
        "bcq3": {1: 31.3, 2: 23.0, 4: 18.3},
    },
}
_TABLE_6: dict[int, float | None] = {1: 40.5, 2: 23.5, 4: 14.7}


@dataclass(frozen=True)
class Published:
    """One number of the paper, ms per token; None is out of memory. `is_fitted`: constants were fitted to it too."""

    table: str
    model: str
    weights: WeightFormat
    gpus: int
    milliseconds: float | None
    is_fitted: bool = True

    def estimate(self) -> Plan:
        """The plan for the same."""
        return plan(paper_deployment(self.model, self.weights), self.gpus)

    @property
    def error(self) -> float | None:
        """Relative, of the estimate; None where both or one say that it does not fit."""
        step = self.estimate().step
        return None if step is None or self.milliseconds is None else 1e3 * step.total / self.milliseconds - 1

    @property
    def agrees_on_memory(self) -> bool:
        """Whether both say that it fits, or both that it does not."""
        return self.estimate().fits == (self.milliseconds is not None)


def paper_deployment(model: str, weights: WeightFormat) -> Deployment:
    """One sequence with a short context on A100-80."""
    return Deployment(model_shape(model), GPUS["a100-80"], weights, parse_cache_format("full"), GPU, context=_CONTEXT)


def published_rows() -> tuple[Published, ...]:
    """Tables 4, 3 and 6 in this order."""
    rows = [
        Published("4", "opt-175b", parse_weights(weights, None), gpus, ms, is_fitted=weights != "int3")
        for weights, by_gpus in _TABLE_4.items()
        for gpus, ms in by_gpus.items()
    ]
    rows += [
        Published("3", model, parse_weights(weights, 128), gpus, ms)
        for model, by_weights in _TABLE_3.items()
        for weights, by_gpus in by_weights.items()
        for gpus, ms in by_gpus.items()
    ]
    rows += [
        Published("6", "opt-30b", parse_weights("fp16", None), gpus, ms, is_fitted=False)
        for gpus, ms in _TABLE_6.items()
    ]
    return tuple(rows)
