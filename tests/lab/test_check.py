"""`mikv check`: criteria, the recommended preset, outlier keys, and what is asked of which model."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from mikv.cache.config import BEST_FIRST, MiKVConfig
from mikv.errors import ConfigError, ModelNotFoundError
from mikv.lab import check
from mikv.lab.check import CRITERIA, Check, Criteria, Report, Verdict, _score_finding, _text_findings, criteria_of
from mikv.lab.examination import Answer, SampleResult
from mikv.lab.key_outliers import KeyOutliers, key_outliers, spread
from mikv.lab.recording import record
from mikv.models import LoadedModel, load_model
from tiny import tiny_model
from tiny_chat import chat_tokenizer, save_chat_model

LOOSE = Criteria(kl_mean=10.0, top1_agreement=0.0, score_loss=1.0)
STRICT = Criteria(kl_mean=1e-9, top1_agreement=1.0, score_loss=0.0)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short tasks, two samples at most."""
    monkeypatch.setattr(check, "TEXT_LENGTHS", (200, 100))
    monkeypatch.setattr(check, "CONVERSATIONS", ("needle:length=100,depths=2",))
    monkeypatch.setattr(check, "MAX_SAMPLES", 2)


@pytest.fixture
def criteria(monkeypatch):
    """Set the criteria of all presets, given those of `small`, `balanced` and `lossless`."""

    def use(small, balanced, lossless):
        monkeypatch.setattr(check, "CRITERIA", {"small": small, "balanced": balanced, "lossless": lossless})

    return use


def run(folder, preset="balanced", seconds=0.0):
    return Check(str(folder), preset).run(load_model(str(folder)), seconds)


def result(scores=(), kl=(0.01, 0.03), agreements=1):
    answers = tuple(Answer("", score, "") for score in scores)
    return SampleResult(answers, 10, 100, 400, kl, agreements, 1.0, 1.0, 2, None)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "loss", "limit", "passed"),
    [
        ([1.0] * 20, [1.0] * 18 + [0.0] * 2, 0.1, 0.05, False),
        ([1.0] * 20, [1.0] * 19 + [0.0], 0.05, 0.05, True),
        ([1.0] * 5, [1.0] * 4 + [0.0], 0.2, 0.2, True),  # one answer is chance
        ([1.0] * 5, [1.0] * 3 + [0.0] * 2, 0.4, 0.2, False),
        ([1.0], [0.0], 1.0, 0.05, False),  # but not if it is the only one
        ([1.0, 0.0], [0.0, 1.0], 0.0, 0.05, True),
    ],
)
def test_a_score_may_fall_by_its_share_or_by_one_answer_of_several(theirs, ours, loss, limit, passed):
    found = _score_finding("needle", [result(theirs)], [result(ours)], CRITERIA["balanced"])
    assert (found.value, found.limit, found.passed) == (pytest.approx(loss), pytest.approx(limit), passed)


def test_texts_are_judged_over_the_positions_of_all_samples():
    own = [result(kl=(0.001, 0.002, 0.003), agreements=3), result(kl=(0.010,), agreements=0)]
    kl, top1 = _text_findings("text", own, Criteria(0.004, 0.75, 0.0))
    assert (kl.value, kl.passed) == (pytest.approx(0.004), True)
    assert (top1.value, top1.passed) == (0.75, True)
    kl, top1 = _text_findings("text", own, Criteria(0.0039, 0.76, 0.0))
    assert not kl.passed
    assert not top1.passed


@pytest.mark.parametrize(
    ("passing", "recommended"),
    [(BEST_FIRST, "small"), (("lossless", "balanced"), "balanced"), (("lossless",), "lossless"), ((), None)],
)
def test_the_smallest_preset_that_passes_is_recommended(passing, recommended):
    sizes = {"lossless": 0.33, "balanced": 0.27, "small": 0.2}
    finding = _text_findings("text", [result()], LOOSE)[0]
    verdicts = tuple(
        Verdict(name, sizes[name], (replace(finding, passed=name in passing),), None) for name in BEST_FIRST
    )
    report = Report("m", "balanced", 1, 1.0, verdicts, (), {}, 2, {}, {})
    assert report.recommended == recommended
    assert report.verdict.passed == ("balanced" in passing)
    assert report.to_dict()["recommended"] == recommended


def test_a_preset_that_could_not_be_measured_does_not_pass():
    assert not Verdict("balanced", 0.27, (), "its head dim").passed


def test_presets_without_criteria_are_held_to_the_mildest():
    assert criteria_of("paper-int2") == CRITERIA["small"]


# --- a whole check ----------------------------------------------------------------------------------------------------


def test_a_check_asks_every_task_of_every_preset_and_is_json(tiny_folder, criteria):
    criteria(LOOSE, STRICT, LOOSE)
    report = run(tiny_folder)
    found = json.loads(json.dumps(report.to_dict()))
    assert (found["kind"], found["preset"], found["passed"], found["recommended"]) == (
        "check",
        "balanced",
        False,
        None,
    )
    assert [verdict["preset"] for verdict in found["verdicts"]] == list(BEST_FIRST)
    assert [(f["task"], f["criterion"]) for f in found["verdicts"][0]["findings"]] == [
        (task, criterion) for task in ("text:prompt=200", "text:kind=code,prompt=200") for criterion in ("KL", "top-1")
    ]
    assert found["samples"] == 1
    assert found["uncompressed"] == {}
    assert [layer["layer"] for layer in found["outliers"]] == [0, 1]
    assert list(found["bytes_at"]) == ["1024", "4096"]
    assert found["bytes_at"]["1024"]["small"] < found["bytes_at"]["1024"]["full"]


@pytest.mark.parametrize("asked", BEST_FIRST)
def test_every_preset_is_held_to_the_criteria_of_the_one_asked_for(tiny_folder, asked):
    """A laxer preset is not recommended because its own limits are laxer."""
    found = run(tiny_folder, asked).to_dict()
    assert found["criteria"] == {"of": asked} | vars(CRITERIA[asked])
    for verdict in found["verdicts"]:
        limits = {finding["criterion"]: finding["limit"] for finding in verdict["findings"]}
        assert limits["KL"] == CRITERIA[asked].kl_mean
        assert limits["top-1"] == CRITERIA[asked].top1_agreement


def test_a_task_that_the_model_fails_with_the_full_cache_does_not_count(tiny_folder):
    assert "nothing can be lost" in run(tiny_folder).left_out["needle:length=100,depths=2"]


def test_more_samples_are_asked_where_there_is_time(tiny_folder):
    shown = []
    made = Check(str(tiny_folder))
    report = made.run(load_model(str(tiny_folder)), 600.0, lambda *what: shown.append(what))
    assert report.samples == 2
    assert shown[-1] == ("needle:length=100,depths=2 · sample 2", 5, 6)


def test_another_preset_is_measured_besides(tiny_folder, criteria):
    criteria(LOOSE, STRICT, STRICT)
    report = run(tiny_folder, "paper-int2")
    assert [verdict.preset for verdict in report.verdicts] == [*BEST_FIRST, "paper-int2"]
    assert report.verdict.preset == "paper-int2"
    assert report.verdict.passed


def test_a_model_without_a_chat_template_is_checked_on_text_only(tmp_path):
    report = run(save_chat_model(tmp_path / "wordless", template=None))
    assert "has no chat template" in report.left_out["needle:length=100,depths=2"]
    assert len(report.verdict.findings) == 4


def test_texts_are_as_long_as_the_model_was_trained_for(tmp_path):
    report = run(save_chat_model(tmp_path / "short", max_position_embeddings=256))
    assert report.verdict.findings[0].task == "text:prompt=100"
    folder = save_chat_model(tmp_path / "shorter", max_position_embeddings=128)
    with pytest.raises(ConfigError, match="was trained for 128"):
        Check(str(folder))


def test_layers_that_stay_uncompressed_are_named_with_the_reason(tmp_path):
    settings = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    folder = tmp_path / "half"
    tiny_model("qwen2", vocab_size=261, pad_token_id=2, max_position_embeddings=512, **settings).save_pretrained(folder)
    chat_tokenizer(None).save_pretrained(folder)
    report = run(folder)
    assert report.uncompressed == {1: "sliding_attention: only full_attention is compressed"}
    assert [layer.layer for layer in report.outliers] == [0]


def test_what_cannot_be_checked_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match="unknown preset 'tiny'"):
        Check(str(tiny_folder), "tiny")
    with pytest.raises(ModelNotFoundError):
        Check("./nowhere")


# --- outlier keys -----------------------------------------------------------------------------------------------------


def test_spread_is_the_largest_channel_over_the_median_in_the_worst_head():
    keys = torch.ones(1, 2, 3, 5)
    keys[0, 0, 1, 2] = -7.0
    keys[0, 1] *= 2.0
    assert spread(keys) == 7.0


def test_outlier_keys_are_found_and_the_transforms_even_them_out():
    """A bias on one channel of the keys, as Qwen has them; without transforms nothing evens it out."""
    model = tiny_model("qwen2", vocab_size=96)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.k_proj.bias[63] = 300.0  # a slow channel of RoPE
    recording = record(model, torch.arange(200) % 90 + 3)
    loaded = LoadedModel("tiny", model, None)
    plain, biased = key_outliers(loaded, MiKVConfig.preset("balanced"), recording)
    assert not plain.is_outlier
    assert biased.is_outlier
    assert biased.is_tamed
    assert biased.raw > 3 * plain.raw
    untransformed = key_outliers(loaded, MiKVConfig.preset("paper-int2"), recording)[1]
    off = MiKVConfig(center_keys=False, balance_keys=False, hadamard_keys=False)
    assert key_outliers(loaded, off, recording)[1].transformed == pytest.approx(biased.raw)
    assert untransformed.raw == pytest.approx(biased.raw, rel=0.1)


def test_what_is_uneven_after_the_transforms_is_not_tamed():
    assert KeyOutliers(0, 50.0, 2.0).is_tamed
    assert not KeyOutliers(0, 50.0, 9.0).is_tamed
    assert not KeyOutliers(0, 5.0, 2.0).is_outlier


def test_gemma_4_whose_layers_have_other_heads_and_dims_is_checked(tmp_path):
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "sliding_window": 16}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    dims = {"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    words = {"vocab_size": 261, "vocab_size_per_layer_input": 261, "hidden_size_per_layer_input": 8, "pad_token_id": 2}
    config = Gemma4TextConfig(**layers, **shape, **dims, **words, max_position_embeddings=512)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    chat_tokenizer(template=None).save_pretrained(tmp_path)
    report = run(tmp_path)
    assert report.verdict.skipped is None
    assert set(report.uncompressed) == {0, 2, 3}
    assert report.bytes_at == {}
