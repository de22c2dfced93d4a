"""No control character of a model, a file or a name reaches the terminal, whatever command shows it and however."""

import io
import json
import re
import sys
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from typer.testing import CliRunner

from mikv.cli import app, check, demo, eval, print_error, sweep
from mikv.cli.measuring import bar
from mikv.cli.terminal import console, log_visibly, plain_where_unicode_ends, spinner, visible, writer

KINDS = ("Cc", "Cf", "Zl", "Zp")
HIDDEN = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in KINDS]
MARKUP, ESCAPES = "[red]x[/red] [/] [link=file:///]:smile:", "\x1b]52;c;eA==\x07\x1b[2J\r"
HOSTILE = "".join([*map(chr, range(256)), *HIDDEN, MARKUP, ESCAPES])


def assert_harmless(shown):
    """Nothing but newlines, tabs and what can be seen; no style that the text asked for."""
    found = {character for character in shown if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert found <= {"\n", "\t"}, found


def shown_in_full(shown):
    folded = re.sub(r"\s", "", shown)
    return all(part in folded for part in (r"\x1b]52;c;eA==\x07\x1b[2J\r", "[red]x[/red][/][link=file:///]:smile:"))


def test_every_control_character_is_spelled_out():
    for character in HIDDEN:
        expected = character if character in "\n\t" else character.encode("unicode_escape").decode()
        assert visible(f"a{character}b") == f"a{expected}b"
    assert visible("\ud800\udcff") == r"\ud800\udcff"


def test_what_can_be_seen_stays_as_it_is():
    for text in ("Grüße, 世界! ½ µ  ́", "می‌خواهم", "क्‍ष", "👨‍👩‍👧", "❤️‍🔥", "tab\tand\nnewline", "\\x1b"):
        assert visible(text) == text


def test_joiners_elsewhere_are_spelled_out():
    assert visible("pay‍pal‌‍") == r"pay\u200dpal\u200c\u200d"
    assert visible("‍") == r"\u200d"


@given(st.text(), st.data())
def test_the_pieces_of_a_stream_are_shown_as_the_whole(text, data):
    cut = data.draw(st.integers(0, len(text)))
    assert visible(text[:cut]) + visible(text[cut:], text[:cut]) == visible(text)


@pytest.mark.parametrize("color", ["", "1"])
def test_consoles_show_text_of_every_kind_of_place_as_it_is(monkeypatch, color):
    monkeypatch.setenv("FORCE_COLOR", color)
    monkeypatch.setenv("TERM", "dumb" if color else "xterm")
    out = io.StringIO()
    with redirect_stdout(out):
        table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE, show_footer=True, box=None)
        table.columns[0].footer, table.columns[0].overflow = HOSTILE, "fold"
        table.add_row(HOSTILE)
        console().print(HOSTILE, table, f"{HOSTILE}", soft_wrap=True)
    assert_harmless(out.getvalue())
    assert shown_in_full(out.getvalue())


def test_streams_spinners_bars_errors_and_logs_too(monkeypatch, caplog):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        write = writer()
        for character in HOSTILE:
            write(character)
        print_error(HOSTILE)
        with spinner() as show:
            show(HOSTILE)
        with bar(quiet=False) as show:
            show(HOSTILE, 1, 2)
    assert_harmless(out.getvalue())
    assert shown_in_full(out.getvalue())
    assert_harmless(re.sub(r"\x1b\[[\d;?]*[mhlAK]|\r", "", err.getvalue()))  # rich's own styles and cursor


def test_log_records_of_any_library_are_spelled_out():
    import logging

    before = logging.getLogRecordFactory()
    try:
        log_visibly()
        record = logging.getLogger("transformers").makeRecord("x", 30, "", 0, "tensor %s", (HOSTILE,), None)
        assert_harmless(record.getMessage())
    finally:
        logging.setLogRecordFactory(before)


class Hostile(dict):
    """A record, row or report in which every name is hostile text."""

    def __missing__(self, key):
        return HOSTILE


def test_answers_of_generate_and_chat(tiny_folder, monkeypatch):
    monkeypatch.setattr("mikv.cli.answer._Streamer.put", lambda self, value: self._say())

    def say(self):
        self.first_token_at = self.last_token_at = 1e9
        for character in HOSTILE:
            self.on_finalized_text(character)

    monkeypatch.setattr("mikv.cli.answer._Streamer._say", say, raising=False)
    options = ["-m", str(tiny_folder), "--max-new-tokens", "1"]
    for command, stdin in ((["generate", "hi"], None), (["chat"], "hi\n")):
        result = CliRunner().invoke(app, [*command, *options], input=stdin)
        assert result.exit_code == 0, result.output
        assert_harmless(result.stdout)
        assert shown_in_full(result.stdout)


def test_json_holds_the_text_as_it_is_and_the_terminal_none_of_it(tiny_folder, monkeypatch):
    from mikv.cli.answer import Answer

    said = Answer((1,), HOSTILE, 1, 1, 1.0, 1.0)
    monkeypatch.setattr("mikv.cli.answer.answer", lambda *_: said)
    result = CliRunner().invoke(app, ["generate", "hi", "-m", str(tiny_folder), "--json"])
    assert_harmless(result.stdout)
    assert json.loads(result.stdout)["text"] == HOSTILE


def test_tables_of_eval_demo_check_and_sweep():
    numbers = dict.fromkeys(("score", "ratio", "kl_mean", "kl_p99", "top1_agreement", "decode_tokens_per_second"), 0.5)
    record = Hostile(numbers, samples=1, score_stderr=None, skipped=None)
    row = SimpleNamespace(
        cache=HOSTILE,
        correct=True,
        answer=HOSTILE,
        bytes=1,
        ratio=1.0,
        decode_tokens_per_second=1.0,
        kl_to_full=0.0,
        top1_agreement=1.0,
    )
    finding = SimpleNamespace(task=HOSTILE, criterion=HOSTILE, passed=False, value=1.0, limit=1.0)
    verdict = SimpleNamespace(preset=HOSTILE, skipped=None, findings=[finding], passed=False)
    report = SimpleNamespace(
        preset="balanced",
        model=HOSTILE,
        samples=1,
        verdicts=[verdict],
        verdict=verdict,
        bytes_at={1: {HOSTILE: 1}},
        left_out={HOSTILE: HOSTILE},
        uncompressed={0: HOSTILE},
        num_layers=1,
        outliers=(),
        recommended=HOSTILE,
    )
    arm = SimpleNamespace(
        label=HOSTILE, cache=HOSTILE, ratio=1.0, measured_ratio=1.0, kl_mean=0.0, kl_p99=0.0, top1_agreement=1.0
    )
    choice = SimpleNamespace(budget=0.5, best=arm, uniform=arm, gain=1.0)
    outcome = SimpleNamespace(model=HOSTILE, arms=[arm], front={HOSTILE}, choices=[choice])
    out = io.StringIO()
    with redirect_stdout(out):
        eval._print([record, Hostile(record, skipped=HOSTILE)])
        console().print(demo._answers((row,)), demo._table((row,)))
        check._print(report)
        sweep._print(outcome, 10, [{"skipped": HOSTILE}])
    assert_harmless(out.getvalue())


def test_an_encoding_that_lacks_characters_gets_them_spelled_out():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii")
    with redirect_stdout(stream), plain_where_unicode_ends():
        print("±½… ✓ 世 \udcff \U0001f600")
    assert stream.errors == "strict"
    stream.flush()
    assert raw.getvalue() == b"+-\\xbd... + \\u4e16 \\udcff \\U0001f600\n"
