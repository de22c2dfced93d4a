"""What the options of `mikv plan` ask for, as Deployments. Everything is checked before this machine is measured."""

from dataclasses import dataclass, replace
from typing import Any

from mikv.errors import ConfigError
from mikv.plan.cache_formats import CacheFormat, parse_cache_format
from mikv.plan.deployment import Deployment
from mikv.plan.hardware import THIS, Hardware, named_hardware
from mikv.plan.models import model_shape
from mikv.plan.plan import Plan, plan
from mikv.plan.shapes import ModelShape
from mikv.plan.weight_formats import WeightFormat, float_format, parse_group_size, parse_weights

_GROUP_SIZE = 128
_MOST_WATTS = 1_000_000
_FP16 = parse_weights("fp16", None)


@dataclass(frozen=True)
class Request:
    """The options by name; None is not given."""

    model: str
    hardware: str = THIS
    gpus: int | None = None
    weights: str | None = None
    group_size: str | None = None
    cache: str = "full"
    batch: int = 1
    context: int = 2048
    compare: str | None = None
    quantize_embeddings: bool = False
    efficiency: str | None = None
    watts: float | None = None

    def plans(self) -> tuple[Plan, ...]:
        """One for each option of --compare, or one. Raises ConfigError, ModelNotFoundError, UnsupportedModelError."""
        placeholder = self._known_hardware()
        shape = model_shape(self.model)
        # built once on a device that need not be measured, so that what cannot be asked is refused before
        drafts = [self._deployment(shape, placeholder, *option) for option in self._options(shape, placeholder)]
        if self.gpus is not None:
            drafts[0].require_degree(self.gpus)
        device = placeholder if self.hardware != THIS else self._measured()
        return tuple(plan(replace(draft, hardware=device), self.gpus) for draft in drafts)

    def facts(self, device: Hardware) -> dict[str, Any]:
        """What holds for all plans, as JSON types."""
        constants = device.constants.overridden(self.efficiency)
        return {
            "model": self.model,
            "hardware": device.name,
            "device": device.title,
            "memory_bytes_per_gpu": device.memory_bytes,
            "gbps": device.bandwidth / 1e9,
            "tflops": device.flops / 1e12,
            "watts": device.watts,
            "batch": self.batch,
            "context": self.context,
            "estimate": True,
            "constants": {name: vars(constant) for name, constant in constants.items()},
        }

    def _known_hardware(self) -> Hardware:
        if self.watts is not None and not 0 < self.watts <= _MOST_WATTS:
            raise ConfigError(f"--watts {self.watts:g} must be more than 0, and at most {_MOST_WATTS:,}")
        if self.hardware == THIS:
            return Hardware(THIS, "this machine", 1, 1, 1, 0, self.watts, most=1, is_cpu=True)
        gpu = named_hardware(self.hardware)
        return gpu if self.watts is None else replace(gpu, watts=self.watts)

    def _measured(self) -> Hardware:
        from mikv.plan.probe import this_machine

        return replace(this_machine(), watts=self.watts)

    def _options(self, shape: ModelShape, device: Hardware) -> list[tuple[WeightFormat, CacheFormat]]:
        if self.compare is None:
            return [(self._weights(shape, device, self.weights), parse_cache_format(self.cache))]
        if self.weights is not None:
            raise ConfigError("--weights and --compare exclude each other; name the weights in --compare")
        found = []
        for option in filter(None, (part.strip() for part in self.compare.split(","))):
            weights, _, cache = option.partition("+")
            found.append((self._weights(shape, device, weights), parse_cache_format(cache or self.cache)))
        if not found:
            raise ConfigError(f"--compare {self.compare!r} names nothing; for example --compare fp16,bcq3+balanced")
        return found

    def _weights(self, shape: ModelShape, device: Hardware, name: str | None) -> WeightFormat:
        group_size = parse_group_size(self.group_size) if self.group_size is not None else _GROUP_SIZE
        if name is not None:
            return parse_weights(name, group_size)
        if shape.quantization is not None:
            from mikv.plan.quantized import stored_format

            return stored_format(shape)
        return float_format(shape.dtype) if device.is_cpu else _FP16

    def _deployment(self, shape: ModelShape, device: Hardware, weights: WeightFormat, cache: CacheFormat) -> Deployment:
        constants = device.constants.overridden(self.efficiency)
        embeddings = self.quantize_embeddings or self._has_quantized_embeddings(shape)
        return Deployment(shape, device, weights, cache, constants, self.batch, self.context, embeddings)

    def _has_quantized_embeddings(self, shape: ModelShape) -> bool:
        """Of the checkpoint itself, if its own weights are planned with."""
        if self.weights is not None or self.compare is not None or shape.quantization is None:
            return False
        from mikv.plan.quantized import has_quantized_embeddings

        return has_quantized_embeddings(shape)
