"""`mikv generate`: options, the answer, the JSON record, the bar for long prompts."""

import json
from contextlib import suppress

import pytest
import torch

from mikv.cache.config import MiKVConfig
from mikv.cli.answer import AnswerOptions, answer
from mikv.cli.progress import prefill_bar
from mikv.cli.terminal import visible
from mikv.integrations.transformers import MiKVCache
from mikv.models import LoadedModel
from tiny_chat import chat_model, chat_tokenizer, save_chat_model, write_gguf

EXACT = MiKVConfig(importance_ratio=1, high="exact")


@pytest.fixture
def exact_file(tmp_path):
    (tmp_path / "exact.json").write_text(EXACT.to_json())
    return tmp_path / "exact.json"


@pytest.fixture
def loaded():
    return LoadedModel("tiny", chat_model(), chat_tokenizer())


def full_cache_answer(loaded, prompt, num_tokens):
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([loaded.tokenizer.encode(text)])
    output = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
    )
    return loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_answer_is_the_models_own_with_a_full_precision_cache(mikv, tiny_folder, exact_file, loaded):
    result = mikv("generate", "Hello you", "-m", tiny_folder, "--config", exact_file, "--max-new-tokens", 20)
    assert result.exit_code == 0
    assert result.stdout == visible(full_cache_answer(loaded, "Hello you", 20)) + "\n"


def test_a_summary_goes_to_stderr(mikv, tiny_folder):
    result = mikv("generate", "word " * 40, "-m", tiny_folder, "--max-new-tokens", 5)
    [line] = [line for line in result.stderr.splitlines() if "fp16" in line]
    assert "tokens read at" in line
    assert " 5 new at " in line
    assert "still exact" not in line


def test_a_short_prompt_says_that_nothing_is_rounded_yet(mikv, tiny_folder):
    assert (
        "the first 64 tokens are not rounded" in mikv("generate", "hi", "-m", tiny_folder, "--max-new-tokens", 2).stderr
    )


def test_json_is_one_object_and_nothing_else(mikv, tiny_folder):
    result = mikv("generate", "word " * 40, "-m", tiny_folder, "--max-new-tokens", 5, "--json", "--preset", "small")
    record = json.loads(result.stdout)
    assert set(record) == {
        "model",
        "prompt_tokens",
        "new_tokens",
        "text",
        "prefill_seconds",
        "decode_tokens_per_second",
        "config",
        "memory",
    }
    assert record["model"] == str(tiny_folder)
    assert record["new_tokens"] == 5
    assert record["config"] == MiKVConfig.preset("small").to_dict()
    assert record["memory"]["bytes"] > 0
    assert "layers" not in record["memory"]
    assert record["prompt_tokens"] == len("<user\n" + "word " * 40 + ">\n<assistant\n")  # < and > are special tokens


def test_layers_adds_the_memory_of_every_layer(mikv, tiny_folder):
    result = mikv("generate", "hi", "-m", tiny_folder, "--max-new-tokens", 2, "--json", "--layers")
    assert len(json.loads(result.stdout)["memory"]["layers"]) == 2


def test_raw_continues_the_prompt_as_it_is(mikv, wordless_folder):
    result = mikv("generate", "abab", "-m", wordless_folder, "--raw", "--json", "--max-new-tokens", 3)
    assert json.loads(result.stdout)["prompt_tokens"] == 2


def test_the_prompt_comes_from_an_argument_a_file_or_stdin(mikv, tiny_folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("Hällo", encoding="utf-8")
    options = ("-m", tiny_folder, "--max-new-tokens", 8)
    results = [
        mikv("generate", "Hällo", *options),
        mikv("generate", "--prompt-file", tmp_path / "prompt.txt", *options),
        mikv("generate", "-", *options, stdin="Hällo"),
    ]
    assert results[0].exit_code == 0
    assert results[0].stdout == results[1].stdout == results[2].stdout


def test_a_seed_makes_sampling_repeatable(mikv, tiny_folder):
    options = ("-m", tiny_folder, "--max-new-tokens", 20, "--temperature", 2, "--seed")
    first, again, other = (mikv("generate", "hi", *options, seed).stdout for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_system_message_comes_first(mikv, tiny_folder):
    options = ("-m", tiny_folder, "--max-new-tokens", 2, "--json")
    with_system = json.loads(mikv("generate", "hi", "--system", "xyz", *options).stdout)
    without = json.loads(mikv("generate", "hi", *options).stdout)
    assert with_system["prompt_tokens"] - without["prompt_tokens"] == len("<system\nxyz>\n")


def test_a_budget_picks_the_best_preset_for_the_model(mikv, tiny_folder):
    options = ("-m", tiny_folder, "--max-new-tokens", 2, "--json")
    expected = MiKVConfig.for_budget(0.25, chat_model().config)
    assert json.loads(mikv("generate", "hi", "--budget", 0.25, *options).stdout)["config"] == expected.to_dict()


def test_a_gguf_file_can_be_asked(mikv, tmp_path, monkeypatch):
    monkeypatch.setenv("MIKV_CACHE_DIR", str(tmp_path))
    path = write_gguf(tmp_path / "tiny.gguf")
    assert mikv("generate", "hi", "-m", path, "--max-new-tokens", 2).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no prompt"),
        (("  ",), "there is no prompt"),
        (("hi", "--prompt-file", "x"), "PROMPT and --prompt-file exclude each other"),
        (("--prompt-file", "nowhere.txt"), "cannot read the prompt nowhere.txt: No such file"),
        (("hi", "--preset", "small", "--budget", "0.2"), "--preset and --budget exclude each other"),
        (("hi", "--preset", "small", "--config", "x"), "--preset and --config exclude each other"),
        (("hi", "--budget", "0"), "--budget 0 must be a share of the fp16 bytes"),
        (("hi", "--budget", "1.5"), "--budget 1.5 must be a share of the fp16 bytes"),
        (("hi", "--preset", "tiny"), "unknown preset 'tiny'; the presets are paper-int2"),
        (("hi", "--config", "nowhere.json"), "cannot read the configuration nowhere.json"),
        (("hi", "--raw", "--system", "x"), "--raw and --system exclude each other"),
        (("hi", "--layers"), "--layers needs --json"),
        (("hi", "--model", "./nowhere"), "./nowhere does not exist"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(refused, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mikv.cli.options.load_model", None)
    assert message in refused("generate", *arguments)


def test_a_prompt_that_is_not_text_is_refused(refused, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in refused("generate", "--prompt-file", tmp_path / "bytes")


def test_a_prompt_without_end_is_refused(refused):
    assert "is longer than 64 MiB" in refused("generate", "--prompt-file", "/dev/zero")


@pytest.mark.parametrize("name", [".", "x" * 5000])
def test_a_prompt_file_that_cannot_be_one_is_refused(refused, name):
    assert "cannot read the prompt" in refused("generate", "--prompt-file", name)


def test_a_model_without_chat_template_points_to_raw(refused, wordless_folder):
    assert "has no chat template; use `mikv generate --raw`" in refused("generate", "hi", "-m", wordless_folder)


def test_a_template_that_refuses_a_role_is_reported(refused, tmp_path):
    template = "{{ raise_exception('no system messages') if messages[0]['role'] == 'system' }}"
    folder = save_chat_model(tmp_path / "model", template)
    line = refused("generate", "hi", "-m", folder, "--system", "x")
    assert "refuses the messages (system, user): no system messages" in line


def test_a_prompt_beyond_the_context_of_the_model_is_refused(refused, tiny_folder):
    line = refused("generate", "x" * 4000, "-m", tiny_folder)
    assert "128 new ones are more than the 4,096 that" in line


def test_a_budget_that_cannot_be_met_is_refused(refused, tiny_folder):
    assert "budget=0.01 cannot be met" in refused("generate", "hi", "-m", tiny_folder, "--budget", 0.01)


def test_a_long_prompt_shows_a_bar_and_leaves_no_hooks(loaded, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    cache = MiKVCache(loaded.model.config, EXACT)
    with prefill_bar(loaded.model, 2000):
        answer(loaded, [5] * 20, cache, AnswerOptions(3))
        assert not any(module._forward_hooks for module in loaded.model.modules())
    assert "reading 2,000 tokens" in capsys.readouterr().err


def test_an_interrupted_bar_leaves_no_hooks(loaded, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with suppress(KeyboardInterrupt), prefill_bar(loaded.model, 2000):
        assert any(module._forward_hooks for module in loaded.model.modules())
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in loaded.model.modules())


@pytest.mark.parametrize(("num_tokens", "quiet", "force"), [(1024, False, "1"), (2000, True, "1"), (2000, False, "")])
def test_no_bar_for_short_prompts_json_or_pipes(loaded, monkeypatch, capsys, num_tokens, quiet, force):
    monkeypatch.setenv("FORCE_COLOR", force)
    with prefill_bar(loaded.model, num_tokens, quiet=quiet):
        assert not any(module._forward_hooks for module in loaded.model.modules())
    assert capsys.readouterr().err == ""


@pytest.mark.bundled
def test_the_bundled_model_knows_the_capital_of_france(mikv):
    result = mikv("generate", "What is the capital of France?", "--json", "--max-new-tokens", 12)
    assert "Paris" in json.loads(result.stdout)["text"]
