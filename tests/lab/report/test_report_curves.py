"""Points, fronts and winners on numbers small enough to check by hand; families; heat maps."""

import math

import made_up_records
import pytest

from mikv.cache_names import spellings
from mikv.lab.report.curves import best_within, cost, incomplete, negative_score, overview, pareto_front, points
from mikv.lab.report.families import FAMILIES, OTHER, family_of, method_of
from mikv.lab.report.needles import needle_maps
from mikv.lab.report.tables import COLUMNS, divergence


def cell(cache, ratio, kl, score=0.5, task="a", stderr=0.1):
    return {
        "task": task,
        "cache": cache,
        "ratio": ratio,
        "kl_mean": kl,
        "score": score,
        "score_stderr": stderr,
        "bytes_per_token": 1000 * ratio,
    }


CELLS = [
    cell("int8", 0.5, 0.001, 0.9),
    cell("int4", 0.3, 0.01, 0.8),
    cell("int3", 0.31, 0.02, 0.9),
    cell("mikv:small", 0.2, 0.015, 0.7),
    cell("kivi2", 0.2, 0.3, 0.7),
]


def names(found):
    return [point.cache for point in found]


def test_points_are_means_in_which_every_task_weighs_the_same():
    own = [cell("int4", 0.3, 0.1, 0.2, "a"), cell("int4", 0.3, 0.3, 0.4, "a"), cell("int4", 0.2, 0.4, None, "b", None)]
    [point] = points(own)
    assert (point.ratio, point.kl, point.score) == pytest.approx((0.25, 0.3, 0.3))
    assert point.bytes_per_token == pytest.approx(250)
    assert point.score_stderr == pytest.approx(0.1)


def test_the_error_of_a_mean_over_tasks_is_smaller():
    [point] = points([cell("int4", 0.3, 0.1, task="a"), cell("int4", 0.3, 0.1, task="b")])
    assert point.score_stderr == pytest.approx(math.hypot(0.1, 0.1) / 2)


def test_a_cache_that_missed_a_task_is_left_out_of_the_mean_and_named():
    own = [cell("int4", 0.3, 0.1, task=task) for task in "ab"] + [cell("kivi2", 0.2, 0.1, task="a")]
    assert names(points(own)) == ["int4"]
    assert incomplete(own) == ["kivi2"]


def test_the_front_has_what_no_other_cache_beats_in_bytes_and_quality():
    assert names(pareto_front(points(CELLS), cost)) == ["mikv:small", "int4", "int8"]
    assert names(pareto_front(points(CELLS), negative_score)) == ["kivi2", "int4", "int3"]


def test_a_divergence_that_is_not_a_number_never_wins():
    broken = [*CELLS, cell("int2", 0.1, math.nan, task="a"), cell("turboquant3", 0.1, None)]
    assert names(pareto_front(points(broken), cost)) == ["mikv:small", "int4", "int8"]
    [point] = points([cell("int2", 0.1, 0.1, task="a"), cell("int2", 0.1, math.nan, task="b")])
    assert math.isnan(point.kl)


def test_the_best_of_a_budget_comes_with_the_best_of_another_family():
    assert names(best_within(points(CELLS), 0.3, cost)) == ["int4", "mikv:small"]
    assert names(best_within(points(CELLS), 0.2, cost)) == ["mikv:small", "kivi2"]
    assert best_within(points(CELLS), 0.1, cost) == []


@pytest.mark.parametrize(
    ("cache", "family"),
    [
        ("full", "full"),
        ("mikv:balanced+policy=window", "mikv"),
        ("int3", "uniform"),
        ("kivi2", "kivi"),
        ("turboquant2.5", "zipcache, turboquant"),
        ("hqq4", "transformers"),
        ("fp8", "transformers"),
        ("kvpress:knorm@0.25", "eviction"),
        ("llama.cpp:q8_0", "other"),
    ],
)
def test_a_name_says_the_family(cache, family):
    assert family_of(cache).name == family


@pytest.mark.parametrize(
    ("cache", "config", "family"),
    [
        ("mikv:balanced+importance_ratio=0+min_recent=0", None, "one precision, mikv's transforms"),
        ("mikv:small+low_k=int4+importance_ratio=0.0", None, "one precision, mikv's transforms"),
        ("mikv:mine.json", {"importance_ratio": 0, "low_k": "int4"}, "one precision, mikv's transforms"),
        ("mikv:mine.json", {"importance_ratio": 0.1, "low_k": "drop"}, "eviction"),
        ("mikv:balanced+low=drop", None, "eviction"),
        ("mikv:balanced+importance_ratio=0.05", None, "mikv"),
        ("mikv:mine.json", {"importance_ratio": 0.1, "low_k": "int4"}, "mikv"),
        ("int4", {"importance_ratio": 0, "low_k": "int4"}, "uniform"),
        ("kivi2", {"importance_ratio": 0, "low_k": "int2"}, "kivi"),
    ],
)
def test_settings_say_the_family_of_mikv_s_own_caches(cache, config, family):
    assert family_of(cache, config).name == family
    assert method_of(cache, config) in family_of(cache, config).methods


def test_no_two_methods_share_a_shape():
    methods = [method for family in (*FAMILIES, OTHER) for method in family.methods]
    for shape in ("symbol", "marker", "glyph"):
        assert len({getattr(method, shape) for method in methods}) == len(methods)


def test_the_overview_compares_what_most_caches_were_measured_on():
    everywhere = [cell(cache, 0.3, 0.1, task=task) for cache in ("int4", "int3") for task in "abc"]
    own = [*everywhere, *(cell("kivi2", 0.2, 0.1, task=task) for task in "bc"), cell("h2o@0.2", 0.2, 0.1, task="a")]
    view = overview(own)
    assert view.score.tasks == ("b", "c")  # of the tasks with most caches, the largest set
    assert names(view.score.points) == ["kivi2", "int3", "int4"]
    assert view.score.missing == ("h2o@0.2",)
    assert view.score.extent == "mean over b, c; not measured there: h2o@0.2"
    texts = [cell("int4", 0.3, 0.5, None, "text", None)]
    assert overview([*own, *texts]).kl.tasks == ("text",)
    assert overview(texts).score is None


def test_every_cache_that_can_be_named_has_a_family():
    assert [name for name in spellings() if family_of(name).name == "other"] == []


def test_heat_maps_are_means_by_depth_and_length():
    details = [
        {"score": 1.0, "labels": {"depth": 0.5, "length": 64}},
        {"score": 0.0, "labels": {"depth": 0.5, "length": 64}},
        {"score": 1.0, "labels": {"depth": 0.0, "length": 128}},
        {"score": 1.0, "labels": {"line": 3}},
    ]
    [found] = needle_maps([made_up_records.record("needle", "m", "int4") | {"details": details}])
    assert (found.depths, found.lengths) == ((0.0, 0.5), (64, 128))
    assert found.cells == {(0.5, 64): (0.5, 2), (0.0, 128): (1.0, 1)}
    assert found.score == pytest.approx(2 / 3)


def test_other_tasks_have_no_heat_map():
    assert needle_maps([made_up_records.record("line-retrieval", "m", "int4")]) == []


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.002, "0.0020"), (1.26, "1.3"), (8.1e-5, "8.1e-05")])
def test_a_divergence_has_two_digits(value, text):
    assert divergence(value) == text


def test_what_is_missing_or_not_a_number_is_shown_and_sorted_last():
    column = next(column for column in COLUMNS if column.key == "kl_mean")
    assert (column.text({"kl_mean": None}), column.sort_value({"kl_mean": None})) == ("–", "")
    assert (column.text({"kl_mean": math.nan}), column.sort_value({"kl_mean": math.nan})) == ("nan", "")
