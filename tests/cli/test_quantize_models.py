"""`mikv quantize` of models that are not plain decoders, and of long calibration files."""

import json
import time

import pytest

from mikv import models
from mikv.weights.solve import METHODS
from saved_files import content
from tiny_chat import NUM_TOKENS, chat_tokenizer

QUICK = ("--bits", 3, "--group-size", 32, "--threads", 1)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    return path


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    """A model that reads text and pictures."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": NUM_TOKENS, "pad_token_id": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=1,
        image_token_id=NUM_TOKENS - 1,
        boi_token_id=3,
        eoi_token_id=4,
    )
    folder = tmp_path_factory.mktemp("models") / "vision"
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory):
    from tiny import tiny_model

    folder = tmp_path_factory.mktemp("models") / "experts"
    tiny_model("qwen3-moe", vocab_size=NUM_TOKENS).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_with_vision_is_refused_first_and_quantized_without(refused, mikv, vision_folder, tmp_path, text_file):
    arguments = ("quantize", vision_folder, tmp_path / "q", *QUICK, "--calibration", text_file)
    error = refused(*arguments)
    assert "no calibration token reached model.vision_tower" in error
    assert list(tmp_path.iterdir()) == []
    option = error.partition("(--modules-to-not-convert ")[2].partition(")")[0]
    result = mikv(*arguments, "--modules-to-not-convert", option)
    assert result.exit_code == 0, result.output
    assert mikv("generate", "hello", "--max-new-tokens", 2, "--model", tmp_path / "q").exit_code == 0


def test_experts_are_refused_before_the_model_is_loaded(refused, experts_folder, tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    error = refused("quantize", experts_folder, tmp_path / "q", *QUICK, "--calibration", text_file)
    assert "keep them as they are with modules_to_not_convert=['experts']" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--modules-to-not-convert", "--skip-modules"])
def test_modules_are_left_out(mikv, experts_folder, tmp_path, text_file, option):
    options = (option, "experts,o_proj", option, "k_proj", "--calibration", text_file, "--json")
    result = mikv("quantize", experts_folder, tmp_path / "q", *QUICK, *options)
    assert result.exit_code == 0, result.output
    kinds = {layer["name"].rpartition(".")[2] for layer in json.loads(result.stdout)["layers"]}
    assert kinds == {"q_proj", "v_proj"}


def test_another_dtype_is_what_the_model_is_kept_in(mikv, tiny_folder, tmp_path):
    options = ("--calibration", "none", "--dtype", "bfloat16")
    assert mikv("quantize", tiny_folder, tmp_path / "q", *QUICK, *options).exit_code == 0
    assert json.loads((tmp_path / "q" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_long_calibration_file_takes_no_longer_than_a_short_one(mikv, tiny_folder, tmp_path):
    (tmp_path / "short.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4000)
    (tmp_path / "long.txt").write_text("The quick brown fox jumps over the lazy dog. " * 800_000)
    seconds, found = {}, []
    for name in ("short", "long"):
        start = time.perf_counter()
        options = ("--calibration", tmp_path / f"{name}.txt", "--method", "gptq")
        assert mikv("quantize", tiny_folder, tmp_path / name, *QUICK, *options).exit_code == 0
        seconds[name] = time.perf_counter() - start
        found.append(content(tmp_path / name / "model.safetensors"))
    assert seconds["long"] < 2 * seconds["short"] + 1
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe" * 50, "is not UTF-8 text"),
        (b" \n" * 2**21, "is empty; a few thousand words do"),
        (None, "is not a file"),
    ],
)
def test_calibration_files_that_hold_no_text_are_refused(refused, tiny_folder, tmp_path, content, message):
    path = tmp_path / "text"
    path.mkdir() if content is None else path.write_bytes(content)
    assert message in refused("quantize", tiny_folder, tmp_path / "q", "--calibration", path)


def test_help_lists_what_there_is(mikv, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = mikv("quantize", "--help").output
    assert all(method in text for method in (*METHODS, "auto", "import"))
    assert "`row`" in text


def test_messages_speak_the_words_of_the_command(refused, tiny_folder, tmp_path):
    error = refused("quantize", tiny_folder, tmp_path / "q", "--group-size", 33)
    assert "--group-size=33 is not a multiple of 32; use 32, 64, 128 or `row`" in error
