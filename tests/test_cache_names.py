"""Names of caches: what exists, what is refused, why something is not available, and how many bytes are counted."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

from mikv import cache_names
from mikv.cache.accounting import cache_bytes
from mikv.cache.config import PRESETS, MiKVConfig
from mikv.cache.geometry import CacheGeometry
from mikv.cache_names import parse_cache, spellings, split_names
from mikv.errors import ConfigError
from mikv.integrations.transformers import MiKVCache
from mikv.integrations.transformers.versions import as_argument
from mikv.lab.baselines.held_bytes import held_bytes, tensor_bytes
from tiny import tiny_model

IDS = torch.arange(3, 90)[None]
NUM_TOKENS = IDS.shape[1]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def filled(name, model):
    named = parse_cache(name)
    if (reason := named.unavailable()) is not None:
        pytest.skip(reason)
    cache = named.make(model, NUM_TOKENS)
    for piece in IDS.split((80, 7), dim=1):
        model(piece, **as_argument(cache))
    return named, cache


@pytest.mark.parametrize("name", [*(name for name in spellings() if name.isalnum()), "turboquant2.5", "mikv:balanced"])
def test_every_name_makes_a_cache_that_decodes_and_is_counted(name, model):
    named, cache = filled(name, model)
    assert cache.get_seq_length() == NUM_TOKENS
    full = 2 * 2 * 2 * 64 * NUM_TOKENS * 4  # keys and values, layers, heads, channels, tokens, float32
    size = named.bytes(cache)
    assert size == full if name == "full" else 0 < size < full


def test_the_grammar_has_all_these_names():
    plain = "full int8 int4 int3 int2 kivi4 kivi2 zipcache turboquant4 turboquant3 turboquant2.5"
    peers = "quanto4 quanto2 hqq4 hqq2 fp8"
    shared = "h2o@SHARE snapkv@SHARE streaming@SHARE kvpress:NAME@SHARE"
    assert spellings()[:-3] == tuple(f"{plain} {peers} {shared}".split())
    assert [spelling.split()[0] for spelling in spellings()[-3:]] == [
        "mikv:PRESET",
        "mikv:FILE.json",
        "mikv:PRESET+SETTING=VALUE+...",
    ]


def test_help_lists_the_names_without_importing_a_library():
    code = "import sys; from mikv.cache_names import spellings; spellings(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_name(preset, model):
    named = parse_cache(f"mikv:{preset}")
    cache = named.make(model, NUM_TOKENS)
    assert isinstance(cache, MiKVCache)
    assert named.config == cache.config == MiKVConfig.preset(preset)


def test_a_configuration_file_has_its_path_as_a_name(tmp_path, model):
    config = MiKVConfig(importance_ratio=0.5)
    path = tmp_path / "a+b.json"
    path.write_text(config.to_json())
    assert parse_cache(f"mikv:{path}").make(model, NUM_TOKENS).config == config
    assert parse_cache(f"mikv:{path}+importance_ratio=0.2").config == MiKVConfig(importance_ratio=0.2)


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ("policy=window", {"policy": "window"}),
        ("low=drop+importance_ratio=0.1", {"low": "drop", "importance_ratio": 0.1}),
        ("importance_ratio=1e+0", {"importance_ratio": 1.0}),
        ("balance_keys=false+group_size=null", {"balance_keys": False, "group_size": None}),
        ('policy_options={"stride":1}', {"policy_options": {"stride": 1}}),
        ("skip_layers=[0,1]+low_k=int8", {"skip_layers": (0, 1), "low_k": "int8"}),
        ("protected=[[0,7],[9,12]]", {"protected": ((0, 7), (9, 12))}),
    ],
)
def test_settings_differ_from_their_preset_where_the_name_says_so(overrides, settings):
    assert parse_cache(f"mikv:balanced+{overrides}").config == MiKVConfig(**settings)


def test_low_sets_both_formats_of_a_preset_that_set_them_apart():
    config = parse_cache("mikv:paper-int2+low_k=int4").config
    assert (config.low_k, config.low_v) == ("int4", "int2")
    config = parse_cache("mikv:balanced+low=int2").config
    assert (config.low_k, config.low_v) == ("int2", "int2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("polcy=window", "unknown setting 'polcy'; the settings are .*policy"),
        ("policy", "'policy' has no value; write policy=VALUE"),
        ("policy=windw", "policy='windw' is not one of .*window"),
        ("importance_ratio=2", "importance_ratio=2 must be a number between 0 and 1"),
        ("balance_keys=False", r"balance_keys='False' must be True or False \(values are JSON or plain words"),
        ("low=drop+low_k=int4", "'low_k' is set twice; set it once"),
        ('policy_options={"strid":1}', "does not take the options"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_whole_name(overrides, message):
    name = f"mikv:balanced+{overrides}"
    with pytest.raises(ConfigError, match=message) as refused:
        parse_cache(name)
    assert str(refused.value).startswith(repr(name))


def test_settings_that_depend_on_nothing_are_known_before_a_model_is(model):
    assert parse_cache("int4").config.low_k == "int4"
    assert parse_cache("kivi2").config.low_grid == "channel"
    for name in ("full", "zipcache", "turboquant3", "quanto4", "h2o@0.25", "kvpress:Knorm@0.25"):
        assert parse_cache(name).config is None
    assert parse_cache("h2o@0.5").make(model, 400).config.drops_tokens


@pytest.mark.parametrize("rival", ["mikv:balanced", "mikv:small+sinks=8", "int4", "kivi2"])
@pytest.mark.parametrize("length", [400, 1100])
def test_an_evicting_cache_can_take_the_bytes_of_another(rival, length, model):
    geometry = CacheGeometry.from_model_config(model.config)
    wanted = cache_bytes(parse_cache(rival).config, geometry, length).ratio
    for family in ("h2o", "snapkv", "streaming"):
        made = parse_cache(f"{family}@{rival}").make(model, length).config
        assert made == parse_cache(f"{family}@{wanted}").make(model, length).config
        assert wanted - 0.1 < cache_bytes(made, geometry, length).ratio <= wanted  # tokens leave in blocks of 32


@pytest.mark.parametrize("rival", ["full", "quanto4", "zipcache"])
def test_bytes_that_are_not_known_before_are_refused(rival):
    message = rf"bytes of '{rival}' are not known before .* h2o@mikv:balanced, .*h2o@0\.25"
    with pytest.raises(ConfigError, match=message):
        parse_cache(f"h2o@{rival}")


def test_a_rival_s_bytes_are_those_of_a_preset_that_exists(tmp_path):
    with pytest.raises(ConfigError, match="unknown preset 'blanced'"):
        parse_cache("h2o@mikv:blanced")
    (tmp_path / "mine.json").write_text(MiKVConfig().to_json())
    with pytest.raises(ConfigError, match="a record would not hold what is in the file; snapkv@mikv:PRESET"):
        parse_cache(f"snapkv@mikv:{tmp_path / 'mine.json'}")


def test_a_record_can_hold_the_settings():
    config = parse_cache("mikv:small+policy_options={}").config
    assert MiKVConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["", "mikv", "quanto3", "full:balanced", "kvpress", "h2o:0.25", "xyz@0.25"])
def test_an_unknown_name_is_refused_with_all_that_exist(name):
    with pytest.raises(ConfigError) as refused:
        parse_cache(name, also=("llama.cpp:f16",))
    message = str(refused.value)
    assert message.startswith(f"unknown cache {name!r}; ")
    assert message.endswith(f"the caches are {', '.join((*spellings(), 'llama.cpp:f16'))}")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ful", "full"),
        ("kivi3", "kivi4 or kivi2"),
        ("turboquant2", "turboquant2.5 or turboquant4"),
        ("llama.cpp", "llama.cpp:f16"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(name, near):
    with pytest.raises(ConfigError) as refused:
        parse_cache(name, also=("llama.cpp:f16",))
    assert f"; did you mean {near}? the caches are" in str(refused.value)


@pytest.mark.parametrize(
    "name", ["h2o", "h2o@", "snapkv@25%", "streaming@0", "h2o@-0.1", "h2o@1.5", "h2o@nan", "kvpress:SnapKV"]
)
def test_an_evicting_cache_needs_a_share(name):
    family = name.partition("@")[0]
    with pytest.raises(ConfigError, match=rf"needs the share of the fp16 bytes .*at most 1: {family}@0\.25"):
        parse_cache(name)


def test_an_unknown_preset_is_refused_with_all_that_exist():
    message = r"unknown preset 'blanced' in 'mikv:blanced'; did you mean balanced\? the presets are .*balanced"
    with pytest.raises(ConfigError, match=message):
        parse_cache("mikv:blanced")


def test_a_configuration_file_that_is_not_there_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"cannot read the configuration nowhere\.json"):
        parse_cache("mikv:nowhere.json")


@pytest.mark.parametrize(("name", "package"), [("quanto4", "optimum-quanto"), ("hqq2", "hqq")])
def test_a_peer_that_is_not_installed_says_how_to_get_it(name, package, monkeypatch):
    monkeypatch.setattr(cache_names, "is_installed", lambda package: False)
    assert parse_cache(name).unavailable() == f"needs {package}: pip install 'mikv[bench]'"


def test_an_installed_package_is_found_without_its_parent_being_there():
    assert cache_names.is_installed("torch.nn")
    assert not cache_names.is_installed("no_such_package.part")


def test_lists_of_names_are_split():
    assert split_names(" full, mikv:balanced,") == ("full", "mikv:balanced")


def test_lists_are_not_split_inside_of_values():
    nested = 'mikv:small+layer_settings={"0":{"low":"int8","sinks":1},"1-3":{"sinks":2}}'
    names = ("full", 'mikv:small+policy_options={"window":8,"pool":3}+skip_layers=[0,1]', nested, "int4")
    assert split_names(",".join(names)) == names


@pytest.mark.parametrize(
    ("names", "message"), [(" , ", "names no cache; for example"), ("full,fp8,full", "names 'full' 2 times")]
)
def test_lists_that_cannot_be_meant_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        split_names(names)


def test_shared_memory_is_counted_once_and_nested_tensors_are_found():
    base = torch.zeros(10)
    assert tensor_bytes({"a": [base, (base[:5], {"b": torch.zeros(3, dtype=torch.float16)})], "c": 1}) == 46


def test_an_empty_cache_holds_nothing(model):
    assert held_bytes(DynamicCache(config=model.config)) == 0
