"""`mikv quantize`: the JSON contract, tables for people, a folder that all commands take, and nothing half done."""

import json

import pytest

import mikv as package
from mikv import cache_names, models
from mikv.bench import plots
from mikv.cli.quantize_page import by_kind

QUICK = ("--bits", 3, "--group-size", 32, "--calibration", "none", "--threads", 1)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture
def quantized(mikv, tiny_folder, tmp_path):
    """A quantized model and the result of the command."""
    result = mikv("quantize", tiny_folder, tmp_path / "q", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    return tmp_path / "q", json.loads(result.stdout)


def test_json_has_sizes_circumstances_and_a_report_per_layer(quantized):
    folder, result = quantized
    expected = {"model", "out", "bits", "group_size", "method", "calibration", "bits_per_weight", "seconds", "layers"}
    expected |= {"bytes_before", "bytes_after", "peak_rss_bytes", "threads", "hardware", "versions", "command"}
    assert expected <= set(result)
    assert (result["method"], result["bits"], result["group_size"]) == ("offset", 3, 32)
    assert result["bits_per_weight"] == 5.0  # three planes with a scale each and an offset
    assert result["bytes_after"] == (folder / "model.safetensors").stat().st_size < result["bytes_before"]
    layers = result["layers"]
    assert len(layers) == 14
    keys = {"name", "bits", "group_size", "bits_per_weight", "num_weights", "output_error", "seconds"}
    assert all(set(layer) == keys for layer in layers)
    assert all(0 < layer["output_error"] < 0.05 for layer in layers)
    assert set(by_kind(layers)) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "hello", "--max-new-tokens", 4),
        ("bench", "generate", "--contexts", 70, "--caches", "mikv:small", "--new-tokens", 4, "--threads", 1),
        ("eval", "text:prompt=64,read=16", "--samples", 1, "--cache", "full", "--threads", 1),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_folder_is_a_model_for_every_command(mikv, quantized, arguments):
    result = mikv(*arguments, "--model", quantized[0])
    assert result.exit_code == 0, result.output
    assert "skipped" not in result.output


def test_the_folder_can_be_chatted_with(mikv, quantized):
    result = mikv("chat", "--model", quantized[0], "--max-new-tokens", 4, stdin="hello\n")
    assert result.exit_code == 0, result.output


def test_people_get_errors_by_kind_the_worst_layers_and_sizes(mikv, tiny_folder, tmp_path):
    result = mikv("quantize", tiny_folder, tmp_path / "q", *QUICK)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "by offset, 5.00 bits per weight" in text
    assert "q_proj 2 5.00 " in text
    assert "largest errors: model.layers." in text
    assert f"Use it as --model {tmp_path / 'q'}" in text
    assert "…" not in text


@pytest.mark.skipif(not cache_names.is_installed("matplotlib"), reason="needs matplotlib")
@pytest.mark.filterwarnings("default")
def test_errors_are_drawn(mikv, tiny_folder, tmp_path):
    result = mikv("quantize", tiny_folder, tmp_path / "q", *QUICK, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_settings_reach_the_configuration(mikv, tiny_folder, tmp_path, text_file):
    options = ("--bits", 4, "--group-size", "row", "--calibration", text_file, "--embeddings", "--threads", 1)
    result = mikv("quantize", tiny_folder, tmp_path / "q", *options, "--nested")
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (saved["bits"], saved["group_size"], saved["method"]) == (4, None, "refined")
    assert (saved["quantize_embeddings"], saved["nested_bits"]) == (True, [2, 3])
    options = (*options[:4], "--method", "gptq-bcq", *options[4:])
    assert mikv("quantize", tiny_folder, tmp_path / "r", *options).exit_code == 0
    saved = json.loads((tmp_path / "r" / "config.json").read_text())["quantization_config"]
    assert (saved["method"], saved["nested_bits"]) == ("gptq-bcq", [])


def test_a_budget_gives_layers_different_bits_that_keep_it(mikv, tiny_folder, tmp_path, text_file):
    options = ("--budget-bits", 3.5, "--group-size", 64, "--calibration", text_file, "--threads", 1, "--json")
    result = mikv("quantize", tiny_folder, tmp_path / "q", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert 3.3 < found["bits_per_weight"] <= 3.5
    assert len({layer["bits"] for layer in found["layers"]}) > 1
    assert mikv("generate", "hello", "--max-new-tokens", 2, "--model", tmp_path / "q").exit_code == 0


def test_calibration_is_a_file_nothing_or_prose_and_code(mikv, tiny_folder, tmp_path, text_file, monkeypatch):
    seen = []

    def stop(model, config, calibration, **options):
        seen.append(calibration)
        raise package.ConfigError("enough")

    monkeypatch.setattr(package, "quantize", stop, raising=False)
    for options in ((), ("--calibration", "none"), ("--calibration", text_file)):
        assert mikv("quantize", tiny_folder, tmp_path / "q", *options).exit_code == 2
    own, nothing, file = seen
    assert nothing is None
    assert file == [text_file.read_text()]
    text = "\n".join(own)
    assert "    def " in text
    assert "The " in text
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(mikv, quantized, tiny_folder, monkeypatch):
    def fail(*args, **options):
        raise package.NumericsError("weights are NaN")

    folder, _ = quantized
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(package, "quantize", fail, raising=False)
    result = mikv("quantize", tiny_folder, folder, *QUICK, "--overwrite")
    assert (result.exit_code, "weights are NaN" in result.stderr) == (2, True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["q"]


def test_overwrite_replaces_the_model(mikv, quantized, tiny_folder):
    folder, _ = quantized
    options = ("--bits", 2, "--group-size", 32, "--calibration", "none", "--overwrite")
    assert mikv("quantize", tiny_folder, folder, *options).exit_code == 0
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["bits"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", 9), "bits=9 must be a whole number from 1 to 8"),
        (("--group-size", 48), "--group-size=48 is not a multiple of 32"),
        (("--group-size", "many"), "--group-size 'many' is neither row nor a multiple of 32"),
        (("--method", "magic"), "method='magic' is not one of auto, "),
        (
            ("--method", "gptq", "--calibration", "none"),
            "--method gptq needs calibration; leave out --calibration none",
        ),
        (("--calibration", "nowhere.txt"), "cannot read --calibration nowhere.txt: No such file"),
        (("--bits", 2, "--nested"), "--nested weights are read with 2 to 4 bits; use --bits 4"),
        (
            ("--budget-bits", 3, "--calibration", "none"),
            "--budget-bits measures what layers do to predictions, which needs",
        ),
        (("--budget-bits", 3, "--nested"), "--budget-bits and nested precision exclude each other"),
        (("--method", "gptq", "--nested"), "method='gptq' cannot find nested weights"),
        (("--budget-bits", 9), "--budget-bits 9 must be between 0 and 8"),
        (("--method", "import"), "--method import takes the codes of a .gguf file, which"),
        (("--threads", 0), "--threads 0 must be between 1 and"),
        (("--plot", "p.jpg"), "--plot p.jpg must end in .png"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(
    refused, tiny_folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    assert message in refused("quantize", tiny_folder, tmp_path / "q", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", 3), "--method import takes 4 bits in groups of 32; leave out --bits and --group-size"),
        (("--group-size", 128), "--method import takes 4 bits in groups of 32"),
        (("--embeddings",), "--method import excludes --budget-bits, --nested and --embeddings"),
        (("--calibration", "some.txt"), "--method import has nothing to calibrate"),
    ],
)
def test_an_import_takes_no_settings(refused, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    (tmp_path / "m.gguf").touch()
    assert message in refused("quantize", tmp_path / "m.gguf", tmp_path / "q", "--method", "import", *options)


def test_bad_folders_are_refused_before_the_model_is_loaded(refused, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    (tmp_path / "files").mkdir()
    assert "pass --overwrite to replace it" in refused("quantize", tiny_folder, tmp_path / "files")
    error = refused("quantize", tiny_folder, tmp_path / "files", "--overwrite")
    assert "is not the folder of a model, so --overwrite does not replace it" in error
    assert "there is no folder" in refused("quantize", tiny_folder, tmp_path / "no" / "q")
    assert "./nowhere does not exist" in refused("quantize", "./nowhere", tmp_path / "q")
    assert "is the model itself" in refused("quantize", tiny_folder, tiny_folder, "--overwrite")


def test_an_empty_calibration_file_is_refused(refused, tiny_folder, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    options = ("--calibration", tmp_path / "empty.txt")
    assert "empty.txt is empty; a few thousand words do" in refused("quantize", tiny_folder, tmp_path / "q", *options)


def test_a_plot_without_matplotlib_is_refused(refused, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "is_installed", lambda package: False)
    options = ("--plot", tmp_path / "p.png")
    assert "plots need matplotlib" in refused("quantize", tiny_folder, tmp_path / "q", *options)
