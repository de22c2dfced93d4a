"""Records, the tables and the pictures made of them."""

import pytest

from mikv.bench import plots
from mikv.bench.pages import page_of
from mikv.bench.plots import draw, label_heights
from mikv.bench.records import read_records, records_of
from mikv.cache_names import is_installed
from mikv.errors import ConfigError
from mikv.records import require_writable, write_lines

MACHINE = {
    "threads": 1,
    "hardware": "a processor, 2 cores",
    "isa": "avx2",
    "versions": {"torch": "2.13"},
    "command": "mikv bench it",
}


def generate_rows():
    rows = []
    for context in (64, 4096):
        for cache, speed in (("full", 10.0), ("mikv:balanced", 25.0), ("quanto4", None)):
            row = {"cache": cache, "context": context, "skipped": None if speed else "needs optimum-quanto"}
            names = ("decode_tokens_per_second", "prefill_tokens_per_second", "time_to_first_token_s")
            row |= dict.fromkeys(names, speed)
            row |= {
                "cache_bytes": context * 1000,
                "peak_rss_growth_bytes": None,
                "decode_peak_rss_growth_bytes": 3 << 20,
            }
            rows.append(row)
    return rows


def attention_rows():
    numbers = {"ms": 2.5, "bytes": 1 << 20, "gbps": 7.0, "bandwidth_share": 0.5, "rel_error": 1e-3}
    numbers |= {"ideal_fp16_speedup": 2.2, "skipped": None}
    missing = dict.fromkeys(numbers) | {"skipped": "not there"}
    return [
        {"kernel": "mikv", "config": "balanced", "upkeep_share": 0.04} | numbers,
        {"kernel": "sdpa_fp32", "config": "float32"} | numbers,
        {"kernel": "quantized_cache_quanto4", "config": "int4"} | missing,
    ]


def matmul_rows():
    numbers = {"ms_cold": 0.5, "ms_warm": 0.25, "bits_per_weight": 3.5, "bytes": 1 << 20, "gbps": 7.0}
    numbers |= {"speedup_cold": 9.5, "speedup_warm": 12.0, "bandwidth_share": 0.5, "rel_error": 1e-3}
    numbers |= {"format_error": 0.17, "skipped": None}
    missing = dict.fromkeys(numbers) | {"skipped": "needs onnxruntime"}
    names = (("mikv", 3), ("torch_fp32", 32), ("llama.cpp_Q3_K", 3))
    rows = [{"kernel": kernel, "bits": bits, "rows": n} | numbers for n in (1, 128) for kernel, bits in names]
    return [*rows, *({"kernel": "onnxruntime", "bits": 2, "rows": n} | missing for n in (1, 128))]


@pytest.fixture
def generated():
    setting = {"model": "folder/smollm2", "dtype": "float32", "new_tokens": 32, "repeats": 3}
    return records_of("generate", MACHINE | setting | {"rows": generate_rows()})


@pytest.fixture
def attended():
    shape = {"tokens": 32768, "heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1}
    setting = {"stream_gbps": 14.0, "stream_method": "a kernel", "shape": shape}
    setting |= {"cold_bytes": 64 << 20, "last_level_cache_bytes": 32 << 20}
    return records_of("attention", MACHINE | setting | {"rows": attention_rows()})


@pytest.fixture
def multiplied():
    setting = {"stream_gbps": 14.0, "stream_method": "a kernel", "shape": {"m": 4096, "k": 4096, "group_size": 128}}
    setting |= {"cold_bytes": 64 << 20, "last_level_cache_bytes": 32 << 20, "peer_options": {"onnxruntime": "options"}}
    return records_of("matmul", MACHINE | setting | {"rows": matmul_rows()})


def test_a_record_says_all_about_its_row(generated):
    assert all(MACHINE.items() <= record.items() for record in generated)
    assert [record["cache"] for record in generated[:3]] == ["full", "mikv:balanced", "quanto4"]


def test_records_survive_a_file(tmp_path, generated):
    write_lines(tmp_path / "r.jsonl", generated)
    assert read_records(tmp_path / "r.jsonl") == generated


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no records of mikv bench"),
        ('{"cache": "full"}\n', "has no records of mikv bench"),
        ("[1]\n", "a line is not a JSON object"),
        ("{", "cannot read records from"),
        ('{"bench": "attention"}\n{"bench": "generate"}\n', "has records of several benches"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_records(tmp_path / "r.jsonl")


def test_a_page_compares_with_the_full_cache_and_lists_what_was_skipped(generated):
    page = page_of(generated)
    assert page.title == "Decoding with smollm2"
    assert [row[:4] for row in page.rows] == [
        ("full", "64", "10.0", "1.00×"),
        ("mikv:balanced", "64", "25.0", "2.50×"),
        ("full", "4,096", "10.0", "1.00×"),
        ("mikv:balanced", "4,096", "25.0", "2.50×"),
    ]
    assert page.skipped == ("quanto4: needs optimum-quanto",)


def test_an_attention_page_has_a_column_for_upkeep_only_if_it_was_measured(attended):
    assert page_of(attended).columns[-1] == "upkeep"
    assert [row[-1] for row in page_of(attended).rows] == ["+4.0%", ""]
    assert page_of(attended[1:]).columns[-1] == "error"


def test_a_matmul_page_names_kernels_with_their_bits_and_what_was_skipped_once(multiplied):
    page = page_of(multiplied)
    expected = ("mikv 3", "1", "3.50", "0.500", "0.250", "9.50", "7.0", "50%", "1e-03", "0.170")
    assert page.rows[0] == expected
    assert [row[:2] for row in page.rows[1:4]] == [("torch_fp32", "1"), ("llama.cpp_Q3_K", "1"), ("mikv 3", "128")]
    assert page.skipped == ("onnxruntime 2: needs onnxruntime",)
    assert "onnxruntime: options." in page.circumstances


@pytest.mark.parametrize("bench", ["generated", "attended", "multiplied"])
def test_markdown_states_command_and_hardware_and_has_whole_rows(bench, request, tmp_path):
    page = page_of(request.getfixturevalue(bench))
    text = page.to_markdown(tmp_path / "picture.png")
    assert "    mikv bench it\n" in text
    assert "1 thread on a processor, 2 cores; kernels: avx2; torch 2.13" in text
    assert "](picture.png)" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(page.columns) + 1}


@pytest.mark.parametrize("bench", ["generated", "attended", "multiplied"])
@pytest.mark.skipif(not is_installed("matplotlib"), reason="needs matplotlib")
@pytest.mark.filterwarnings("default")
def test_pictures_are_drawn(bench, request, tmp_path):
    draw(request.getfixturevalue(bench), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ({"a": 0.0, "b": 10.0}, {"a": 0.0, "b": 10.0}),
        ({"a": 10.0, "b": 10.2}, {"a": 9.6, "b": 10.6}),
        ({"c": 10.4, "a": 10.0, "b": 10.2}, {"a": 9.2, "b": 10.2, "c": 11.2}),
        ({"a": 0.0, "b": 0.1}, {"a": 0.0, "b": 1.0}),
    ],
)
def test_labels_that_would_touch_move_apart_around_their_middle_and_not_below_the_axis(heights, expected):
    assert label_heights(heights, gap=1.0) == pytest.approx(expected)


def test_drawing_without_matplotlib_says_how_to_get_it(generated, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "is_installed", lambda package: False)
    with pytest.raises(ConfigError, match=r"plots need matplotlib: pip install 'mikv\[bench\]'"):
        draw(generated, tmp_path / "p.png")


def test_nothing_can_be_drawn_of_rows_that_were_all_skipped(generated, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "is_installed", lambda package: True)
    skipped = [record for record in generated if record["skipped"]]
    with pytest.raises(ConfigError, match="every row was skipped, the first one because: needs optimum-quanto"):
        draw(skipped, tmp_path / "p.png")


def test_destinations_are_checked_by_ending_and_folder(tmp_path):
    require_writable(None, ".png", "--plot")
    require_writable(tmp_path / "p.png", ".png", "--plot")
    with pytest.raises(ConfigError, match=r"--plot p\.jpg must end in \.png"):
        require_writable((tmp_path / "p.jpg").relative_to(tmp_path), ".png", "--plot")
    with pytest.raises(ConfigError, match="there is no folder"):
        require_writable(tmp_path / "no" / "p.png", ".png", "--plot")
