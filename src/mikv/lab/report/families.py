"""Kinds of caches: what a name belongs to, in which color it is drawn, and each method's shape. The same everywhere."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """Caches of one way to work: names that match `pattern`; markers of plotly, matplotlib and plain text."""

    name: str
    pattern: str
    symbol: str
    marker: str
    glyph: str


@dataclass(frozen=True)
class Family:
    """Methods of a kind, and their color by theme."""

    name: str
    light: str
    dark: str
    methods: tuple[Method, ...]


def _family(name: str, light: str, dark: str, pattern: str, symbol: str, marker: str, glyph: str) -> Family:
    """A family of one method."""
    return Family(name, light, dark, (Method(name, pattern, symbol, marker, glyph),))


_OWN = "mikv:.*"
FULL = _family("full", "#24292f", "#e6e8eb", "full", "line-ew", "_", "—")
MIKV = _family("mikv", "#0b7a5b", "#3ecf9d", _OWN, "circle", "o", "●")
# what mikv does with its settings that is another method
ONE_PRECISION = _family("one precision, mikv's transforms", "#7a6a00", "#d8c64a", _OWN, "hexagon2", "h", "⬢")
EVICTION = Family(
    "eviction",
    "#c43a4b",
    "#ff8593",
    (
        Method("h2o", "h2o@.*", "x", "X", "✕"),
        Method("snapkv", "snapkv@.*", "star", "*", "★"),
        Method("streaming", "streaming@.*", "cross", "P", "✚"),
        Method("kvpress", "kvpress:.*", "hourglass", "d", "⧗"),
        Method("mikv, dropping", _OWN, "circle-x", "8", "⊗"),
    ),
)
FAMILIES = (
    MIKV,
    ONE_PRECISION,
    _family("uniform", "#6e7781", "#a8b1ba", r"int\d", "square", "s", "■"),
    _family("kivi", "#2166ac", "#6cb2f5", r"kivi\d", "diamond", "D", "◆"),
    Family(
        "zipcache, turboquant",
        "#7b4fb3",
        "#bd9cf2",
        (
            Method("zipcache", "zipcache", "triangle-up", "^", "▲"),
            Method("turboquant", "turboquant.*", "triangle-left", "<", "◀"),
        ),
    ),
    Family(
        "transformers",
        "#b7730a",
        "#f0b64a",
        (
            Method("quanto", r"quanto\d", "triangle-down", "v", "▼"),
            Method("hqq", r"hqq\d", "triangle-right", ">", "▶"),
            Method("fp8", "fp8", "pentagon", "p", "⬟"),
        ),
    ),
    EVICTION,
    FULL,
)
OTHER = _family("other", "#8a6d5a", "#c9ab97", ".*", "bowtie", "H", "⋈")


def family_of(cache: str, config: Mapping[str, Any] | None = None) -> Family:
    """The family of a cache by its name, and by its settings, which a name with a file in it does not tell."""
    if re.fullmatch(_OWN, cache):
        if _has(cache, config, "low_k", "drop"):
            return EVICTION
        if _has(cache, config, "importance_ratio", 0):
            return ONE_PRECISION
    return next((family for family in FAMILIES if _method(family, cache) is not None), OTHER)


def method_of(cache: str, config: Mapping[str, Any] | None = None) -> Method:
    """The method of a cache within its family."""
    found = _method(family_of(cache, config), cache)
    assert found is not None, cache
    return found


def _method(family: Family, cache: str) -> Method | None:
    return next((one for one in family.methods if re.fullmatch(one.pattern, cache)), None)


def _has(cache: str, config: Mapping[str, Any] | None, setting: str, value: str | float) -> bool:
    if config is not None:
        return bool(config.get(setting) == value)
    return re.search(rf"\+{setting.removesuffix('_k')}(_k)?={value}(\.0*)?(\+|$)", cache) is not None
