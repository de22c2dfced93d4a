"""The grid, bits by layer, and what is chosen; measured on a tiny model."""

import json
from dataclasses import replace

import pytest

from mikv.cache.accounting import cache_bytes
from mikv.cache.config import BEST_FIRST, MiKVConfig
from mikv.cache.geometry import CacheGeometry, LayerGeometry
from mikv.cache_names import parse_cache
from mikv.errors import ConfigError
from mikv.lab import evaluate
from mikv.lab.grid import Grid, label_of, name_of
from mikv.lab.layer_bits import by_sensitivity, is_uniform, probe, uniform_twin, with_wide_edges
from mikv.lab.records import Ledger
from mikv.lab.sweep import Arm, Sweep, SweepPlan, _outcome
from mikv.lab.sweep_page import page
from tiny_chat import save_chat_model

FULL = LayerGeometry("full_attention", None, 2, 64)
SLIDING = LayerGeometry("sliding_attention", 16, 2, 64)
SIX = CacheGeometry((FULL,) * 6, 2)
BASE = MiKVConfig(importance_ratio=0.08, high="int8", low_k="int4", low_v="int3", policy="normalized")
TASKS = ("text:prompt=120,read=16,split=tune", "text:kind=code,prompt=120,read=16,split=tune")
SMALL = Grid(ratios=(0.1,), high=("int8",), low=("K4V3",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=4)


@pytest.fixture
def plan(folder):
    return SweepPlan(SMALL, str(folder), TASKS, samples=1, tokens=1000)


def run(plan, out=None):
    """The sweep, its records, and how many readings were made for them."""
    sweep, readings = Sweep(plan, "mikv sweep"), []
    with Ledger(out) as ledger:
        records = sweep.run(ledger, lambda finished, done, total: readings.append(finished))
    return sweep, records, len(readings)


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_every_combination_is_there_once_and_has_its_uniform_twin():
    grid = Grid(ratios=(0.1, 0.2), high=("int8", "int4"), low=("K4V3", "K2V2"), policies=("h2o", "window"))
    mixed = grid.mixed()
    assert len({name_of(config) for config in mixed}) == len(mixed) == 16
    assert {(c.importance_ratio, c.high, c.low_k, c.low_v, c.policy) for c in mixed} >= {
        (0.1, "int4", "int4", "int3", "h2o"),
        (0.2, "int8", "int2", "int2", "window"),
    }
    assert {name_of(uniform_twin(config)) for config in mixed} == {name_of(config) for config in grid.uniform()}
    assert not any(map(is_uniform, mixed))
    assert all(map(is_uniform, grid.uniform()))


@pytest.mark.parametrize(
    ("transforms", "off"),
    [
        ("all", set()),
        ("no-centering", {"center_keys", "center_values"}),
        ("no-balancer", {"balance_keys"}),
        ("no-hadamard", {"hadamard_keys", "hadamard_values"}),
        ("none", {"center_keys", "center_values", "balance_keys", "hadamard_keys", "hadamard_values"}),
    ],
)
def test_transforms_by_name_apply_to_both_kinds(transforms, off):
    grid = replace(SMALL, transforms=(transforms,), roundings=("nearest",))
    for config in (*grid.mixed(), *grid.uniform()):
        settings = config.to_dict()
        assert {
            name for name in settings if name.startswith(("center", "balance_", "hada")) and not settings[name]
        } == off
        assert settings["key_rounding"] == "nearest"
        assert (transforms in label_of(config, BASE, SIX)) == bool(off)


@pytest.mark.parametrize(
    "config",
    [
        BASE,
        MiKVConfig.preset("paper-int2"),
        uniform_twin(BASE),
        with_wide_edges(BASE, SIX),
        probe(BASE, 3, SIX),
        MiKVConfig(policy="window", policy_options={"window": 8}, protected=((1, 5),), balancer_exponents=(0.25, 0.75)),
    ],
    ids=lambda config: name_of(config)[:60],
)
def test_a_name_stands_for_its_configuration(config):
    assert parse_cache(name_of(config)).config == config


def test_labels_say_what_differs_from_the_base():
    base = replace(BASE, low_k="int3", low_v="int2")
    other = replace(base, importance_ratio=0.2, high="fp16", policy="h2o", hadamard_keys=False)
    assert label_of(base, base, SIX) == "r 0.08 8/K3V2"
    assert label_of(other, base, SIX) == "r 0.2 fp16/K3V2, without hadamard_keys, policy=h2o"
    assert label_of(uniform_twin(base), base, SIX) == "uniform K3V2"
    assert label_of(with_wide_edges(base, SIX), base, SIX) == "r 0.08 8/K3V2, first-last"
    assert label_of(probe(base, 3, SIX), base, SIX) == "uniform K2V2, 5 layers exact"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": (0.0,)}, "--ratios 0 must be more than 0"),
        ({"ratios": (1.5,)}, "--ratios 1.5 must be"),
        ({"high": ("int5",)}, "--high 'int5' is not one of exact, fp16"),
        ({"low": ("K5V3",)}, "--low 'K5V3' must name bits"),
        ({"low": ("int4",)}, "--low 'int4' must name bits"),
        ({"transforms": ("some",)}, "--transforms 'some' is not one of all, no-centering"),
        ({"roundings": ("up",)}, "--roundings 'up' is not one of feedback, nearest"),
        ({"policies": ("pyramid",)}, "'pyramid'"),
        ({"layers": ("all",)}, "--layers 'all' is not one of uniform, first-last, sensitivity"),
        ({"base": "kivi2"}, "--base 'kivi2' must be mikv:PRESET"),
        ({"base": "mikv:balanced+skip_layers=[0]"}, "has settings of layers"),
    ],
)
def test_grids_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Grid(**settings)


# --- bits by layer ----------------------------------------------------------------------------------------------------


def test_edges_are_the_first_and_last_two_layers_that_are_compressed():
    hybrid = CacheGeometry((SLIDING, FULL, FULL, FULL, FULL, FULL, SLIDING), 2)
    assert with_wide_edges(BASE, hybrid).layer_settings == {
        "1-2": {"low_k": "int8", "low_v": "int4"},
        "4-5": {"low_k": "int8", "low_v": "int4"},
    }
    assert list(with_wide_edges(BASE, CacheGeometry((FULL,) * 3, 2)).layer_settings) == ["0-2"]


def test_a_probe_compresses_one_layer_one_step_narrower():
    config = probe(BASE, 2, SIX)
    assert config.skip_layers == (0, 1, 3, 4, 5)
    assert (config.low_k, config.low_v, is_uniform(config)) == ("int3", "int2", True)


def test_sensitive_layers_take_their_bits_from_the_others():
    kl = {0: 5.0, 1: 0.001, 2: 0.3, 3: 0.001, 4: 0.2, 5: 0.1}
    config = MiKVConfig(low_k="int3", low_v="int3")
    allocated = by_sensitivity(config, kl, SIX, 1000)
    formats = [allocated.for_layer(index, 6).low_k for index in range(6)]
    assert formats == ["int4", "int2", "int4", "int2", "int3", "int3"]  # .2 and .1 are too close to be worth a swap
    assert cache_bytes(allocated, SIX, 1000).bytes <= cache_bytes(config, SIX, 1000).bytes


def test_bits_are_never_moved_where_nothing_is_gained():
    assert by_sensitivity(BASE, dict.fromkeys(range(6), 0.1), SIX, 1000) is None
    lowest = MiKVConfig(low="int2")
    assert by_sensitivity(lowest, {0: 9.0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0}, SIX, 1000) is None


@pytest.mark.parametrize("low", [("int4", "int4"), ("int4", "int3"), ("int3", "int3")])
@pytest.mark.parametrize("num_layers", [2, 5, 30])
def test_an_allocation_never_takes_more_bytes(low, num_layers):
    geometry = CacheGeometry((replace(FULL, num_kv_heads=3),) * num_layers, 4)
    kl = {layer: 10.0 ** -(layer % 5) for layer in range(num_layers)}
    for tokens in (100, 777, 3000):
        config = MiKVConfig(low_k=low[0], low_v=low[1])
        allocated = by_sensitivity(config, kl, geometry, tokens) or config
        assert cache_bytes(allocated, geometry, tokens).bytes <= cache_bytes(config, geometry, tokens).bytes


# --- what is chosen ---------------------------------------------------------------------------------------------------


def arm(label, ratio, kl, kind="mixed"):
    return Arm(label, f"cache {label}", kind, ratio, ratio, kl, 2 * kl, 0.9)


def test_the_best_within_a_budget_is_compared_with_the_best_uniform_one(plan):
    arms = [
        arm("a", 0.20, 0.03),
        arm("b", 0.27, 0.01),
        arm("c", 0.26, 0.02),
        arm("d", 0.271, 0.001),
        arm("u", 0.25, 0.04, "uniform"),
        arm("v", 0.19, 0.05, "uniform"),
        arm("w", 0.15, 0.001, "other"),
    ]
    outcome = _outcome(replace(plan, budgets=(0.1, 0.2, 0.27)), "m", arms)
    found = [(choice.best and choice.best.label, choice.uniform and choice.uniform.label) for choice in outcome.choices]
    assert found == [(None, None), ("a", "v"), ("b", "u")]
    assert [choice.gain for choice in outcome.choices] == [None, pytest.approx(5 / 3), pytest.approx(4)]


def test_the_front_has_what_nothing_smaller_is_closer_than(plan):
    arms = [arm("a", 0.2, 0.03), arm("b", 0.3, 0.04), arm("c", 0.3, 0.01), arm("d", 0.4, 0.01), arm("e", 0.1, 0.5)]
    assert _outcome(plan, "m", arms).front == {"cache a", "cache c", "cache e"}


# --- measured ---------------------------------------------------------------------------------------------------------


def test_a_sweep_measures_combinations_uniform_twins_and_presets_on_every_task(plan):
    sweep, records, readings = run(plan)
    outcome = sweep.outcome(records)
    assert {arm.label for arm in outcome.arms} == {"r 0.1 8/K4V3", "uniform K4V3"} | {
        label_of(MiKVConfig.preset(name), MiKVConfig.preset("balanced"), None) for name in BEST_FIRST
    }
    assert readings == len(records) == len(outcome.arms) * len(TASKS)
    one = next(arm for arm in outcome.arms if arm.label == "r 0.1 8/K4V3")
    of_it = [record for record in records if record["cache"] == one.cache]
    assert one.kl_mean == pytest.approx(sum(record["kl_mean"] for record in of_it) / 2)
    geometry = CacheGeometry((FULL,) * 4, 4)
    assert one.ratio == cache_bytes(MiKVConfig(importance_ratio=0.1), geometry, 1000).ratio
    assert sweep.extent == "5 caches × 2 samples = 10 readings"


def test_a_finished_sweep_is_not_measured_again_nor_the_model_loaded(plan, tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    plan = replace(plan, grid=replace(SMALL, layers=("sensitivity",)))
    _, records, _ = run(plan, out)
    monkeypatch.setattr(evaluate, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    assert run(plan, out)[1:] == (records, 0)
    assert all(json.loads(line)["kind"] == "eval" for line in out.read_text().splitlines())


def test_sensitivity_is_measured_layer_by_layer_and_recorded_as_settings_of_layers(plan, tmp_path):
    out = tmp_path / "s.jsonl"
    sweep, records, readings = run(replace(plan, grid=replace(SMALL, layers=("sensitivity",))), out)
    probes = [json.loads(line)["config"]["skip_layers"] for line in out.read_text().splitlines()]
    assert sorted(skipped for skipped in probes if skipped) == sorted(2 * [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    allocated = [record for record in records if record["config"]["layer_settings"]]
    labels = {arm.label: arm for arm in sweep.outcome(records).arms}
    assert {"r 0.1 8/K4V3, sensitivity", "uniform K4V3, sensitivity"} <= set(labels)
    assert labels["r 0.1 8/K4V3, sensitivity"].ratio <= labels["r 0.1 8/K4V3"].ratio
    assert len(allocated) == 2 * len(TASKS)
    assert readings == len(records) + 4 * len(TASKS)


def test_caches_asked_for_by_name_are_measured_besides(plan):
    also = ("kivi2", "turboquant4", "mikv:balanced", "full")
    sweep, records, _ = run(replace(plan, also=also))
    others = {arm.label: arm for arm in sweep.outcome(records).arms if arm.kind == "other"}
    assert set(others) == set(also) - {"mikv:balanced"}  # which is of the grid
    geometry = CacheGeometry((FULL,) * 4, 4)
    assert others["kivi2"].ratio == cache_bytes(parse_cache("kivi2").config, geometry, 1000).ratio
    assert others["turboquant4"].ratio == others["turboquant4"].measured_ratio
    assert others["full"].kl_mean == 0
    assert sweep.extent.startswith("8 caches")


def test_a_cache_that_a_model_cannot_hold_is_left_out_with_its_records_reason(plan):
    grid = replace(SMALL, base="mikv:balanced+group_size=48+low_grid=group")
    with pytest.raises(ConfigError, match="group_size=48"):
        Sweep(replace(plan, grid=grid), "mikv sweep")


def test_the_page_has_all_models_with_the_same_caches(plan, folder, tmp_path):
    out, other = tmp_path / "s.jsonl", save_chat_model(tmp_path / "other", num_hidden_layers=2)
    sweep, own, _ = run(plan, out)
    _, theirs, _ = run(replace(plan, model=str(other)), out)
    gone = [record | {"model": "./gone"} for record in own]
    wrong = [record | {"model": str(other), "samples": 7, "kl_mean": 99.0} for record in own]
    outcomes, left_out = sweep.other_outcomes([*own, *theirs, *gone, *wrong], sweep.outcome(own))
    assert [outcome.model for outcome in outcomes] == [str(other)]
    assert list(left_out) == ["./gone"]
    text = page(plan, [sweep.outcome(own), *outcomes], "mikv sweep")
    rows = [line for line in text.splitlines() if line.startswith(("| r ", "| uniform "))]
    assert len(rows) == 5
    assert all(line.count("|") == 9 and "99.0" not in line for line in rows)
    assert "| configuration | of fp16 | deep KL | p99 | top-1 | other KL | p99 | top-1 |" in text
    assert "## Best on deep" in text
    balanced = label_of(MiKVConfig.preset("balanced"), MiKVConfig.preset("balanced"), None)
    assert f"`balanced` is {balanced}" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "--tokens 0 must be 1 or more"),
        ({"budgets": (2.0,)}, "--budgets 2 must be a share"),
        ({"samples": 0}, "--samples 0 must be 1 or more"),
        ({"tasks": ("juggling",)}, "unknown task 'juggling'"),
    ],
)
def test_plans_that_cannot_work_are_refused(plan, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(plan, **changes)
