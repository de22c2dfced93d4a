"""The page holds all that it needs, says what the records say, and text from outside stays text. Pictures are drawn."""

import json
import re
from datetime import date
from itertools import pairwise
from statistics import stdev
from types import SimpleNamespace

import made_up_records
import pytest

from mikv.cache_names import is_installed
from mikv.lab.report import page as page_module
from mikv.lab.report.page import page
from mikv.lab.report.pictures import _rows, draw
from mikv.lab.report.records import read_eval_records

pytestmark = pytest.mark.skipif(not is_installed("plotly"), reason="needs plotly: pip install 'mikv[report]'")


@pytest.fixture
def made(records_file, tiny_map, monkeypatch):
    """The page, with a placeholder for plotly."""
    monkeypatch.setattr(page_module, "import_module", lambda name: SimpleNamespace(get_plotlyjs=lambda: "/* plotly */"))
    return page(read_eval_records([records_file]), tiny_map, ["records.jsonl"], date(2026, 1, 2))


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_the_page_refers_to_nothing_outside(made):
    assert not re.search(r"""(src|href|url|import)\s*[=(]\s*['"]?\s*(https?:)?//""", made)
    assert re.findall(r"<link[^>]*>", made) == ['<link rel="icon" href="data:,">']
    assert "<script src" not in made
    assert "default-src 'none'" in made


def test_the_page_says_how_many_records_it_shows_and_from_where(made):
    assert "20 caches, 2 models, 3 tasks, 117 records · records.jsonl · 2 January 2026" in made


def test_every_measured_cell_is_a_row(made):
    rows = re.findall(r"<tr data-model=.*?</tr>", made)
    assert len(rows) == len(made_up_records.TASKS) * len(made_up_records.MODELS) * len(made_up_records.CACHES)


def test_points_and_fronts_are_in_the_data(made):
    [small, _] = data_of(made)["curves"]
    assert list(small["tasks"]) == ["overview", *made_up_records.TASKS]
    view = small["tasks"]["overview"]
    assert {point["cache"] for point in view["points"]} == set(made_up_records.CACHES) - {"full"}
    assert view["full_score"] == 1
    assert view["fronts"]["kl"][1:] == ["mikv:small", "mikv:balanced", "mikv:lossless", "int8"]


def uneven_records(model="m"):
    """As one evaluates: all caches on texts, some on one task, fewer on another, one on tasks alone."""
    texts, first, second = ("text:kind=prose", "text:kind=code"), "line-retrieval", "needle:length=1024"
    made = [made_up_records.record(task, model, cache) for task in texts for cache in made_up_records.CACHES]
    made = [record for record in made if record["cache"] != "h2o@0.25"]
    some = ("full", "mikv:small", "int4", "h2o@0.25")
    made += [made_up_records.record(first, model, cache) for cache in some]
    return made + [made_up_records.record(second, model, cache) for cache in some[:2]]


def read(made, folder):
    return read_eval_records([made_up_records.write(folder / "a.jsonl", made)])


def test_the_page_opens_with_every_cache_that_was_measured(tmp_path):
    html = page(read(uneven_records(), tmp_path), None, ["a.jsonl"], date(2026, 1, 2))
    [model] = data_of(html)["curves"]
    name, view = next(iter(model["tasks"].items()))
    assert {point["cache"] for point in view["points"]} == set(made_up_records.CACHES) - {"full"}
    assert view["extents"]["score"] == "line-retrieval"
    assert view["extents"]["kl"] == "mean over text:kind=prose, text:kind=code"
    assert name in re.search(r'<select id="curve-task">.*?</option>', html)[0]
    # the summary is of the same panel, and says so
    assert "<small>mean over text:kind=prose, text:kind=code</small>" in html


@pytest.mark.skipif(not is_installed("matplotlib"), reason="needs matplotlib: pip install 'mikv[report]'")
def test_pictures_show_the_numbers_of_the_page(tmp_path, monkeypatch):
    found = read([*uneven_records(), *made_up_records.records()], tmp_path)
    curves = data_of(page(found, None, ["a.jsonl"], date(2026, 1, 2)))["curves"]
    monkeypatch.setattr("matplotlib.pyplot.close", lambda figure: figures.append(figure))
    figures = []
    draw(found, None, tmp_path / "png")
    assert len(figures) == len(curves) == 3
    for figure, model in zip(figures, curves, strict=True):
        view = next(iter(model["tasks"].values()))
        for axes, value in zip(figure.axes, ("score", "kl"), strict=True):
            drawn = [tuple(at) for one in axes.collections for at in getattr(one, "get_offsets", list)().tolist()]
            drawn = [at for at in drawn if at != (0.0, 0.0)]
            wanted = [(point["ratio"], point[value]) for point in view["points"] if point[value] is not None]
            assert len(drawn) == len(wanted) > 0
            assert sum(sorted(drawn), ()) == pytest.approx(sum(sorted(wanted), ()))
            assert view["extents"][value].replace("mean over ", "") in axes.get_title(loc="left").replace("\n", " ")
            names = {text.get_text() for text in axes.texts}
            assert {"kivi4", "zipcache", "quanto4"} <= names or value == "score"


def test_bars_are_the_standard_error_over_samples(made):
    view = data_of(made)["curves"][0]["tasks"][made_up_records.TASKS[2]]
    for point in view["points"]:
        details = made_up_records.record(made_up_records.TASKS[2], made_up_records.MODELS[0], point["cache"])["details"]
        kl = [detail["kl_mean"] for detail in details]
        assert point["kl_stderr"] == pytest.approx(stdev(kl) / len(kl) ** 0.5)
        assert point["score_stderr"] is None


def test_a_page_without_scores_has_no_chart_of_scores(tmp_path):
    texts = [record for record in uneven_records() if record["score"] is None]
    html = page(read(texts, tmp_path), None, ["a.jsonl"], date(2026, 1, 2))
    assert re.findall(r'data-value="(\w+)"', html) == ["kl"]
    skipped = made_up_records.skipped("a", "m", "quanto4", "not installed")
    html = page(read([skipped], tmp_path), None, ["a.jsonl"], date(2026, 1, 2))
    assert 'class="chart"' not in html
    assert "<section hidden>\n<h2>Size and quality" in html


def ratio_of_contrast(one, other):
    """As the guidelines for accessible pages define it, of two colors like #1f2328."""

    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_words_of_the_precision_map_can_be_read_and_its_tiers_told_apart(made):
    themes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", made, re.DOTALL)]
    assert len(themes) == 2
    for theme in themes:
        surface = "#ffffff" if theme["surface"] == "#fff" else theme["surface"]
        for tier in ("high", "kept"):
            assert ratio_of_contrast(theme["ink"], theme[tier]) >= 4.5
            assert ratio_of_contrast(surface, theme[tier]) >= 2.5


def test_skipped_caches_circumstances_and_meanings_are_told(made):
    assert "kvpress:knorm@0.25 on smollm2: kvpress 0.4 needs transformers &lt; 5; this is 5.23.0" in made
    assert "An Ordinary Processor, 2 cores, 2 threads; kernels: avx2; python 3.11.2" in made
    assert made.count("mikv eval line-retrieval:lines=40 ") == 2
    assert "<dt>KL p99</dt><dd>Its 99th percentile" in made


def test_the_map_is_in_the_data_and_its_markup_stays_text(made, tiny_map):
    data = data_of(made)["map"]
    assert "".join(data["texts"]) == "".join(tiny_map.texts)
    assert "</script> & <b>日本</b>" in "".join(data["texts"])


def test_names_from_records_stay_text(tmp_path):
    nasty = made_up_records.record("<i>task</i>", '"><script>alert(1)</script>', "int4")
    found = read_eval_records([made_up_records.write(tmp_path / "a.jsonl", [nasty])])
    html = page(found, None, ["<a>.jsonl"], date(2026, 1, 2))
    assert "<i>task</i>" not in html
    assert "<script>alert(1)" not in html
    assert "<a>.jsonl" not in html


def test_a_page_of_skipped_cells_alone_is_made(tmp_path):
    skipped = made_up_records.skipped("a", "m", "quanto4", "not installed")
    found = read_eval_records([made_up_records.write(tmp_path / "a.jsonl", [skipped])])
    html = page(found, None, ["a.jsonl"], date(2026, 1, 2))
    assert "quanto4 on m: not installed" in html
    assert data_of(html)["map"] is None


@pytest.mark.skipif(not is_installed("matplotlib"), reason="needs matplotlib: pip install 'mikv[report]'")
def test_pictures_of_every_model_and_of_the_map_are_drawn(records_file, tiny_map, tmp_path):
    files = draw(read_eval_records([records_file]), tiny_map, tmp_path / "png")
    assert [file.name for file in files] == [
        "curves-smollm2.png",
        "curves-Qwen2.5-Coder-0.5B-Instruct.png",
        "precision-map.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_rows_of_the_picture_hold_every_token_once_and_break_where_they_are_full():
    texts = ["a" * 60, " " + "b" * 60, "c\nd", "", "e" * 300]
    rows = _rows(texts)
    said = {index: "".join(piece for row in rows for _, i, piece in row if i == index) for index in range(5)}
    assert said == {0: texts[0], 1: texts[1].strip(), 2: "cd", 3: "", 4: texts[4]}
    for row in rows:
        ends = [(column, column + len(piece)) for column, _, piece in row]
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert all(end <= 116 for _, end in ends)
