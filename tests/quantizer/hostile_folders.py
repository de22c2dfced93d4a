"""Mutants of a folder with a quantized model: what disks, editors and attackers do to files. Seeded.

`PYTHONPATH=tests python tests/quantizer/hostile_folders.py SEED COUNT` makes more of them and prints what is not as it
should be; `fuzz`
is the same for tests. A mutant must load to the very same answers, or be refused by an error of mikv, in seconds.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantized_models import logits, quantized
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mikv.errors import MiKVError
from mikv.models import load_model
from tiny import tiny_tokenizer

SECONDS = 20
WEIGHTS, CONFIG = "model.safetensors", "config.json"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 31, 33, 2**31, 10**12, -(10**9), 1e-9, 1e308, 0.5, "", "x", "float16", "../..",
    [], {}, [1], ["(a+)+$", "(.*)*x", ".*"], ["model"], [["a"]], {"a": 1},
    {"model.layers.0.mlp.down_proj": {"bits": 3}}, "é\x00",
)  # fmt: skip

Edit = Callable[[random.Random, dict[str, Tensor]], object]


def make_folder(folder: Path, **settings: Any) -> Path:
    """A quantized model with its tokenizer."""
    quantized(**settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def flip_bytes(chance: random.Random, folder: Path) -> None:
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    size = 8 + int.from_bytes(data[:8], "little")
    start, end = chance.choice([(0, 8), (8, size), (size, len(data)), (size, len(data))])
    for _ in range(chance.choice([1, 1, 1, 4, 64])):
        data[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def cut_or_lengthen(chance: random.Random, folder: Path) -> None:
    file = folder / chance.choice([WEIGHTS, WEIGHTS, CONFIG, "tokenizer.json", "tokenizer_config.json"])
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.7 else data + chance.randbytes(40))


def remove_file(chance: random.Random, folder: Path) -> None:
    (folder / chance.choice([WEIGHTS, CONFIG])).unlink()


def edit_text(chance: random.Random, folder: Path) -> None:
    file = folder / CONFIG
    data = bytearray(file.read_bytes())
    place = chance.randrange(len(data))
    data[place : place + chance.randrange(3)] = chance.choice([b"", b"9", b"-", b"[", b"}", b"\xff", b"NaN", b"1e999"])
    file.write_bytes(data)


def edit_field(chance: random.Random, folder: Path) -> None:
    file = folder / CONFIG
    config = json.loads(file.read_text())
    part = config["quantization_config"] if chance.random() < 0.5 else config
    name = chance.choice(
        [*sorted(part), "of_tomorrow", "module_settings", "modules_to_not_convert", "num_hidden_layers"]
    )
    if chance.random() < 0.15:
        part.pop(name, None)
    else:
        part[name] = chance.choice(HOSTILE)
    file.write_text(json.dumps(config))


def edit_header(chance: random.Random, folder: Path) -> None:
    """The JSON at the beginning of the weights, whose length is corrected."""
    file = folder / WEIGHTS
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name, other = chance.sample(sorted(header.keys() - {"__metadata__"}), 2)
    match chance.randrange(6):
        case 0:
            header[name], header[other] = header[other], header[name]
        case 1:
            header[name]["shape"] = chance.choice([[], [2**40], [0], header[name]["shape"][::-1], [2**62, 2**62]])
        case 2:
            header[name]["dtype"] = chance.choice(["F32", "BF16", "I8", "U8", "F16", "X", "F8_E4M3"])
        case 3:
            header[name]["data_offsets"] = header[other]["data_offsets"]
        case 4:
            header[f"{name}.{chance.randrange(9)}"] = header.pop(name)
        case _:
            about = header["__metadata__"]
            about[chance.choice(sorted(about))] = chance.choice(["", "{}", "[]", "null", '{"tensors": []}', "[" * 9999])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def edit_tensors(chance: random.Random, folder: Path) -> None:
    """The file is written anew, with or without what it said of itself, and config.json may claim the older format."""
    file = folder / WEIGHTS
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    chance.choice(EDITS)(chance, tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, file, about if chance.random() < 0.7 else None)


def _some(chance: random.Random, tensors: dict[str, Tensor]) -> str:
    return chance.choice(sorted(tensors))


def _swap(chance: random.Random, tensors: dict[str, Tensor]) -> None:
    name = _some(chance, tensors)
    other = chance.choice([n for n in sorted(tensors) if tensors[n].shape == tensors[name].shape])
    tensors[name], tensors[other] = tensors[other], tensors[name].clone()


def _set(change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(chance: random.Random, tensors: dict[str, Tensor]) -> None:
        name = _some(chance, tensors)
        tensors[name] = change(tensors[name].clone())

    return edit


EDITS: tuple[Edit, ...] = (
    lambda chance, tensors: tensors.pop(_some(chance, tensors)),
    _swap,
    lambda chance, tensors: tensors.update({f"copy.{_some(chance, tensors)}": torch.ones(3)}),
    _set(lambda x: x.flatten()),
    _set(lambda x: x[:-1] if len(x) > 1 else torch.cat([x, x])),
    _set(lambda x: x.transpose(0, -1)),
    _set(lambda x: x.roll(1)),
    _set(lambda x: -x if x.is_floating_point() else 255 - x),
    _set(lambda x: x * 1.001 if x.is_floating_point() else x ^ 1),
    _set(lambda x: x.float() if x.dtype != torch.float32 else x.double()),
    _set(lambda x: torch.full_like(x, torch.inf if x.is_floating_point() else 0)),
    _set(lambda x: torch.full_like(x, torch.nan if x.is_floating_point() else 255)),
    _set(torch.zeros_like),
)
OFTEN = (flip_bytes, edit_field, edit_tensors)
MUTATIONS = (*OFTEN, *OFTEN, cut_or_lengthen, remove_file, edit_text, edit_header)


def fuzz(seed: int, count: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """How the mutants of `folder` ended, and a line for each that was wrong, slow, or an error that is not mikv's."""
    expected = logits(load_model(str(folder)).model)
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    for i in range(count):
        chance = random.Random(f"{seed} {i}")
        mutation = chance.choice(MUTATIONS)
        with tempfile.TemporaryDirectory() as place:
            mutant = Path(shutil.copytree(folder, Path(place) / "mutant"))
            mutation(chance, mutant)
            start = time.monotonic()
            outcome = _outcome(mutant, expected)
            if time.monotonic() - start > SECONDS:
                outcome = f"slow: {outcome}"
        outcomes[outcome.partition(":")[0]] += 1
        if outcome.partition(":")[0] in ("wrong", "slow", "raw"):
            faults.append(f"seed {seed}, mutant {i}, {mutation.__name__}: {outcome}")
    return outcomes, faults


def _outcome(mutant: Path, expected: Tensor) -> str:
    try:
        found = logits(load_model(str(mutant)).model)
    except MiKVError as error:
        return type(error).__name__
    except BaseException as error:
        return f"raw: {type(error).__name__}: {str(error)[:200]}"
    return "same" if torch.equal(found, expected) else f"wrong: {float((found - expected).abs().max())}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as there:
        total, bad = fuzz(int(sys.argv[1]), int(sys.argv[2]), make_folder(Path(there) / "model"))
    print(*bad, dict(total), sep="\n")
    sys.exit(bool(bad))
