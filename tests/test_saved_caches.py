"""A saved cache is read as it was, or refused with a message at once; saving leaves the old file or the new one."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import stat
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fuzz_saved_caches import STATES, Mutant, State, checksum, faults, go_on, outcome, state_of
from mikv import CacheStateError, MiKVCache, MiKVConfig
from mikv.errors import CheckpointError
from mikv.integrations.transformers import checkpoint
from mikv.integrations.transformers.layer import MiKVLayer
from mikv.integrations.transformers.versions import as_argument
from tiny import tiny_model


def cache_of(state: State, folder: Path) -> MiKVCache:
    (folder / "original").write_bytes(state.file)
    return MiKVCache.load(folder / "original", state.model.config)


def content(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Table and data of a safetensors file: the library writes the metadata in any order."""
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def rewritten(state: State, folder: Path, change: Callable[[Any, Any], object]) -> Path:
    """The saved cache after `change(header, tensors)`, with the checksums of what it now says."""
    header, tensors = state.parts()
    change(header, tensors)
    header["tensors"] = {name: checksum(tensor) for name, tensor in tensors.items()}
    text = json.dumps(header)
    metadata = {"mikv": text, "mikv_sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file(tensors, folder / "changed", metadata)
    return folder / "changed"


@pytest.mark.parametrize("name", STATES)
def test_whatever_is_changed_in_a_file_is_refused_or_the_same(name: str) -> None:
    _, wrong = faults([name], count=60, seed=0)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", STATES)
def test_each_bit_of_the_header_and_of_each_tensor_counts(name: str, tmp_path: Path) -> None:
    state, rng = state_of(name), random.Random(name)
    start = 8 + int.from_bytes(state.file[:8], "little")
    header = json.loads(state.file[8:start])
    header.pop("__metadata__")
    places = [start + rng.randrange(*entry["data_offsets"]) for entry in header.values() if 0 not in entry["shape"]]
    places += [rng.randrange(8, start) for _ in range(20)]
    for place in places:
        damaged = bytearray(state.file)
        damaged[place] ^= 1 << rng.randrange(8)
        result = outcome(state, Mutant("bit", bytes(damaged)), tmp_path)
        assert result == "refused" or (place < start and result == "same"), f"byte {place}: {result}"


def test_an_unchanged_file_goes_on_as_the_cache_did(tmp_path: Path) -> None:
    for state in map(state_of, STATES):
        path = tmp_path / "again"
        cache_of(state, tmp_path).save(path, overwrite=True)
        assert content(path.read_bytes()) == content(state.file)
        assert torch.equal(go_on(state.model, MiKVCache.load(path, state.model.config)), state.expected)


def without_layer(header: Any, tensors: Any) -> None:
    header["layers"][0] = {"kind": "empty"}
    for name in [name for name in tensors if name.startswith("0.")]:
        del tensors[name]


def with_other_padding(header: Any, tensors: Any) -> None:
    header["layers"][1]["columns"]["holes"][1] = [[20, 29]]


def longer(header: Any, tensors: Any) -> None:
    header["layers"][0]["columns"].update(num_tokens=[10**9], num_columns=10**9)


def layer(index: int, *path: str, **changes: object) -> Callable[[Any, Any], None]:
    """Change values in the description of a layer."""

    def change(header: Any, tensors: Any) -> None:
        where = header["layers"][index]
        for name in path:
            where = where[name]
        where.update(changes)

    return change


def filled(name: str, value: float) -> Callable[[Any, Any], object]:
    """Change all numbers of a tensor."""
    return lambda header, tensors: tensors[name].fill_(value)


NAN, INF = float("nan"), float("inf")
# state, change, what is said
INCONSISTENT: dict[str, tuple[str, Callable[[Any, Any], object], str]] = {
    "rows": ("packed", layer(0, shape=[10**9, 2, 64]), "layer 0: num_tokens is not a list of 1000000000"),
    "heads": (
        "packed",
        layer(0, shape=[1, 10**9, 64]),
        "layer 0: .* is \\(1, 2, 1, 64\\) torch.float16, not \\(1, 1000000000, 1, 64\\)",
    ),
    "columns": ("packed", layer(1, "columns", num_columns=201), "layer 1: row 0 has 200 tokens"),
    "low count": ("packed", layer(0, "counts", low=[33]), "not whole blocks of 32"),
    "high count": ("packed", layer(0, "counts", high=[10**6]), "1000000 tokens do not fit"),
    "missing count": ("packed", lambda header, _: header["layers"][0]["counts"].pop("low"), "counts has no 'low'"),
    "position": ("packed", filled("0.high.position", 10**6), "high.position of row 0"),
    "position twice": ("packed", filled("0.high.position", 1), "high.position of row 0"),
    "score": ("packed", filled("1.high.score", NAN), "layer 1: high.score of row 0 has NaN"),
    "scale": ("packed", filled("0.low.k.scale", INF), "low.k.scale has NaN or Inf"),
    "negative scale": ("packed", filled("0.low.v.scale", -1), "low.v.scale is not between 0 and"),
    "huge scale": ("packed", filled("0.low.v.scale", 65504), "low.v.scale is not between 0 and"),
    "zero-point": ("paper-int2", filled("0.low.v.zero", NAN), "low.v.zero has NaN or Inf"),
    "center": ("packed", filled("0.key_transform.center", NAN), "key_transform.center"),
    "balancer": ("packed", filled("0.key_transform.balancer", 0), "key_transform.balancer"),
    "feedback": ("packed", filled("0.key_transform.feedback", 255), "key_transform.feedback .* NaN"),
    "raw tier": ("channels", filled("0.high.k.data", NAN), "high.k.data has NaN or Inf"),
    "warm-up": ("warm-up", filled("0.keys", NAN), "layer 0: keys has NaN or Inf"),
    "moment": ("warm-up", lambda _, tensors: tensors["0.query_moment"].neg_(), "query_moment is not a sum"),
    "maximum": ("warm-up", filled("1.query_max", -1), "query_max has negative"),
    "window": ("sliding layers", filled("0.values", INF), "layer 0: values has NaN or Inf"),
    "seen": ("sliding layers", layer(0, seen=151), "layer 1 has 150 columns in 1 rows, but layer 0 has 151"),
    "holes": (
        "padded rows",
        lambda header, _: header["layers"][0]["columns"]["holes"].reverse(),
        "row 0 has 150 tokens",
    ),
    "padding": ("padded rows", with_other_padding, "layer 1 has its padding elsewhere"),
    "empty layer": ("packed", without_layer, "layer 0 is empty, but layer 1 has 200 columns"),
    "dtype": ("packed", layer(0, dtype="nn"), "its dtype is 'nn'"),
    "kind": ("packed", layer(0, kind=["packed"]), "its kind is"),
    "dropped": ("dropped low tier", longer, "layer 1 has 200 columns"),
    "settings": ("packed", lambda header, _: header["config"].update(low_k="int2"), "low.k.codes is"),
    "unknown setting": ("packed", lambda header, _: header["config"].update(speed=1), "unknown setting 'speed'"),
    "unknown field": ("packed", lambda header, _: header.update(x=1), "the header has an unknown 'x'"),
    "no layers": ("packed", lambda header, _: header.update(layers=[]), "belongs to none of its 0 layers"),
    "lists": ("packed", lambda header, _: header.update(layers=[[], []]), "layer 0: it is not described"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_what_cannot_be_a_cache_is_refused_by_name_though_its_checksums_fit(case: str, tmp_path: Path) -> None:
    name, change, message = INCONSISTENT[case]
    state = state_of(name)
    path = rewritten(state, tmp_path, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=f"changed .*({message})"):
        MiKVCache.load(path, state.model.config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB: nothing of the size it claims


def test_a_header_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "deep", {"mikv": "[" * 100_000})
    with pytest.raises(CheckpointError, match="deep has a damaged header"):
        MiKVCache.load(tmp_path / "deep", state_of("packed").model.config)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, "has format version 3, which has no checksums .* fill a cache again and save it"),
        (5, "has format version 5, this mikv reads 4; update mikv"),
        (True, "names no version"),
        ("4", "names no version"),
    ],
)
def test_a_cache_saved_in_another_version_is_refused(version: object, message: str, tmp_path: Path) -> None:
    state = state_of("packed")
    path = rewritten(state, tmp_path, lambda header, tensors: header.update(version=version))
    with pytest.raises(CheckpointError, match=message):
        MiKVCache.load(path, state.model.config)


@pytest.mark.parametrize(
    ("state", "family", "settings", "message"),
    [
        (
            "packed",
            "llama",
            {"num_key_value_heads": 4},
            "holds 2 KV heads of dim 64; this model has 4 KV heads of dim 64",
        ),
        ("packed", "llama", {"head_dim": 32}, "holds 2 KV heads of dim 64; this model has 2 KV heads of dim 32"),
        ("packed", "llama", {"num_hidden_layers": 3}, "layers 2 full_attention; this has 3 full_attention"),
        ("packed", "llama", {"hidden_size": 128}, "one with hidden_size 64; this has 128"),
        ("packed", "qwen2", {}, "one with model_type 'llama'; this has 'qwen2'"),
        ("sliding layers", "gemma3", {"sliding_window": 8}, "layer 0 has a window of 16; here it is 8"),
        ("sliding layers", "gemma3", {"layer_types": ["full_attention"] * 2}, "1 sliding_attention; this has 2 full"),
        ("sliding layers", "gemma3", {"num_key_value_heads": 1}, "layer 0 holds 2 KV heads"),
    ],
)
def test_the_cache_of_another_model_is_refused(
    state: str, family: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_bytes(state_of(state).file)
    with pytest.raises(CheckpointError, match=f"cache was saved from another model: .*{message}"):
        MiKVCache.load(tmp_path / "cache", tiny_model(family, **settings).config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "missing does not exist"),
        (".", "is a folder, not a regular file"),
        ("/dev/zero", "is a device, not a regular file"),
        ("pipe", "is a pipe, not a regular file"),
        ("empty", "is not an intact safetensors file"),
        ("text", "is not an intact safetensors file"),
        ("other", "is a safetensors file, but not one that MiKVCache.save wrote"),
    ],
)
def test_what_is_no_saved_cache_is_named(name: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no such thing" * 100)
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match=message):
        MiKVCache.load(tmp_path / name, state_of("packed").model.config)


def test_a_cache_whose_file_changes_later_does_not_change(tmp_path: Path) -> None:
    state = state_of("packed")
    cache = cache_of(state, tmp_path)
    (tmp_path / "original").write_bytes(b"x" * len(state.file))
    assert torch.equal(go_on(state.model, cache), state.expected)


def test_layers_that_an_interrupted_step_left_different_are_not_saved(tmp_path: Path) -> None:
    cache = cache_of(state_of("packed"), tmp_path)
    assert isinstance(cache.layers[1], MiKVLayer)
    cache.layers[1].tokens.crop(1)
    with pytest.raises(CacheStateError, match=r"layer 1 has 199 columns .* layer 0 has 200 .* call cache.reset\(\)"):
        cache.save(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_layers_with_nan_are_not_saved(tmp_path: Path) -> None:
    cache = cache_of(state_of("sliding layers"), tmp_path)
    cache.layers[0].keys[0, 0, 0, 0] = float("nan")
    with pytest.raises(CacheStateError, match="layer 0: keys has NaN or Inf"):
        cache.save(tmp_path / "cache")


def test_layers_that_read_the_keys_of_others_are_saved_as_nothing(tmp_path: Path) -> None:
    model = tiny_model("gemma3n")
    cache = MiKVCache(model.config, MiKVConfig())
    tokens = torch.arange(3, 90)[None]
    model(tokens, **as_argument(cache))
    cache.save(tmp_path / "cache")
    loaded = MiKVCache.load(tmp_path / "cache", model.config)
    assert torch.equal(go_on(model, loaded), go_on(model, cache))


def test_a_window_that_records_the_past_is_saved_as_a_window(tmp_path: Path) -> None:
    state = state_of("sliding layers")
    cache = cache_of(state, tmp_path)
    cache.activate_past_recording()
    tokens = torch.arange(3, 12)[None]
    state.model(tokens, **as_argument(cache))
    assert cache.layers[0].keys.shape[2] > state.model.config.sliding_window
    cache.save(tmp_path / "cache")
    loaded = MiKVCache.load(tmp_path / "cache", state.model.config)
    step = tokens[:, :1]
    assert torch.equal(state.model(step, **as_argument(loaded)).logits, state.model(step, **as_argument(cache)).logits)


def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
    path.with_name(".tmp-of-the-library").write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_what_was_there(overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(state_of("packed"), tmp_path)
    path = tmp_path / ("original" if overwrite else "new")
    before = (tmp_path / "original").read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=rf"cannot write {path}: .*No space left on device.*; is there room"):
        cache.save(path, overwrite=overwrite)
    assert [found.name for found in tmp_path.iterdir()] == ["original"]
    assert (tmp_path / "original").read_bytes() == before


def test_an_error_after_writing_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    cache = cache_of(state_of("packed"), tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*new: Disk quota exceeded"):
        cache.save(tmp_path / "new")
    assert [found.name for found in tmp_path.iterdir()] == ["original"]


def test_targets_that_cannot_be_are_refused(tmp_path: Path) -> None:
    cache = cache_of(state_of("packed"), tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        (".", "is a folder"),
        ("pipe", "is a pipe"),
        ("/dev/null", "is a device"),
        ("n" * 300, "File name too long; choose a shorter name"),
        ("no/such/x", "the folder .* does not exist"),
        ("original", "exists; pass overwrite=True"),
    ):
        with pytest.raises(CheckpointError, match=message):
            cache.save(tmp_path / name)
    cache.save(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert sorted(found.name for found in tmp_path.iterdir()) == ["new", "original", "pipe"]


def savers(cache: MiKVCache, path: Path, rounds: int, overwrite: bool) -> list[tuple[ForkProcess, Connection]]:
    """Processes that start at the same moment to save the cache to `path`0, 1 ... 9, again and again."""
    context = multiprocessing.get_context("fork")  # a new interpreter imports transformers for seconds
    together = context.Barrier(3)
    processes = []
    for _ in range(3):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=save_repeatedly, args=(cache, path, rounds, overwrite, together, there))
        process.start()
        processes.append((process, here))
    return processes


def save_repeatedly(cache: MiKVCache, path: Path, rounds: int, overwrite: bool, together: Any, said: Any) -> None:
    torch.set_num_threads(1)
    results = []
    together.wait()
    for i in range(rounds):
        try:
            cache.save(f"{path}{i % 10}", overwrite=overwrite)
            results.append("saved")
        except CheckpointError as error:
            results.append("refused" if "exists; pass overwrite=True" in str(error) else repr(error))
    said.send(results)


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_many_processes_one_saves_to_a_path(overwrite: bool, tmp_path: Path) -> None:
    state = state_of("packed")
    started = savers(cache_of(state, tmp_path), tmp_path / "saved", 10, overwrite)
    said = [connection.recv() for _, connection in started]
    for process, _ in started:
        process.join()
    for results in zip(*said, strict=True):
        assert sorted(results) == (["saved"] * 3 if overwrite else ["refused", "refused", "saved"])
    for i in range(10):
        assert content((tmp_path / f"saved{i}").read_bytes()) == content(state.file)
    assert len(list(tmp_path.iterdir())) == 11


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_killed_while_it_saves_leaves_whole_files(number: int, tmp_path: Path) -> None:
    state = state_of("packed")
    for process, _ in savers(cache_of(state, tmp_path), tmp_path / "saved", 10**6, overwrite=True):
        time.sleep(0.1)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == -number
    saved = list(tmp_path.glob("saved*"))
    assert saved
    assert all(content(path.read_bytes()) == content(state.file) for path in saved)
    assert number == signal.SIGKILL or not list(tmp_path.glob(".*"))


def test_a_refused_file_says_nothing_of_the_model_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    (tmp_path / "cache").write_bytes(state_of("packed").file[:-1])
    with caplog.at_level(logging.WARNING, "mikv"), pytest.raises(CheckpointError):
        MiKVCache.load(tmp_path / "cache", model.config)
    assert not caplog.records
    assert model.config._attn_implementation == "sdpa"
