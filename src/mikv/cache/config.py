"""What a cache does, as one frozen value: `MiKVConfig` and the named presets."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, asdict, dataclass, field, fields
from math import ceil
from pathlib import Path
from typing import Any, Self

from mikv.cache.layer_ranges import range_of_each, require_disjoint
from mikv.cache.settings import is_count, is_share, is_span, merged, require_count, tuple_of
from mikv.choices import did_you_mean, require_one_of, shown
from mikv.errors import ConfigError

logger = logging.getLogger("mikv")

HIGH_FORMATS = ("exact", "fp16", "int8", "int4", "int3", "int2")
LOW_FORMATS = ("int8", "int4", "int3", "int2", "drop")
HIGH_GRIDS = ("lloyd-max", "uniform", "group")
LOW_GRIDS = ("lloyd-max", "uniform", "group", "channel")
KEY_ROUNDINGS = ("feedback", "nearest")
_OF_THE_WHOLE_CACHE = ("layer_settings", "skip_layers", "protected", "warmup_tokens")


@dataclass(frozen=True)
class MiKVConfig:
    """Settings of a mixed-precision KV cache. The defaults are the preset `balanced`.

    importance_ratio  share of tokens in the high tier, 0 to 1
    high              format of the high tier: exact (the model's dtype), fp16, int8, int4, int3, int2
    low_k, low_v      formats of keys and values in the low tier: int8, int4, int3, int2; drop (both) evicts instead
    low               sets low_k and low_v at once
    high_grid         lloyd-max | uniform (one scale per token) | group (per-token groups with zero-points, the paper)
    low_grid          the same, or channel (keys per channel over 32 tokens, values in groups: KIVI)
    group_size        channels per group on the group grid; None is half the head dim (the paper)
    center_keys, balance_keys, hadamard_keys, center_values, hadamard_values
                      transforms of what is quantized, each exact (mikv.transforms)
    balancer_exponents  (query, key) exponents of the channel balancer; (0.5, 0.5) is Eq. 2 of the paper
    key_rounding      feedback | nearest: whether the channels of a low key make up for each other's errors in the
                      metric of the prompt's queries; 2 to 4 bits on the grids lloyd-max and uniform, else nearest
    policy            importance policy by name (mikv.cache.policies), policy_options are its arguments
    recent_share      share of the high tier reserved for the newest tokens
    min_recent        at least this many newest tokens stay high, whatever the ratio; also what `crop` can undo
    sinks             this many first tokens are never demoted
    protected         token ranges ((start, stop), ...) of each row that are never demoted; padding is not counted
    warmup_tokens     tokens are kept exact until this many are there to fit the transforms on
    skip_layers       layers that stay uncompressed
    layer_settings    settings of single layers, as {"0": {"low_k": "int8"}, "1-3": {...}, "-1": {...}}: ranges have
                      both ends, negative numbers count from the last; not skip_layers, protected, warmup_tokens

    Frozen; impossible values raise ConfigError, and so do unknown settings in files; `to_json`/`from_json` round-trip.
    Source: arXiv 2402.18096 for the structure, docs/LOG.md for the defaults.
    """

    importance_ratio: float = 0.07
    high: str = "int8"
    low_k: str = "int4"
    low_v: str = "int3"
    low: InitVar[str | None] = None
    high_grid: str = "lloyd-max"
    low_grid: str = "lloyd-max"
    group_size: int | None = None
    center_keys: bool = True
    balance_keys: bool = True
    hadamard_keys: bool = True
    center_values: bool = True
    hadamard_values: bool = True
    balancer_exponents: tuple[float, float] = (0.5, 0.5)
    key_rounding: str = "feedback"
    policy: str = "normalized"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    recent_share: float = 0.5
    min_recent: int = 32
    sinks: int = 4
    protected: tuple[tuple[int, int], ...] = ()
    warmup_tokens: int = 64
    skip_layers: tuple[int, ...] = ()
    layer_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self, low: str | None) -> None:
        if low is not None:
            object.__setattr__(self, "low_k", low)
            object.__setattr__(self, "low_v", low)
        self._check_choices()
        self._check_numbers()
        self._check_sequences()
        self._check_policy()
        self._check_layer_settings()

    def _check_choices(self) -> None:
        require_one_of("high", self.high, HIGH_FORMATS)
        require_one_of("low_k", self.low_k, LOW_FORMATS)
        require_one_of("low_v", self.low_v, LOW_FORMATS)
        require_one_of("high_grid", self.high_grid, HIGH_GRIDS)
        require_one_of("low_grid", self.low_grid, LOW_GRIDS)
        require_one_of("key_rounding", self.key_rounding, KEY_ROUNDINGS)
        if (self.low_k == "drop") != (self.low_v == "drop"):
            raise ConfigError(
                f"low_k={self.low_k!r} with low_v={self.low_v!r}: a token is dropped with both its key and its value; "
                "use low='drop'"
            )
        for name in ("center_keys", "balance_keys", "hadamard_keys", "center_values", "hadamard_values"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={shown(getattr(self, name))} must be True or False")

    def _check_numbers(self) -> None:
        for name in ("importance_ratio", "recent_share"):
            if not is_share(getattr(self, name)):
                raise ConfigError(f"{name}={shown(getattr(self, name))} must be a number between 0 and 1")
        for name in ("min_recent", "sinks", "warmup_tokens"):
            require_count(name, getattr(self, name))
        if self.group_size is not None and not (is_count(self.group_size) and self.group_size):
            raise ConfigError(
                f"group_size={shown(self.group_size)} must be a positive whole number of channels, or None"
            )

    def _check_sequences(self) -> None:
        """Lists, as JSON has them, become tuples; spans are merged and ascend."""
        exponents = tuple_of("balancer_exponents", self.balancer_exponents, is_share, "two numbers between 0 and 1")
        if len(exponents) != 2:
            raise ConfigError(f"balancer_exponents={shown(exponents)} must be two numbers between 0 and 1")
        spans = tuple_of("protected", self.protected, is_span, "a list of (start, stop) with 0 <= start < stop")
        skipped = tuple_of("skip_layers", self.skip_layers, is_count, "a list of layer numbers, 0 or more")
        object.__setattr__(self, "balancer_exponents", exponents)
        object.__setattr__(self, "protected", merged(spans))
        object.__setattr__(self, "skip_layers", skipped)

    def _check_policy(self) -> None:
        from mikv.cache.policies import make_policy  # PyTorch is not imported before a configuration is made

        if not isinstance(self.policy_options, Mapping):
            raise ConfigError(f"policy_options={shown(self.policy_options)} must be a mapping of names to values")
        object.__setattr__(self, "policy_options", dict(self.policy_options))
        make_policy(self.policy, self.policy_options)

    def _check_layer_settings(self) -> None:
        by_range = self.layer_settings
        if not isinstance(by_range, Mapping) or not all(isinstance(value, Mapping) for value in by_range.values()):
            raise ConfigError(
                f'layer_settings={shown(by_range)} must map layers to settings: {{"0": {{"low": "int8"}}}}'
            )
        object.__setattr__(self, "layer_settings", {key: dict(value) for key, value in by_range.items()})
        with _naming("layer_settings"):
            require_disjoint(by_range)
        for layers in by_range:
            self._with_settings_of(layers)

    @property
    def keeps_everything_exact(self) -> bool:
        """True if no token is ever rounded or dropped: the cache is the full cache."""
        return self.importance_ratio >= 1 and self.high == "exact"

    @property
    def drops_tokens(self) -> bool:
        """True for the eviction baseline."""
        return self.low_k == "drop"

    @property
    def has_feedback(self) -> bool:
        """Whether low keys are rounded with feedback."""
        can = self.low_k in ("int4", "int3", "int2") and self.low_grid in ("lloyd-max", "uniform")
        return can and self.key_rounding == "feedback" and not self.keeps_everything_exact

    def high_budget(self, num_tokens: int) -> int:
        """Tokens that belong to the high tier when `num_tokens` are cached, not counting `protected`."""
        return min(num_tokens, max(ceil(self.importance_ratio * num_tokens), self.sinks + self.min_recent))

    def recent_window(self, num_tokens: int) -> int:
        """Newest tokens that are never demoted when `num_tokens` are cached."""
        return max(self.min_recent, int(self.recent_share * self.high_budget(num_tokens)))

    def for_layer(self, index: int, num_layers: int) -> Self:
        """What holds for layer `index` of a model of `num_layers`: no `layer_settings` are left.

        Raises ConfigError if `layer_settings` name a layer that the model does not have, or one twice.
        """
        if not self.layer_settings:
            return self
        with _naming("layer_settings"):
            by_layer = range_of_each(self.layer_settings, num_layers)
        return self._with_settings_of(by_layer.get(index))

    def _with_settings_of(self, layers: str | None) -> Self:
        """The configuration of those layers; None are all that are not named."""
        changes = {} if layers is None else dict(self.layer_settings[layers])
        with _naming(f"layer_settings of {layers!r}"):
            if refused := [name for name in _OF_THE_WHOLE_CACHE if name in changes]:
                raise ConfigError(f"{refused[0]!r} is not a setting of single layers")
            common = {f.name: getattr(self, f.name) for f in fields(self)} | {"layer_settings": {}}
            return self.from_dict(common | changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON types."""
        return json.loads(json.dumps(asdict(self)))

    def to_json(self) -> str:
        """All settings as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises ConfigError naming any setting that does not exist."""
        known = {f.name for f in fields(cls)} | {"low"}
        if not isinstance(settings, Mapping):
            raise ConfigError(f"the settings must be a mapping of names to values, got {shown(settings)}")
        if unknown := sorted((name for name in settings if name not in known), key=shown):
            near = did_you_mean(unknown[0], known)
            raise ConfigError(f"unknown setting {shown(unknown[0])}; the settings are {', '.join(sorted(known))}{near}")
        return cls(**settings)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises ConfigError if `text` is not one JSON object of known settings."""
        try:
            settings = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of more than 4,300 digits, and deep nesting
            raise ConfigError(f"the configuration is not valid JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"the configuration must be a JSON object, got {type(settings).__name__}")
        return cls.from_dict(settings)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a configuration written with `to_json`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the configuration {path} is not text: {error}") from error
        return cls.from_json(text)

    @classmethod
    def preset(cls, name: str) -> Self:
        """A named preset: paper-int2 | paper-int3 | paper-int4 | lossless | balanced | small."""
        if not isinstance(name, str) or name not in PRESETS:
            near = did_you_mean(name, PRESETS)
            raise ConfigError(f"unknown preset {shown(name)}; the presets are {', '.join(PRESETS)}{near}")
        return cls(**PRESETS[name])

    @classmethod
    def for_budget(cls, budget: float, model_config: Any, num_tokens: int = 4096) -> Self:
        """The best preset that takes at most `budget` of the fp16 bytes of `model_config`'s cache at `num_tokens`.

        `model_config` is a transformers configuration, `num_tokens` the length the cache will have: prompt and answer.
        All bytes count, those of layers that stay uncompressed too. A logged line names the preset that it is.
        Raises ConfigError naming the smallest preset if none fits, UnsupportedModelError.
        """
        from mikv.cache.budget import choose_preset

        choice = choose_preset(budget, model_config, num_tokens)
        logger.warning("%s", choice)
        return cls.preset(choice.preset)


_PAPER: dict[str, Any] = {
    "importance_ratio": 0.2,
    "high": "fp16",
    "high_grid": "group",
    "low_grid": "group",
    "center_keys": False,
    "hadamard_keys": False,
    "center_values": False,
    "hadamard_values": False,
    "key_rounding": "nearest",
    "policy": "h2o",
    "min_recent": 0,
    "sinks": 0,
}

# The paper's recipe: r = .2, FP16 over INT2/3/4 in groups of D/2, H2O with half of the tier recent, balancer on keys.
# The others are the best of the committed sweep at their bytes (docs/results/sweep.md).
PRESETS: dict[str, dict[str, Any]] = {
    "paper-int2": _PAPER | {"low": "int2"},
    "paper-int3": _PAPER | {"low": "int3"},
    "paper-int4": _PAPER | {"low": "int4"},
    "lossless": {"importance_ratio": 0.18, "high": "int8", "low_k": "int4", "low_v": "int4"},
    "balanced": {"importance_ratio": 0.07, "high": "int8", "low_k": "int4", "low_v": "int3"},
    "small": {"importance_ratio": 0.04, "high": "int8", "low_k": "int3", "low_v": "int2"},
}
BEST_FIRST = ("lossless", "balanced", "small")


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say of a ConfigError what it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
