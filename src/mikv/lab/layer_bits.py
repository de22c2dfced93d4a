"""Bits by layer: more in the layers where rounding is felt most, fewer where least, in the same bytes.

Knows configurations and numbers; measures nothing itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from mikv.cache.accounting import cache_bytes
from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import CacheGeometry
from mikv.cache.layer_ranges import ranges_of

_WIDER = {"int2": "int3", "int3": "int4", "int4": "int8"}
_NARROWER = {wide: narrow for narrow, wide in _WIDER.items()}
_EDGE_LAYERS = 2
_KL_PER_BIT = 4.0  # the squared error of rounding, to which KL is proportional, is a fourth with each bit

LayerKL = Mapping[int, float]


def uniform_twin(config: MiKVConfig) -> MiKVConfig:
    """The same low tier for every token but the sinks: same transforms, no importance.

    Rounding the sinks too would make it many times worse, which says nothing about importance.
    """
    return replace(config, importance_ratio=0.0, high="int8", min_recent=0, policy="recency", policy_options={})


def is_uniform(config: MiKVConfig) -> bool:
    """Whether the high tier has sinks only, and what does not fill a block yet."""
    return not (config.importance_ratio or config.min_recent)


def with_wide_edges(config: MiKVConfig, geometry: CacheGeometry) -> MiKVConfig:
    """One step wider in the first and last two compressed layers."""
    layers = compressed_layers(config, geometry)
    edges = {*layers[:_EDGE_LAYERS], *layers[-_EDGE_LAYERS:]}
    return replace(config, layer_settings=_settings(edges, _stepped(config, _WIDER)))


def probe(config: MiKVConfig, layer: int, geometry: CacheGeometry) -> MiKVConfig:
    """Only this layer is compressed, uniformly and one step narrower than in `config`."""
    others = tuple(index for index in range(len(geometry.layers)) if index != layer)
    return replace(uniform_twin(config), **_stepped(config, _NARROWER), skip_layers=others)


def by_sensitivity(config: MiKVConfig, kl: LayerKL, geometry: CacheGeometry, num_tokens: int) -> MiKVConfig | None:
    """The layers most sensitive by the KL of their `probe` one step wider, the least sensitive ones one narrower.

    As many as let the predicted sum of KL be least, in at most the bytes of `config` at `num_tokens`; a greedy choice.
    None if nothing is gained: then `config` itself is best.
    """
    wider, narrower = (replace(config, **_stepped(config, steps)) for steps in (_WIDER, _NARROWER))
    small, middle, large = (cache_bytes(c, geometry, num_tokens).bytes for c in (narrower, config, wider))
    if small == middle or large == middle:
        return None
    wide_error, error = (_error(c, narrower) for c in (wider, config))
    order = sorted(kl, key=lambda layer: -kl[layer])
    best, least = None, sum(kl.values()) * error
    for raised in range(1, len(order)):
        lowered = ceil(raised * (large - middle) / (middle - small))
        if raised + lowered > len(order):
            break
        top, between, bottom = order[:raised], order[raised:-lowered], order[-lowered:]
        of_top, of_others, of_bottom = (sum(kl[layer] for layer in layers) for layers in (top, between, bottom))
        predicted = of_top * wide_error + of_others * error + of_bottom
        if predicted < least:
            best, least = (top, bottom), predicted
    if best is None:
        return None
    settings = _settings(best[0], _stepped(config, _WIDER)) | _settings(best[1], _stepped(config, _NARROWER))
    return replace(config, layer_settings=settings)


def compressed_layers(config: MiKVConfig, geometry: CacheGeometry) -> list[int]:
    """The layers that are compressed, ascending."""
    return [i for i, layer in enumerate(geometry.layers) if layer.is_compressible and i not in config.skip_layers]


def _stepped(config: MiKVConfig, steps: Mapping[str, str]) -> dict[str, Any]:
    """The low tier's formats a step further, the last ones as they are."""
    return {name: steps.get(getattr(config, name), getattr(config, name)) for name in ("low_k", "low_v")}


def _settings(layers: Iterable[int], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {text: dict(settings) for text in ranges_of(layers)}


def _error(config: MiKVConfig, reference: MiKVConfig) -> float:
    """The KL that rounding to the low tier of `config` gives, relative to that of `reference`."""
    return _KL_PER_BIT ** (_mean_bits(reference) - _mean_bits(config))


def _mean_bits(config: MiKVConfig) -> float:
    return (int(config.low_k.removeprefix("int")) + int(config.low_v.removeprefix("int"))) / 2
