"""`mikv plan`: the JSON contract, tables for people, a picture, and errors before anything is measured."""

import json

import pytest

from mikv import cache_names
from mikv.integrations.quantizer.config import BCQConfig
from mikv.plan import probe
from mikv.plan.hardware import Hardware
from mikv.plan.models import NAMED

A100 = ("--hardware", "a100-80")
KEYS = {
    "option",
    "weights",
    "cache",
    "bits_per_weight",
    "gpus",
    "gpus_needed",
    "fits",
    "memory_bytes",
    "total_bytes",
    "ms_per_token",
    "ms_by_part",
    "bound",
    "tokens_per_second",
    "tokens_per_second_per_sequence",
    "joules_per_token",
    "break_even_batch",
    "prefill_seconds",
    "notes",
}


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    monkeypatch.setattr(probe, "this_machine", lambda *args: pytest.fail("this machine was measured"))


def planned(mikv, *arguments):
    result = mikv("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_contract_and_one_row_per_option(mikv):
    record = planned(mikv, "opt-175b", *A100, "--compare", "fp16,bcq3+balanced,3.375+4.5", "--batch", 2)
    assert record["estimate"] is True
    assert record["constants"]["lut"]["source"]
    assert [row["option"] for row in record["rows"]] == ["fp16 + full", "bcq3 + balanced", "3.375 bits + 4.5 bits"]
    assert all(set(row) >= KEYS for row in record["rows"])
    assert [row["gpus"] for row in record["rows"]] == [8, 2, 2]


def test_options_that_have_no_room_say_what_they_need(mikv):
    rows = ("--group-size", "row", "--context", 32)  # with scales per 128 columns three bits have no room either
    record = planned(mikv, "opt-175b", *A100, *rows, "--gpus", 1, "--compare", "fp16,bcq3")
    fp16, bcq3 = record["rows"]
    assert (fp16["fits"], fp16["gpus_needed"], fp16["ms_per_token"]) == (False, 8, None)
    assert bcq3["fits"]
    text = " ".join(mikv("plan", "opt-175b", *A100, "--gpus", 1, "--context", 32).stdout.split())
    assert "does not fit on 1 x A100" in text
    assert "it needs 8" in text


def test_people_are_told_that_it_is_an_estimate_and_which_kernels_do_not_exist(mikv):
    text = " ".join(mikv("plan", "llama-3-8b", *A100, "--weights", "bcq3", "--cache", "balanced").stdout.split())
    assert "every number is an estimate" in text
    assert "no GPU kernel for binary-coded weights yet" in text
    assert "no GPU kernel for its cache yet" in text
    assert "note" not in mikv("plan", "llama-3-8b", *A100).stdout


def test_a_folder_that_mikv_quantized_is_planned_as_it_is_unless_told_otherwise(mikv, tmp_path):
    config = NAMED["llama-3-8b"] | {
        "quantization_config": BCQConfig(bits=3, group_size=64, quantize_embeddings=True, method="offset").to_dict()
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    [own] = planned(mikv, tmp_path, *A100)["rows"]
    assert (own["weights"], own["group_size"], own["bits_per_weight"]) == ("bcq3", 64, 4.0)
    [other] = planned(mikv, tmp_path, *A100, "--weights", "fp16")["rows"]
    assert other["bits_per_weight"] == 16
    assert own["memory_bytes"]["embeddings"] == pytest.approx(other["memory_bytes"]["embeddings"] / 4)


def test_many_options_stand_below_each_other_in_80_columns(mikv, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = "fp16,int4,bcq3,bcq4+balanced,bcq2+small,int8+mikv:balanced+low_v=int4,3.375+fp8"
    lines = mikv("plan", "opt-175b", *A100, "--compare", options).stdout.splitlines()
    text = "\n".join(lines)
    for name in options.split(","):
        weights, _, cache = name.partition("+")
        weights = "3.375 bits" if weights == "3.375" else weights
        assert f"{weights} + {cache or 'full'}" in text
    assert "…" not in text
    assert all(len(line) <= 80 for line in lines if not line.startswith("note"))
    assert sum(line.startswith("bits per weight") for line in lines) > 1


def test_constants_are_listed_with_sources(mikv):
    text = " ".join(mikv("plan", "llama-3-8b", *A100, "--constants", "--efficiency", "layer_us=7").stdout.split())
    assert "layer_us 7 us per layer --efficiency" in text
    assert "LUT-GEMM" in text


def test_claims_are_taken_apart(mikv):
    result = mikv("plan", "--claims")
    assert result.exit_code == 0
    assert "cannot be reconstructed" in " ".join(result.stdout.split())
    record = planned(mikv, "--claims")
    assert {row["kind"] for row in record["rows"]} == {"claim", "published"}


def test_this_machine_is_measured_and_its_power_unknown(mikv, monkeypatch):
    machine = Hardware("this", "a machine", 8 << 30, 20e9, 1e11, 0, None, most=1, is_cpu=True)
    monkeypatch.setattr(probe, "this_machine", lambda: machine)
    record = planned(mikv, "smollm2", "--context", 64)
    assert (record["gbps"], record["device"]) == (20, "a machine")
    [row] = record["rows"]
    assert (row["weights"], row["joules_per_token"]) == ("fp32", None)
    assert "--watts" in row["notes"][0]
    [row] = planned(mikv, "smollm2", "--context", 64, "--watts", 65)["rows"]
    assert 0 < row["joules_per_token"] < 65


@pytest.mark.skipif(not cache_names.is_installed("matplotlib"), reason="needs matplotlib")
@pytest.mark.filterwarnings("default")
def test_a_picture_is_drawn(mikv, tmp_path):
    picture = tmp_path / "plan.png"
    assert mikv("plan", "llama-3-8b", *A100, "--compare", "fp16,bcq3+balanced", "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "MODEL is missing"),
        (("llama-3-8b", "--hardware", "a1000"), "--hardware 'a1000' is not known"),
        (("llama-3-8b", "--weights", "fp17"), "--weights 'fp17' is not one of fp32"),
        (("llama-3-8b", "--weights", "bcq9"), "--weights 'bcq9'"),
        (("llama-3-8b", "--weights", "nan"), "--weights 'nan'"),
        (("llama-3-8b", "--cache", "balance"), "--cache 'balance' is not one of full"),
        (("llama-3-8b", "--cache", "quanto4"), "give them as a number"),
        (("llama-3-8b", "--cache", "99"), "between 1 and 32 bits"),
        (("llama-3-8b", "--batch", 0), "--batch 0 must be 1 or more"),
        (("llama-3-8b", "--context", 9000), "--context 9000 is more than the 8,192"),
        (("llama-3-8b", "--gpus", 3, *A100), "--gpus 3 cannot divide the 32 heads"),
        (("llama-3-8b", "--gpus", 2), "one machine"),
        (("llama-3-8b", "--group-size", "100", "--weights", "bcq3"), "--group-size=100 is not a multiple of 32"),
        (("llama-3-8b", "--group-size", "x"), "--group-size 'x'"),
        (("llama-3-8b", "--compare", ","), "--compare ',' names nothing"),
        (("llama-3-8b", "--compare", "fp16", "--weights", "fp16"), "exclude each other"),
        (("llama-3-8b", "--efficiency", "lut=0"), "more than 0 and at most 1"),
        (("llama-3-8b", "--watts", 0), "--watts 0 must be more than 0"),
        (("llama-3-8b", "--plot", "x.pdf"), "must end in .png"),
        (("llama-3-8b", "--claims"), "leave MODEL"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(refused, arguments, message):
    assert message in refused("plan", *arguments)
