"""The model type of lm-evaluation-harness: its own numbers with the full cache, and a cache that matters."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'mikv[lm-eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mikv.cache.config import MiKVConfig
from mikv.errors import ConfigError, ModelNotFoundError
from mikv.lab import lm_eval as lab_lm_eval
from mikv.lab.lm_eval import MiKVLM
from mikv.models import load_model
from misbehaving_caches import NoiseLayer, with_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of lm-eval's own dependencies
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROOT = Path(__file__).parents[2]
TASKS = ROOT / "docs/guides/lm_eval_tasks"
NAMES = ["keys_choice", "keys_generate"]
CONTEXT = " ".join(f"The number of locker {i} is {i * 7919 % 1000}." for i in range(8))


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i, ("a task", i, 1)) for i, args in enumerate(arguments)]


CHOICES = requests(
    "loglikelihood",
    (CONTEXT + " Locker 3 is", " 757"),
    (CONTEXT + " Locker 3 is", " 7"),
    (CONTEXT + " Locker 3 is", " 758, and nothing else; that much is certain, as everybody here knows."),
    ("Short", " one"),
    ("", "Alone"),
    (CONTEXT + " Locker 5 is", " 595"),
)
TEXTS = requests("loglikelihood_rolling", (CONTEXT,), ("a",), (CONTEXT[:100],))
GREEDY = {"until": ["\n\n"], "max_gen_toks": 12}
QUESTIONS = requests("generate_until", (CONTEXT + " Locker 3 is", GREEDY), ("Short", GREEDY))


@pytest.fixture(scope="module")
def theirs(tiny_folder):
    loaded = load_model(str(tiny_folder))
    return HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=1, max_length=1024)


def ours(folder, **arguments):
    return MiKVLM(str(folder), max_length=1024, **arguments)


def noisy(folder, monkeypatch):
    """The model with a cache that stores noise."""
    monkeypatch.setattr("mikv.lab.lm_eval.options.parse_cache", lambda name: with_layers("noise", NoiseLayer))
    return ours(folder, cache="noise")


def likelihoods(model):
    return torch.tensor([value for value, _ in model.loglikelihood(CHOICES, disable_tqdm=True)])


@pytest.mark.parametrize(("chunk", "probe"), [(32, 32), (1, 0), (7, 5), (1000, 1000)])
def test_the_full_cache_gives_the_numbers_of_lm_eval_itself(theirs, tiny_folder, chunk, probe):
    model = ours(tiny_folder, cache="full", chunk=chunk, probe=probe)
    expected, found = theirs.loglikelihood(CHOICES), model.loglikelihood(CHOICES)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-3)
    assert model.loglikelihood_rolling(TEXTS) == pytest.approx(theirs.loglikelihood_rolling(TEXTS), abs=2e-2)
    assert model.generate_until(QUESTIONS) == theirs.generate_until(QUESTIONS)


def test_continuations_that_the_model_would_write_itself_are_recognised(theirs, tiny_folder):
    context = CONTEXT + " Locker 3 is"
    [written] = theirs.generate_until(requests("generate_until", (context, GREEDY)))
    pair = requests("loglikelihood", (context, written), (context, written[:-1] + "#"))
    assert theirs.tok_encode(context + written) == theirs.tok_encode(context) + theirs.tok_encode(written)
    assert [greedy for _, greedy in ours(tiny_folder, cache="full").loglikelihood(pair)] == [True, False]


def test_long_contexts_and_texts_are_cut_as_lm_eval_cuts_them(theirs, tiny_folder, monkeypatch):
    model = ours(tiny_folder, cache="full")
    for each in (model, theirs):
        monkeypatch.setattr(each, "_max_length", 120)
    assert likelihoods(model).tolist() == pytest.approx(likelihoods(theirs).tolist(), abs=2e-3)
    assert model.loglikelihood_rolling(TEXTS) == pytest.approx(theirs.loglikelihood_rolling(TEXTS), abs=2e-2)
    assert model.generate_until(QUESTIONS) == theirs.generate_until(QUESTIONS)


def test_a_cache_that_stores_noise_is_noticed_and_a_good_one_is_close(theirs, tiny_folder, monkeypatch):
    exact = likelihoods(theirs)
    near = (likelihoods(ours(tiny_folder)) - exact).abs()
    texts = torch.tensor(theirs.loglikelihood_rolling(TEXTS))
    near_texts = (torch.tensor(ours(tiny_folder).loglikelihood_rolling(TEXTS)) - texts).abs()
    noise = noisy(tiny_folder, monkeypatch)
    far = (likelihoods(noise) - exact).abs()
    in_context = [0, 1, 2, 5]  # the others are read from hardly any context
    assert (far[in_context] > 10 * near[in_context]).all(), (far, near)
    far_texts = (torch.tensor(noise.loglikelihood_rolling(TEXTS)) - texts).abs()
    assert far_texts[0] > 10 * near_texts[0]
    assert noise.generate_until(QUESTIONS)[0] != theirs.generate_until(QUESTIONS)[0]


def test_without_a_probe_a_one_token_answer_does_not_depend_on_the_cache(theirs, tiny_folder, monkeypatch):
    one_token = requests("loglikelihood", (CONTEXT + " Locker 3 is", "x"))
    [(expected, _)] = theirs.loglikelihood(one_token)
    noise = noisy(tiny_folder, monkeypatch)
    assert abs(noise.loglikelihood(one_token)[0][0] - expected) > 0.1
    monkeypatch.setattr(noise, "_probe", 0)
    assert noise.loglikelihood(one_token)[0][0] == pytest.approx(expected, abs=2e-3)


def test_choices_of_one_context_share_its_prefill_and_one_token_answers_share_everything(tiny_folder, monkeypatch):
    model, calls = ours(tiny_folder), []
    monkeypatch.setattr(lab_lm_eval, "record", lambda *args: calls.append("record") or record(*args))
    monkeypatch.setattr(lab_lm_eval, "fill", lambda *args: calls.append("fill") or fill(*args))
    model.loglikelihood(requests("loglikelihood", *((CONTEXT + " It is", answer) for answer in ("x", "y", "z", "ok!"))))
    assert calls == ["record", "fill", "fill"]


record, fill = lab_lm_eval.record, lab_lm_eval.fill


def test_results_name_the_cache_and_what_it_took(tiny_folder):
    model = ours(tiny_folder, preset="small", probe=8)
    assert model.get_model_info()["kv_cache"].keys() == {"name", "config", "chunk", "probe"}
    model.loglikelihood(CHOICES[:1])
    cache = model.get_model_info()["kv_cache"]
    assert (cache["name"], cache["chunk"], cache["probe"]) == ("mikv:small", 32, 8)
    assert cache["config"] == MiKVConfig.preset("small").to_dict()
    assert cache["tokens"] == len(CONTEXT + " Locker 3 is 757") - 1
    assert 0 < cache["ratio"] < 1
    full = ours(tiny_folder, cache="full")
    full.loglikelihood(CHOICES)
    assert full.get_model_info()["kv_cache"]["ratio"] == 2.0  # float32


def test_the_cache_is_named_by_one_of_three_arguments(tiny_folder, tmp_path):
    file = tmp_path / "my.json"
    file.write_text(MiKVConfig(importance_ratio=0.3).to_json())
    for arguments, name in (
        ({}, "mikv:balanced"),
        ({"preset": "small"}, "mikv:small"),
        ({"cache": "kivi2"}, "kivi2"),
        ({"cache": "mikv:small+policy=window"}, "mikv:small+policy=window"),
        ({"config": str(file)}, f"mikv:{file}"),
    ):
        assert ours(tiny_folder, **arguments).get_model_info()["kv_cache"]["name"] == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "small", "cache": "full"}, "preset=small and cache=full each name a cache; pass one of them"),
        ({"preset": "smal"}, "unknown preset 'smal'.*did you mean small"),
        ({"cache": "ful"}, "unknown cache 'ful'"),
        ({"config": "balanced"}, "config=balanced is not the name of a .json file; .* preset=balanced"),
        ({"chunk": 0}, "chunk=0 must be a whole number, 1 or more"),
        ({"probe": -1}, "probe=-1 must be a whole number, 0 or more"),
        ({"batch_size": "auto"}, "batch_size=auto: mikv reads one request at a time"),
        ({"device": "cuda:1"}, "device=cuda:1: mikv computes on the CPU"),
        ({"dtype": "int8"}, "dtype=int8 is not one of auto, float32"),
        ({"peft": "some/adapter", "parallelize": True}, "does not know the model argument parallelize, peft; it takes"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_the_model_is_loaded(arguments, message, monkeypatch):
    monkeypatch.setattr(lab_lm_eval, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=message):
        MiKVLM("anything", **arguments)


def test_a_cache_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("mikv.cache_names.is_installed", lambda package: False)
    with pytest.raises(ConfigError, match="cache=quanto4: needs optimum-quanto"):
        MiKVLM("anything", cache="quanto4")


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        MiKVLM("./nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, "task a task samples its answers .*do_sample=False"),
        ({"temperature": 0.7}, "task a task samples its answers"),
        ({"do_sample": False, "num_beams": 4}, "task a task sets num_beams for generation"),
    ],
)
def test_other_than_greedy_generation_is_refused_before_the_first_answer(tiny_folder, monkeypatch, settings, message):
    model = ours(tiny_folder)
    monkeypatch.setattr(lab_lm_eval, "record", lambda *args: pytest.fail("a prompt was read"))
    with pytest.raises(ConfigError, match=message):
        model.generate_until(requests("generate_until", ("One", GREEDY), ("Two", GREEDY | settings)))


def test_settings_of_sampling_do_not_matter_to_greedy_tasks(tiny_folder):
    model, asked = ours(tiny_folder), {"do_sample": False, "temperature": 0.0, "top_p": 0.9}
    assert model.generate_until(requests("generate_until", ("One", GREEDY | asked))) == model.generate_until(
        requests("generate_until", ("One", GREEDY))
    )


def test_the_command_of_the_guide_finds_the_model_type_and_the_tasks(tiny_folder, tmp_path):
    arguments = f"pretrained={tiny_folder},cache=mikv:small+policy=window,chunk=64"
    command = [sys.executable, "-m", "mikv.lab.lm_eval", "--model", "mikv", "--model_args", arguments, "--limit", "1"]
    command += ["--tasks", ",".join(NAMES), "--include_path", str(TASKS), "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|keys_generate|" in done.stdout.replace(" ", "")
    assert re.search(r"cache mikv:small\+policy=window: \d+ tokens, \d+ bytes per token, 0\.\d+ of fp16", done.stderr)
    [file] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["kv_cache"]["name"] == "mikv:small+policy=window"
    assert set(results["results"]) == set(NAMES)


def test_the_models_of_the_harness_are_still_there():
    code = (
        "import mikv.lab.lm_eval; from lm_eval.api.registry import model_registry as r; print('hf' in r, 'mikv' in r)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.bundled
def test_a_bad_cache_loses_pass_keys_and_a_good_one_is_close(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    good, bad = MiKVLM("smollm2"), MiKVLM("smollm2", cache="int2")
    loaded = load_model("smollm2")
    exact = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)

    def measure(model):
        found = lm_eval.simple_evaluate(model, tasks=NAMES[:1], task_manager=tasks, limit=6, bootstrap_iters=0)
        answers = [sample["filtered_resps"] for sample in found["samples"]["keys_choice"]]
        return found["results"]["keys_choice"]["acc,none"], torch.tensor(answers)[..., 0]  # (6, 4 choices)

    (reference, expected), (_, near), (lost, far) = map(measure, (exact, good, bad))
    assert reference >= 5 / 6
    assert lost <= 4 / 6
    assert (near - expected).abs().mean() < (far - expected).abs().mean() / 5
