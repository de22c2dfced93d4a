"""`mikv check`: exit codes, the verdict in words, the JSON contract."""

import json

import pytest

from mikv.lab import check
from mikv.lab.check import Criteria
from mikv.lab.key_outliers import KeyOutliers

LOOSE, STRICT = Criteria(10.0, 0.0, 1.0), Criteria(1e-9, 1.0, 0.0)


@pytest.fixture
def short(monkeypatch):
    """Short tasks; nothing meets the criteria of balanced, everything those of the others."""
    monkeypatch.setattr(check, "TEXT_LENGTHS", (100,))
    monkeypatch.setattr(check, "CONVERSATIONS", ())
    monkeypatch.setattr(check, "CRITERIA", {"small": LOOSE, "balanced": STRICT, "lossless": LOOSE})


@pytest.mark.parametrize(
    ("preset", "code", "word", "recommended"),
    [
        ("balanced", 1, "FAIL: balanced", "none of these presets meets the criteria of balanced; keep the full cache"),
        ("lossless", 0, "PASS: lossless", "small, the smallest that meets the criteria of lossless"),
    ],
)
def test_the_exit_code_and_the_last_lines_tell(mikv, tiny_folder, short, preset, code, word, recommended):
    result = mikv("check", "--model", tiny_folder, "--preset", preset, "--minutes", 0)
    assert result.exit_code == code, result.output
    assert word in result.stdout
    assert result.stdout.splitlines()[-1] == f"recommended: {recommended}"
    assert f"all presets are held to the criteria of {preset}: KL at most" in " ".join(result.stdout.split())
    assert ("text:prompt=100 KL" in result.stdout.splitlines()[-2]) == (code == 1)


def test_balanced_is_what_is_asked_for_by_default(mikv, tiny_folder, short):
    result = mikv("check", "--model", tiny_folder, "--minutes", 0, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["preset"], found["passed"], found["recommended"]) == ("balanced", False, None)


@pytest.mark.parametrize(
    ("transformed", "words"), [(2.0, "neither bytes nor quality are at risk"), (30.0, "expect it to be at risk")]
)
def test_outlier_keys_are_a_warning_with_the_worst_layers(mikv, tiny_folder, short, monkeypatch, transformed, words):
    layers = [KeyOutliers(3, 40.0, transformed), KeyOutliers(4, 2.0, 1.0), KeyOutliers(5, 90.0, transformed)]
    monkeypatch.setattr(check, "key_outliers", lambda *args: layers)
    result = mikv("check", "--model", tiny_folder, "--minutes", 0)
    assert "warning: outlier keys in 2 layers" in result.stdout
    assert f"5 (90 to {transformed}), 3 (40 to {transformed})" in result.stdout
    assert words in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "tiny"), "unknown preset 'tiny'"),
        (("--minutes", "-1"), "--minutes -1 must be 0 or more"),
        (("--minutes", "nan"), "--minutes nan must be 0 or more"),
        (("--minutes", "1e30"), "--minutes 1e+30 must be 0 or more, and at most 10,000"),
        (("--model", "./nowhere"), "does not exist"),
    ],
)
def test_what_cannot_be_checked_has_exit_code_2(refused, options, message):
    assert message in refused("check", *options)


@pytest.mark.bundled
def test_the_bundled_model_passes_with_balanced(mikv, monkeypatch):
    monkeypatch.setattr(check, "CONVERSATIONS", ("needle:length=500",))
    monkeypatch.setattr(check, "TEXT_LENGTHS", (512,))
    result = mikv("check", "--minutes", 0, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found
    assert found["recommended"] in ("balanced", "small")
    assert found["left_out"] == {}
    [needle] = [f for f in found["verdicts"][1]["findings"] if f["task"].startswith("needle")]
    assert needle["value"] == 0.0
