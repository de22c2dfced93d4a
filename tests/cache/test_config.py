"""MiKVConfig: what it accepts, what it says when it does not, and how it is written down."""

import contextlib
import json
import math
import time
from collections import OrderedDict
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from transformers import LlamaConfig, MambaConfig

from layers import filled, random_tokens
from mikv.cache.accounting import cache_bytes
from mikv.cache.config import (
    BEST_FIRST,
    HIGH_FORMATS,
    HIGH_GRIDS,
    LOW_FORMATS,
    LOW_GRIDS,
    PRESETS,
    MiKVConfig,
)
from mikv.cache.geometry import CacheGeometry
from mikv.cache.layer_ranges import range_of_each, ranges_of
from mikv.cache.partition import protected_tokens
from mikv.errors import ConfigError, UnsupportedModelError

LLAMA = SimpleNamespace(
    model_type="llama",
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    hidden_size=8 * 64,
    dtype="bfloat16",
)
POLICIES = {
    "h2o": {},
    "normalized": {},
    "far": {"distance": 16},
    "window": {"window": 16, "pool": 5},
    "random": {"seed": 3},
    "key_norm": {},
}


@st.composite
def configurations(draw: DrawFn) -> MiKVConfig:
    """Any valid configuration."""
    shares = st.floats(0, 1) | st.sampled_from([0, 1])
    counts = st.integers(0, 1000)
    low = draw(st.sampled_from(LOW_FORMATS))
    low_v = low if low == "drop" else draw(st.sampled_from([name for name in LOW_FORMATS if name != "drop"]))
    policy = draw(st.sampled_from(list(POLICIES)))
    spans = st.tuples(st.integers(0, 500), st.integers(1, 500)).map(lambda span: (span[0], span[0] + span[1]))
    switches = ("center_keys", "balance_keys", "hadamard_keys", "center_values", "hadamard_values")
    return MiKVConfig(
        importance_ratio=draw(shares),
        high=draw(st.sampled_from(HIGH_FORMATS)),
        low_k=low,
        low_v=low_v,
        high_grid=draw(st.sampled_from(HIGH_GRIDS)),
        low_grid=draw(st.sampled_from(LOW_GRIDS)),
        group_size=draw(st.none() | st.integers(1, 256)),
        balancer_exponents=draw(st.tuples(shares, shares)),
        policy=policy,
        policy_options=draw(st.sampled_from([{}, POLICIES[policy]])),
        recent_share=draw(shares),
        min_recent=draw(counts),
        sinks=draw(counts),
        protected=tuple(draw(st.lists(spans, max_size=3))),
        warmup_tokens=draw(counts),
        skip_layers=tuple(draw(st.lists(st.integers(0, 40), max_size=3))),
        layer_settings=draw(st.sampled_from([{}, {"0": {"low": "int8"}, "1-3": {"importance_ratio": 0.5}, "-1": {}}])),
        **{name: draw(st.booleans()) for name in switches},
    )


# --- written down and read back ---------------------------------------------------------------------------------------


@given(configurations())
def test_json_round_trip(config: MiKVConfig) -> None:
    assert MiKVConfig.from_json(config.to_json()) == config
    assert MiKVConfig.from_dict(config.to_dict()) == config


@given(configurations())
def test_to_dict_is_plain_json(config: MiKVConfig) -> None:
    settings = config.to_dict()
    assert json.loads(json.dumps(settings)) == settings
    assert set(settings) == {field.name for field in fields(MiKVConfig)}


@given(configurations())
def test_repr_says_everything_that_was_set(config: MiKVConfig) -> None:
    assert eval(repr(config)) == config


def test_a_file_is_read_back(tmp_path: Path) -> None:
    config = MiKVConfig(low="int2", protected=((3, 9),), policy="random", policy_options={"seed": 7})
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert MiKVConfig.from_file(path) == config


@pytest.mark.parametrize("mapping", [MappingProxyType({"seed": 3}), OrderedDict(seed=3)])
def test_policy_options_may_be_any_mapping(mapping: object) -> None:
    config = MiKVConfig(policy="random", policy_options=mapping)  # type: ignore[arg-type]
    assert MiKVConfig.from_json(config.to_json()) == MiKVConfig(policy="random", policy_options={"seed": 3})


def test_policy_options_are_a_copy() -> None:
    options = {"seed": 3}
    config = MiKVConfig(policy="random", policy_options=options)
    options["seed"] = 4
    assert config.policy_options == {"seed": 3}


def test_lists_become_tuples() -> None:
    config = MiKVConfig(protected=[[0, 5]], skip_layers=[1], balancer_exponents=[0.25, 0.75])  # type: ignore[arg-type]
    assert config == MiKVConfig(protected=((0, 5),), skip_layers=(1,), balancer_exponents=(0.25, 0.75))


# --- options that stand for others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", LOW_FORMATS)
def test_low_sets_keys_and_values(low: str) -> None:
    config = MiKVConfig(low=low)
    assert (config.low_k, config.low_v) == (low, low)
    assert MiKVConfig.from_dict({"low": low}) == config
    assert "low" not in config.to_dict()


def test_replace_keeps_what_low_set() -> None:
    config = replace(MiKVConfig(low="int2"), sinks=7)
    assert (config.low_k, config.low_v, config.sinks) == ("int2", "int2", 7)


def test_drop_is_drop_of_both() -> None:
    assert MiKVConfig(low="drop").drops_tokens
    assert not MiKVConfig().drops_tokens


@pytest.mark.parametrize(
    ("ratio", "high", "expected"), [(1, "exact", True), (1.0, "fp16", False), (0.99, "exact", False)]
)
def test_only_an_exact_high_tier_of_everything_is_the_full_cache(ratio: float, high: str, expected: bool) -> None:
    assert MiKVConfig(importance_ratio=ratio, high=high).keeps_everything_exact is expected


@given(configurations(), st.integers(0, 5000))
def test_budgets_are_within_the_tokens_there_are(config: MiKVConfig, num_tokens: int) -> None:
    budget = config.high_budget(num_tokens)
    assert 0 <= budget <= num_tokens
    assert budget >= min(num_tokens, config.sinks + config.min_recent)
    assert config.min_recent <= config.recent_window(num_tokens) <= max(config.min_recent, budget)


@pytest.mark.parametrize(
    ("num_tokens", "budget", "recent"), [(0, 0, 0), (9, 2, 1), (10, 2, 1), (11, 3, 1), (1000, 200, 100)]
)
def test_budgets_of_the_paper_by_hand(num_tokens: int, budget: int, recent: int) -> None:
    """A fifth of the tokens, rounded up, half of it recent."""
    paper = MiKVConfig.preset("paper-int2")
    assert (paper.high_budget(num_tokens), paper.recent_window(num_tokens)) == (budget, recent)


# --- settings of single layers ----------------------------------------------------------------------------------------


def test_a_layer_has_the_common_settings_but_for_those_that_name_it() -> None:
    config = MiKVConfig(
        policy="window",
        skip_layers=(3,),
        layer_settings={"0": {"low": "int8"}, "2-3": {"importance_ratio": 0.5, "low_k": "int2"}, "-2--1": {"sinks": 9}},
    )
    common = MiKVConfig(policy="window", skip_layers=(3,))
    assert [config.for_layer(index, 6) for index in range(6)] == [
        replace(common, low="int8"),
        common,
        replace(common, importance_ratio=0.5, low_k="int2"),
        replace(common, importance_ratio=0.5, low_k="int2"),
        replace(common, sinks=9),
        replace(common, sinks=9),
    ]


def test_without_settings_of_layers_all_layers_have_the_same() -> None:
    config = MiKVConfig()
    assert config.for_layer(3, 4) is config


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("4",), r"layer_settings: '4' is not among this model's layers, 0 to 3"),
        (("-5",), r"layer_settings: '-5' is not among this model's layers, 0 to 3"),
        (("2--3",), r"layer_settings: '2--3' is not among this model's layers, 0 to 3"),
        (("3", "-1"), r"'3' and '-1' both name layer 3 of 4"),
    ],
)
def test_layers_that_a_model_does_not_have_are_refused(layers: tuple[str, ...], message: str) -> None:
    config = MiKVConfig(layer_settings={layer: {} for layer in layers})
    geometry = CacheGeometry.from_model_config(LLAMA)
    with pytest.raises(ConfigError, match=message):
        config.for_layer(0, 4)
    with pytest.raises(ConfigError, match=message):
        cache_bytes(config, geometry, 100)


@given(st.sets(st.integers(0, 20)))
def test_ranges_name_exactly_their_layers(layers: set[int]) -> None:
    assert set(range_of_each(ranges_of(layers), 21)) == layers


def test_ranges_are_as_few_as_can_be() -> None:
    assert ranges_of([5, 0, 1, 2, 7, 8]) == ["0-2", "5", "7-8"]


# --- what is refused --------------------------------------------------------------------------------------------------

INVALID: list[tuple[dict[str, object], tuple[str, ...]]] = [
    ({"importance_ratio": 1.5}, ("importance_ratio=1.5", "between 0 and 1")),
    ({"importance_ratio": -0.1}, ("importance_ratio=-0.1", "between 0 and 1")),
    ({"importance_ratio": math.nan}, ("importance_ratio=nan", "between 0 and 1")),
    ({"importance_ratio": "0.1"}, ("importance_ratio='0.1'", "between 0 and 1")),
    ({"importance_ratio": True}, ("importance_ratio=True", "between 0 and 1")),
    ({"importance_ratio": None}, ("importance_ratio=None", "between 0 and 1")),
    ({"recent_share": 2}, ("recent_share=2", "between 0 and 1")),
    ({"high": "int5"}, ("high='int5'", "exact, fp16, int8")),
    ({"high": None}, ("high=None", "exact, fp16, int8")),
    ({"high": "drop"}, ("high='drop'", "exact, fp16, int8")),
    ({"low": "fp16"}, ("low_k='fp16'", "int8, int4, int3, int2, drop")),
    ({"low_v": "int1"}, ("low_v='int1'", "int8, int4, int3, int2, drop")),
    ({"low_k": ["int2"]}, ("low_k=['int2']", "int8, int4, int3, int2, drop")),
    ({"low_k": "drop"}, ("low_k='drop'", "low_v='int3'", "low='drop'")),
    ({"low_v": "drop"}, ("low_v='drop'", "low_k='int4'", "low='drop'")),
    ({"high_grid": "channel"}, ("high_grid='channel'", "lloyd-max, uniform, group")),
    ({"low_grid": "nf4"}, ("low_grid='nf4'", "lloyd-max, uniform, group, channel")),
    ({"group_size": 0}, ("group_size=0", "positive whole number of channels, or None")),
    ({"group_size": 32.0}, ("group_size=32.0", "positive whole number of channels, or None")),
    ({"group_size": True}, ("group_size=True", "positive whole number of channels, or None")),
    ({"min_recent": -1}, ("min_recent=-1", "whole number of tokens, 0 or more")),
    ({"sinks": 2.5}, ("sinks=2.5", "whole number of tokens, 0 or more")),
    ({"sinks": False}, ("sinks=False", "whole number of tokens, 0 or more")),
    ({"warmup_tokens": "64"}, ("warmup_tokens='64'", "whole number of tokens, 0 or more")),
    ({"balancer_exponents": (0.5,)}, ("balancer_exponents=(0.5,)", "two numbers between 0 and 1")),
    ({"balancer_exponents": (0.5, 1.5)}, ("balancer_exponents=(0.5, 1.5)", "two numbers between 0 and 1")),
    ({"balancer_exponents": (0.5, math.nan)}, ("balancer_exponents=(0.5, nan)", "two numbers between 0 and 1")),
    ({"balancer_exponents": ("a", "b")}, ("balancer_exponents=('a', 'b')", "two numbers between 0 and 1")),
    ({"balancer_exponents": 0.5}, ("balancer_exponents=0.5", "two numbers between 0 and 1")),
    ({"protected": ((5, 5),)}, ("protected=((5, 5),)", "0 <= start < stop")),
    ({"protected": ((-1, 5),)}, ("protected=((-1, 5),)", "0 <= start < stop")),
    ({"protected": ((1, 2, 3),)}, ("protected=((1, 2, 3),)", "0 <= start < stop")),
    ({"protected": ((0.5, 2),)}, ("protected=((0.5, 2),)", "0 <= start < stop")),
    ({"protected": (("a", "b"),)}, ("protected=(('a', 'b'),)", "0 <= start < stop")),
    ({"protected": (0, 5)}, ("protected=(0, 5)", "0 <= start < stop")),
    ({"protected": 5}, ("protected=5", "0 <= start < stop")),
    ({"skip_layers": (-1,)}, ("skip_layers=(-1,)", "layer numbers, 0 or more")),
    ({"skip_layers": ("a",)}, ("skip_layers=('a',)", "layer numbers, 0 or more")),
    ({"skip_layers": (1.0,)}, ("skip_layers=(1.0,)", "layer numbers, 0 or more")),
    ({"skip_layers": 3}, ("skip_layers=3", "layer numbers, 0 or more")),
    ({"center_keys": "no"}, ("center_keys='no'", "True or False")),
    ({"hadamard_values": 1}, ("hadamard_values=1", "True or False")),
    ({"policy": "pyramid"}, ("policy='pyramid'", "h2o", "mikv.register_policy")),
    ({"policy": None}, ("policy=None", "h2o", "mikv.register_policy")),
    ({"policy": ["h2o"]}, ("policy=['h2o']", "h2o", "mikv.register_policy")),
    ({"policy": "window", "policy_options": {"windw": 3}}, ("'window'", "windw", "it takes window, pool")),
    ({"policy": "h2o", "policy_options": {"window": 3}}, ("'h2o'", "window", "it takes none")),
    ({"policy": "window", "policy_options": {"window": 0}}, ("window=0", "1 or more")),
    ({"policy": "window", "policy_options": {"window": "8"}}, ("window='8'", "1 or more")),
    ({"policy": "window", "policy_options": {"window": 2.5}}, ("window=2.5", "1 or more")),
    ({"policy": "window", "policy_options": {"pool": 4}}, ("pool=4", "odd")),
    ({"policy": "normalized", "policy_options": {"stride": 0}}, ("stride=0", "1 or more")),
    ({"policy": "random", "policy_options": {"seed": "x"}}, ("seed='x'", "whole number")),
    ({"policy_options": None}, ("policy_options=None", "mapping")),
    ({"policy_options": [1]}, ("policy_options=[1]", "mapping")),
    ({"layer_settings": [1]}, ("layer_settings=[1]", "must map layers to settings")),
    ({"layer_settings": {"0": "int8"}}, ("layer_settings={'0': 'int8'}", "must map layers to settings")),
    ({"layer_settings": {0: {}}}, ("layer_settings: 0 is not a layer such as '0' or '-1'",)),
    ({"layer_settings": {"first": {}}}, ("layer_settings: 'first' is not a layer", "a range such as '1-3'")),
    ({"layer_settings": {"3-1": {}}}, ("layer_settings: '3-1' has no layers",)),
    ({"layer_settings": {"-1--3": {}}}, ("layer_settings: '-1--3' has no layers",)),
    ({"layer_settings": {"0-3": {}, "7": {}, "3": {}}}, ("'0-3' and '3' both name layer 3",)),
    ({"layer_settings": {"-1": {}, "-4--1": {}}}, ("'-4--1' and '-1' both name layer -1",)),
    ({"layer_settings": {"0": {"low_j": "int8"}}}, ("layer_settings of '0': unknown setting 'low_j'",)),
    ({"layer_settings": {"0": {"low": "int5"}}}, ("layer_settings of '0': low_k='int5' is not one of int8",)),
    ({"layer_settings": {"0": {"low_k": "drop"}}}, ("layer_settings of '0': low_k='drop'", "use low='drop'")),
    ({"layer_settings": {"0": {"skip_layers": [1]}}}, ("'skip_layers' is not a setting of single layers",)),
    ({"layer_settings": {"0": {"warmup_tokens": 9}}}, ("'warmup_tokens' is not a setting of single layers",)),
]


@pytest.mark.parametrize(("settings", "message"), INVALID, ids=lambda value: str(value))
def test_an_impossible_value_names_itself_and_the_way_out(
    settings: dict[str, object], message: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        MiKVConfig(**settings)  # type: ignore[arg-type]
    assert all(part in str(refusal.value) for part in message), str(refusal.value)
    with pytest.raises(ConfigError):
        MiKVConfig.from_dict(settings)


HOSTILE: tuple[object, ...] = (
    *(None, True, False, -1, 0, 1, 2, 10**12, 10**30, 10**400, 10**5000, -(10**30), 1e12, 1e30, -1e30, 5e-324, 0.5),
    *(math.nan, math.inf, -math.inf, "", "1", "x" * 100_000, b"8", [], [1], [None], [[0, 10**30]], [[1]], [["0", 1]]),
    *({}, {"a": 1}, {"0": {"sinks": 10**30}}, {"9" * 5000: {}}, {"window": 10**30}, {"seed": 10**30}, {1: 2}),
    *(object(), [[i, i + 1] for i in range(0, 200_000, 2)], [(0, i + 1) for i in range(100_000)], range(10**9)),
)


@pytest.mark.parametrize("name", [*(f.name for f in fields(MiKVConfig)), "low"])
def test_hostile_values_are_refused_by_name_or_can_be_used(name: str) -> None:
    """Whatever is accepted fills a cache, is written and read again; whatever is not names the setting, in a line."""
    for value in HOSTILE:
        start = time.monotonic()
        config, message = built({name: value})
        if config is None:
            assert len(message) < 2000
            assert {"low": "low_k", "policy_options": "policy"}.get(name, name) in message, message[:200]
            with pytest.raises(ConfigError):
                MiKVConfig.from_dict({name: value})
        else:
            use(config)
        assert time.monotonic() - start < 30  # 100,000 spans take a second, but did not end


def built(settings: dict[str, object]) -> tuple[MiKVConfig | None, str]:
    """The configuration, or None and why not."""
    try:
        return MiKVConfig(**settings), ""  # type: ignore[arg-type]
    except ConfigError as error:
        return None, str(error)


def use(config: MiKVConfig) -> None:
    """Write it, read it again, and fill a cache."""
    assert MiKVConfig.from_json(config.to_json()) == config
    for num_tokens in (1, 100, 10**9):
        with contextlib.suppress(ConfigError):  # group sizes and layers that this model does not have
            assert cache_bytes(config, CacheGeometry.from_model_config(LLAMA), num_tokens).bytes > 0
    with contextlib.suppress(ConfigError):
        filled(config, random_tokens(100, 64))


@pytest.mark.parametrize("policy", ["window", "normalized", "random", "far", "h2o"])
@pytest.mark.parametrize("option", ["window", "pool", "stride", "seed", "distance", "norms", "no"])
def test_hostile_options_of_policies_are_refused_or_can_be_used(policy: str, option: str) -> None:
    for value in (*HOSTILE[:22], [1], {}, 7):
        config, message = built({"policy": policy, "policy_options": {option: value}})
        assert config is not None or option in message
        if config is not None:
            use(config)


def test_many_spans_are_merged_and_protect_their_tokens() -> None:
    spans = [(i, i + 1) for i in range(0, 200_000, 2)]
    config = MiKVConfig(protected=tuple(reversed(spans)), importance_ratio=0.0, sinks=0, min_recent=0)
    assert config.protected == tuple(spans)
    assert MiKVConfig(protected=((5, 9), (0, 3), (3, 6), (20, 30), (22, 24))).protected == ((0, 9), (20, 30))
    positions = torch.arange(1000, dtype=torch.int32)[None]
    assert protected_tokens(positions, 1000, config)[0].tolist() == [i % 2 == 0 for i in range(1000)]


@pytest.mark.parametrize(
    "text", ['{"sinks": ' + "9" * 5000 + "}", "[" * 100_000, '{"sinks": 1e400}', '{"sinks": Infinity}']
)
def test_hostile_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        MiKVConfig.from_json(text)


@pytest.mark.parametrize("settings", [None, 7, "sinks", [("sinks", 4)], {1: 2, "x": 3}])
def test_settings_that_are_no_mapping_of_names_are_refused(settings: object) -> None:
    with pytest.raises(ConfigError):
        MiKVConfig.from_dict(settings)  # type: ignore[arg-type]


def test_an_unknown_setting_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'importance_ration'.*importance_ratio.*warmup_tokens"):
        MiKVConfig.from_dict({"importance_ration": 0.1})
    with pytest.raises(TypeError, match="importance_ration"):
        MiKVConfig(importance_ration=0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"sink": 4}', "unknown setting 'sink'"),
        ('{"importance_ratio": NaN}', "importance_ratio=nan"),
        ('{"protected": 7}', "protected=7"),
    ],
)
def test_json_that_is_no_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MiKVConfig.from_json(text)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        MiKVConfig.from_file(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="binary"):
        MiKVConfig.from_file(tmp_path / "binary.json")


# --- presets and budgets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name: str) -> None:
    config = MiKVConfig.preset(name)
    assert MiKVConfig.from_json(config.to_json()) == config


def test_the_default_is_the_preset_balanced() -> None:
    assert MiKVConfig() == MiKVConfig.preset("balanced")


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'tiny'; the presets are paper-int2, .*small"):
        MiKVConfig.preset("tiny")


@pytest.mark.parametrize(("name", "low"), [("paper-int2", "int2"), ("paper-int3", "int3"), ("paper-int4", "int4")])
def test_paper_presets_are_the_recipe_of_the_paper(name: str, low: str) -> None:
    config = MiKVConfig.preset(name)
    assert (config.importance_ratio, config.high, config.low_k, config.low_v) == (0.2, "fp16", low, low)
    assert (config.policy, config.recent_share, config.group_size, config.low_grid) == ("h2o", 0.5, None, "group")
    assert (config.balance_keys, config.balancer_exponents) == (True, (0.5, 0.5))
    assert not any((config.center_keys, config.hadamard_keys, config.center_values, config.hadamard_values))
    assert (config.sinks, config.min_recent, config.protected) == (0, 0, ())


def test_the_best_preset_that_fits_is_picked() -> None:
    geometry = CacheGeometry.from_model_config(LLAMA)
    ratios = [cache_bytes(MiKVConfig.preset(name), geometry, 4096).ratio for name in BEST_FIRST]
    assert ratios == sorted(ratios, reverse=True)
    for name, ratio in zip(BEST_FIRST, ratios, strict=True):
        assert MiKVConfig.for_budget(ratio, LLAMA) == MiKVConfig.preset(name)
        assert MiKVConfig.for_budget(ratio + 1e-6, LLAMA) == MiKVConfig.preset(name)
    assert MiKVConfig.for_budget(1, LLAMA) == MiKVConfig.preset(BEST_FIRST[0])


@pytest.mark.parametrize("num_tokens", [256, 4096, 32768])
@pytest.mark.parametrize("budget", [0.38, 0.4, 0.5])
def test_a_budget_is_met_at_the_length_asked_for(budget: float, num_tokens: int) -> None:
    """Short contexts consist of recent tokens: the same preset takes a larger share of them."""
    geometry = CacheGeometry.from_model_config(LLAMA)
    ratios = {name: cache_bytes(MiKVConfig.preset(name), geometry, num_tokens).ratio for name in BEST_FIRST}
    fitting = [name for name, ratio in ratios.items() if ratio <= budget]
    assert MiKVConfig.for_budget(budget, LLAMA, num_tokens) == MiKVConfig.preset(fitting[0])


def test_a_budget_that_cannot_be_met_names_the_smallest_preset_and_what_it_takes() -> None:
    with pytest.raises(ConfigError, match=r"budget=0.05 cannot be met with 4096 tokens.*'small'") as refusal:
        MiKVConfig.for_budget(0.05, LLAMA)
    asked = float(str(refusal.value).rsplit("budget=", 1)[1])
    assert MiKVConfig.for_budget(asked, LLAMA) == MiKVConfig.preset("small")
    with pytest.raises(ConfigError, match=r"with 9 tokens .*'small'.* from about \d+ tokens on it meets it; so short"):
        MiKVConfig.for_budget(0.3, LLAMA, 9)


def test_a_quarter_is_balanced_where_that_fits_and_the_choice_is_named(caplog: pytest.LogCaptureFixture) -> None:
    wide = LlamaConfig(head_dim=128)
    assert MiKVConfig.for_budget(0.25, wide, 32_768) == MiKVConfig.preset("balanced")
    assert MiKVConfig.for_budget(0.25, wide, 4096) == MiKVConfig.preset("small")
    first, second = (record.getMessage() for record in caplog.records)
    assert "32,768 tokens: preset 'balanced', 0.2" in first
    assert "preset 'small'" in second
    assert "'balanced' would take 0.256" in second


@pytest.mark.parametrize("num_tokens", [0, -1, True, 1.5, 1e30, 10**30, "x", None, math.nan])
def test_a_length_is_a_number_of_tokens(num_tokens: object) -> None:
    with pytest.raises(ConfigError, match="num_tokens="):
        MiKVConfig.for_budget(0.5, LLAMA, num_tokens)  # type: ignore[arg-type]


def test_a_model_that_caches_nothing_has_no_budget() -> None:
    with pytest.raises(UnsupportedModelError, match="caches keys and values"):
        MiKVConfig.for_budget(0.5, MambaConfig(num_hidden_layers=2))


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, math.nan, "0.3", None])
def test_a_budget_is_a_share(budget: object) -> None:
    with pytest.raises(ConfigError, match=r"budget=.*more than 0 and at most 1"):
        MiKVConfig.for_budget(budget, LLAMA)  # type: ignore[arg-type]
