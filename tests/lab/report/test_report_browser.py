"""The page in headless Chromium: clicks, filters, the precision map, hovering; nothing fetched, no error logged."""

import shutil
from contextlib import contextmanager
from datetime import date

import made_up_records
import pytest

from mikv.cache_names import is_installed
from mikv.lab.report.page import page
from mikv.lab.report.records import read_eval_records

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
    pytest.mark.skipif(not is_installed("playwright"), reason="needs playwright: pip install 'mikv[dev]'"),
    pytest.mark.skipif(not is_installed("plotly"), reason="needs plotly: pip install 'mikv[report]'"),
]
NUM_RECORDS = len(made_up_records.TASKS) * len(made_up_records.MODELS) * len(made_up_records.CACHES)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_map):
    folder = tmp_path_factory.mktemp("report")
    records = made_up_records.write(folder / "records.jsonl", made_up_records.records())
    html = page(read_eval_records([records]), tiny_map, ["records.jsonl"], date(2026, 1, 2))
    (folder / "out.html").write_text(html, encoding="utf-8")
    return folder / "out.html"


@contextmanager
def opened(browser, file, **settings):
    """The page without a network; at the end it must have asked for nothing else and complained of nothing."""
    context = browser.new_context(offline=True, **settings)
    tab, requests, complaints = context.new_page(), [], []
    tab.on("request", lambda asked: requests.append(asked.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(file.as_uri())
    tab.wait_for_selector(".chart .main-svg")
    yield tab
    context.close()
    assert requests == [file.as_uri()]
    assert complaints == []


@pytest.fixture
def shown(browser, file):
    """The page on a laptop."""
    with opened(browser, file, viewport={"width": 1280, "height": 900}, color_scheme="light") as tab:
        yield tab


def cells(tab, column):
    return tab.locator(f"#records tbody tr:not([hidden]) td:nth-child({column})").all_text_contents()


def test_a_click_on_a_header_sorts_and_another_one_turns_it_around(shown):
    column = shown.locator("#records th").all_text_contents().index("of fp16") + 1
    before = cells(shown, column)
    header = shown.locator(f"#records th:nth-child({column})")
    header.locator("button").click()
    ascending = cells(shown, column)
    assert ascending != before
    assert ascending == sorted(before, key=lambda text: float(text.removesuffix(" %")))
    assert header.get_attribute("aria-sort") == "ascending"
    header.locator("button").click()
    assert [float(text.removesuffix(" %")) for text in cells(shown, column)] == sorted(
        (float(text.removesuffix(" %")) for text in before), reverse=True
    )


def test_missing_numbers_are_last_in_both_directions(shown):
    column = shown.locator("#records th").all_text_contents().index("Δ ppl") + 1
    for _ in range(2):
        shown.locator(f"#records th:nth-child({column}) button").click()
        found = cells(shown, column)
        assert "–" not in found[: NUM_RECORDS // 3]
        assert set(found[NUM_RECORDS // 3 :]) == {"–"}


def test_typing_and_choosing_filter_the_rows(shown):
    assert len(cells(shown, 1)) == NUM_RECORDS
    shown.locator("#find").fill("mikv:bal")
    assert len(cells(shown, 1)) == len(made_up_records.TASKS) * len(made_up_records.MODELS)
    shown.locator("[data-filter=model]").select_option("smollm2")
    assert len(cells(shown, 1)) == len(made_up_records.TASKS)
    assert shown.locator("#shown").text_content() == f"3 of {NUM_RECORDS} records"
    shown.locator("#find").fill("")
    shown.locator("[data-filter=family]").select_option("eviction")
    assert {name.split()[-1] for name in cells(shown, 1)} == {"h2o@0.25", "snapkv@0.25", "streaming@0.25"}


def test_a_task_and_the_families_to_draw_are_chosen(shown):
    points = (
        "document.querySelectorAll('.chart')[1].data.reduce((sum, trace) => sum + (trace.hovertext?.length ?? 0), 0)"
    )
    assert shown.evaluate(points) == len(made_up_records.CACHES) - 1
    shown.locator(".chip[data-family=eviction]").click()
    assert shown.evaluate(points) == len(made_up_records.CACHES) - 1 - 3
    heights = "JSON.stringify(document.querySelectorAll('.chart')[1].data.map((trace) => trace.y))"
    before = shown.evaluate(heights)
    shown.locator("#curve-task").select_option(made_up_records.TASKS[0])
    assert shown.evaluate(heights) != before


def test_hovering_a_point_tells_the_cache_and_its_numbers(shown):
    chart = shown.locator(".chart").first
    chart.scroll_into_view_if_needed()
    chart.locator(".points path").first.hover(force=True)
    label = chart.locator(".hoverlayer .hovertext")
    label.wait_for()
    assert "% of fp16" in label.text_content()


def test_the_map_shows_the_text_and_changes_with_layer_and_head(shown, tiny_map):
    spans = shown.locator("#map-text [data-at]")
    assert spans.count() == len(tiny_map.texts)
    all_spans = "[...document.querySelectorAll('#map-text [data-at]')]"
    fills = f"{all_spans}.map((span) => +span.style.getPropertyValue('--fill'))"
    shares = [share**0.5 for share in tiny_map.share_high().tolist()]
    assert shown.evaluate(fills) == pytest.approx(shares, abs=1e-5)
    shown.locator("#map-layer").select_option("1")
    shown.locator("#map-head").select_option("0")
    assert shown.evaluate(fills) == tiny_map.layers[1].high[0].float().tolist()


def test_hovering_a_token_tells_its_text_tier_score_and_position(shown, tiny_map):
    shown.locator("#map-layer").select_option("0")
    shown.locator("#map-head").select_option("1")
    at = int(tiny_map.layers[0].priority[1, 4:60].argmax()) + 4
    shown.locator(f'#map-text [data-at="{at}"]').hover()
    tip = shown.locator("#map-tip")
    assert tip.is_visible()
    words = tip.text_content()
    assert tiny_map.texts[at] in words
    assert f"position {at} of {len(tiny_map.texts)}" in words
    assert "high tier" in words
    assert f"score {float(f'{tiny_map.layers[0].priority[1, at]:.3g}')}" in words
    shown.locator("h1").hover()
    assert tip.is_hidden()


def test_a_click_on_the_strip_chooses_the_layer(shown):
    shown.locator("#map-strip").scroll_into_view_if_needed()
    box = shown.locator("#map-strip .nsewdrag").bounding_box()
    shown.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.75)
    assert shown.locator("#map-layer").input_value() == "1"


def test_the_arrow_keys_go_from_token_to_token(shown, tiny_map):
    shown.locator("#map-text").focus()
    for _ in range(3):
        shown.keyboard.press("ArrowRight")
    assert f"position 2 of {len(tiny_map.texts)}" in shown.locator("#map-tip").text_content()


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """A page with names as long as they come."""
    folder = tmp_path_factory.mktemp("long")
    settings = "mikv:balanced+importance_ratio=0+min_recent=0+low_k=int3+policy_options={}+warmup_tokens=128"
    model, task = (
        "models/An-Uncommonly-Long-Name-Of-A-Model-0.5B-Instruct",
        "variable-tracking:chains=4,hops=3,length=2000",
    )
    made = [
        made_up_records.record(task, model, "int4") | {"cache": cache, "task": one}
        for cache in (settings, "int4")
        for one in (task, "text")
    ]
    made += [made_up_records.skipped(task, model, "q" * 90, "needs " + "w" * 120)]
    html = page(
        read_eval_records([made_up_records.write(folder / "a.jsonl", made)]), None, ["b" * 90], date(2026, 1, 2)
    )
    (folder / "out.html").write_text(html, encoding="utf-8")
    return folder / "out.html"


@pytest.mark.parametrize("width", [320, 390, 800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser, file, long_names, width, scheme):
    for one in (file, long_names):
        with opened(browser, one, viewport={"width": width, "height": 800}, color_scheme=scheme) as tab:
            assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_a_task_without_scores_shows_no_chart_of_them(shown):
    assert shown.locator(".chart:visible").count() == 4
    shown.locator("#curve-task").select_option(made_up_records.TASKS[2])
    assert shown.locator(".chart:visible").count() == 2
    assert shown.locator(".extent:visible").all_text_contents() == [made_up_records.TASKS[2]] * 2


def test_a_dark_phone_shows_all_of_it_and_a_tap_tells_of_a_token(browser, file, tiny_map):
    phone = {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    with opened(browser, file, **phone) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tip = tab.locator("#map-tip")
        tab.locator('#map-text [data-at="30"]').tap()
        assert f"position 30 of {len(tiny_map.texts)}" in tip.text_content()
        assert tip.is_visible()
        box = tip.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        tab.locator("#map h2").tap()
        assert tip.is_hidden()


def test_the_charts_follow_the_theme(shown):
    color = "document.querySelector('.chart').data[1].marker.color"
    light = shown.evaluate(color)
    shown.emulate_media(color_scheme="dark")
    changed = f"{color} !== '{light}' ? done(true) : setTimeout(look, 20)"
    assert shown.evaluate(f"() => new Promise((done) => {{ const look = () => {changed}; look(); }})")
