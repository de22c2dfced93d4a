"""Random damage to saved caches: whatever is changed in a file, it is refused at once or is the same cache.

`python tests/fuzz_saved_caches.py --seed 1 --count 2000` makes that many mutants of caches in several states. Loading
one must raise CheckpointError, or give a cache that goes on exactly as the original. Every second mutant that edits
content has its checksums made again, as whoever edits a file can do: it must be refused, or be a cache that works.
"""

import argparse
import hashlib
import json
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from mikv import MiKVCache, MiKVConfig
from mikv.errors import CheckpointError, NumericsError
from mikv.integrations.transformers.layer import MiKVLayer
from mikv.integrations.transformers.versions import as_argument
from tiny import FIRST_WORD, VOCAB_SIZE, tiny_model

ROWS_OF_PADDING = (0, 9, 40)
STEPS = (1, 1, 70)  # tokens of the steps with which a cache goes on: the last one demotes some
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "float16", "nan", [], {}, [[]], [1], {"kind": "plain"}, 1.5, -0.5),
    *(-1, 0, 1, 2, 31, 32, 33, 64, 10**9, 2**31 - 1, 2**31, 2**63, 10**30, float("nan"), float("inf")),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool)
NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 6e4, 1e9, -(2.0**31))

Header = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """A cache as bytes, and what the model says when it goes on with it."""

    name: str
    model: PreTrainedModel
    file: bytes
    expected: Tensor

    def parts(self) -> tuple[Header, Tensors]:
        """Copies of header and tensors."""
        size = int.from_bytes(self.file[:8], "little")
        metadata = json.loads(self.file[8 : 8 + size])["__metadata__"]
        return json.loads(metadata["mikv"]), {name: tensor.clone() for name, tensor in load(self.file).items()}


@dataclass(frozen=True)
class Mutant:
    """A changed file; `rewritten` if its checksums are those of its content."""

    kind: str
    file: bytes
    rewritten: bool = False


EVICTION = MiKVConfig(low="drop", importance_ratio=0.3)
MIXED = MiKVConfig(
    high="fp16", low_k="int3", low_v="int2", low_grid="channel", key_rounding="nearest", skip_layers=(1,)
)
# All that a file can hold: family, configuration, tokens, padding of each row.
STATES: dict[str, tuple[str, MiKVConfig, int, tuple[int, ...]]] = {
    "warm-up": ("llama", MiKVConfig(), 20, (0,)),
    "packed": ("llama", MiKVConfig(), 200, (0,)),
    "padded rows": ("llama", MiKVConfig(), 150, ROWS_OF_PADDING),
    "padded warm-up": ("qwen2", MiKVConfig(), 50, ROWS_OF_PADDING),
    "dropped low tier": ("llama", EVICTION, 200, (0,)),
    "paper-int2": ("llama", MiKVConfig.preset("paper-int2"), 150, (0,)),
    "sliding layers": ("gemma3", MiKVConfig(), 150, (0,)),
    "exact": ("llama", MiKVConfig(importance_ratio=1, high="exact"), 40, (0,)),
    "channels": ("llama", MIXED, 150, (0,)),
}


@once
def state_of(name: str) -> State:
    """One of STATES."""
    family, config, num_tokens, padding = STATES[name]
    model = tiny_model(family)
    cache = MiKVCache(model.config, config)
    mask = torch.ones(len(padding), num_tokens, dtype=torch.long)
    for row, columns in enumerate(padding):
        mask[row, :columns] = 0
    with torch.no_grad():
        model(_tokens(len(padding), num_tokens), attention_mask=mask, **as_argument(cache))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache")
        cache.save(path)
        file = path.read_bytes()
        return State(name, model, file, go_on(model, MiKVCache.load(path, model.config)))


def _tokens(rows: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(FIRST_WORD, VOCAB_SIZE, (rows, num_tokens), generator=generator)


def go_on(model: PreTrainedModel, cache: MiKVCache) -> Tensor:
    """What the model says in a few more steps over the tokens that the cache says it has."""
    mask, said = _mask(cache), []
    for num_tokens in STEPS:
        tokens = _tokens(mask.shape[0], num_tokens)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        with torch.no_grad():
            said.append(model(tokens, attention_mask=mask, **as_argument(cache)).logits)
    return torch.cat(said, dim=1)


def _mask(cache: MiKVCache) -> Tensor:
    columns = next(layer.tokens.columns for layer in cache.layers if isinstance(layer, MiKVLayer))
    rows = max(1, len(columns.num_tokens))
    valid = columns.valid(torch.device("cpu"))
    return torch.ones(rows, columns.num_columns, dtype=torch.long) if valid is None else valid.long()


def outcome(state: State, mutant: Mutant, folder: Path) -> str:
    """`refused`, `same` or, of a rewritten one, `another cache`; everything else is a fault and named so."""
    path = folder / "mutant"
    path.write_bytes(mutant.file)
    try:
        loaded = MiKVCache.load(path, state.model.config)
    except CheckpointError:
        return "refused"
    except Exception as error:  # what is looked for
        return f"RAW ERROR: {error!r}"
    try:
        said = go_on(state.model, loaded)
        loaded.memory()
    except NumericsError as error:  # finite numbers that no tier can hold, as a model could have made them
        return "another cache" if mutant.rewritten else f"LATE FAILURE: {error!r}"
    except Exception as error:
        return f"LATE FAILURE: {error!r}"
    if said.shape == state.expected.shape and torch.equal(said, state.expected):
        return "same"
    if not bool(torch.isfinite(said).all()):
        return "LATE FAILURE: NaN"
    return "another cache" if mutant.rewritten else "WRONG RESULT"


def mutants(state: State, rng: random.Random) -> Iterator[Mutant]:
    """Endlessly many, of all kinds in turn."""
    while True:
        yield _damaged(state.file, rng)
        yield _retold(state.file, rng)
        for rewritten in (False, True):
            yield _edited(state, rng, rewritten, _edit_header)
            yield _edited(state, rng, rewritten, _edit_layer)
            yield _edited(state, rng, rewritten, _edit_tensors)
            yield _edited(state, rng, rewritten, _edit_numbers)


def _damaged(file: bytes, rng: random.Random) -> Mutant:
    """Bytes changed anywhere, the region of the header as often as that of the data."""
    data, size = bytearray(file), int.from_bytes(file[:8], "little")
    kind = rng.choice(["bit", "byte", "zeros", "noise", "cut", "longer", "removed", "inserted", "moved"])
    start = rng.choice([rng.randrange(8), rng.randrange(8, 8 + size), rng.randrange(8 + size, len(file))])
    stop = min(len(file), start + rng.choice([1, 2, 16, 64, 500]))
    if kind == "bit":
        data[start] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[start] = rng.randrange(256)
    elif kind == "zeros":
        data[start:stop] = bytes(stop - start)
    elif kind == "noise":
        data[start:stop] = rng.randbytes(stop - start)
    elif kind == "cut":
        del data[start:]
    elif kind == "longer":
        data += rng.randbytes(stop - start)
    elif kind == "removed":
        del data[start:stop]
    elif kind == "inserted":
        data[start:start] = rng.randbytes(stop - start)
    else:
        other = rng.randrange(8 + size, len(file) - (stop - start))
        data[start:stop], data[other : other + stop - start] = data[other : other + stop - start], data[start:stop]
    return Mutant(f"bytes: {kind}", bytes(data))


def _retold(file: bytes, rng: random.Random) -> Mutant:
    """The file's own table of tensors, changed: names, dtypes, shapes, places."""
    size = int.from_bytes(file[:8], "little")
    table = json.loads(file[8 : 8 + size])
    name, other = rng.sample([name for name in table if name != "__metadata__"], 2)
    kind = rng.choice(["swap", "shape", "dtype", "places", "rename", "remove", "metadata", "any"])
    if kind == "swap":
        table[name], table[other] = table[other], table[name]
    elif kind == "shape":
        table[name]["shape"] = rng.choice(
            [table[name]["shape"][::-1], [10**9, 0], [], [2**62, 4], table[other]["shape"]]
        )
    elif kind == "dtype":
        table[name]["dtype"] = rng.choice(["F32", "F16", "BF16", "U8", "I8", "I32", "F64", "F8_E4M3", "F4", "C64", "X"])
    elif kind == "places":
        table[name]["data_offsets"] = rng.choice([table[other]["data_offsets"], [0, 0], [0, 2**63], [8, 0]])
    elif kind == "rename":
        table[rng.choice([other, f"{name}x", "9.keys", "keys", "01.keys"])] = table.pop(name)
    elif kind == "remove":
        del table[name]
    elif kind == "metadata":
        _change_anything(table["__metadata__"], rng)
    else:
        _change_anything(table, rng)
    text = json.dumps(table).encode()
    return Mutant(f"table: {kind}", len(text).to_bytes(8, "little") + text + file[8 + size :])


def _edited(
    state: State, rng: random.Random, rewritten: bool, edit: Callable[[Header, Tensors, random.Random], str]
) -> Mutant:
    """The file with another header or other tensors, and the old checksums or new ones."""
    header, tensors = state.parts()
    old = dict(header["tensors"])
    kind = edit(header, tensors, rng)
    if rewritten and isinstance(header.get("tensors"), dict):
        new = {name: old[name] if kind == "header: tensors" else checksum(tensor) for name, tensor in tensors.items()}
        header["tensors"] = header["tensors"] if kind == "header: tensors" else new
    text = json.dumps(header, sort_keys=True)
    of_header = hashlib.sha256(text.encode()).hexdigest()
    if not rewritten:
        size = int.from_bytes(state.file[:8], "little")
        of_header = json.loads(state.file[8 : 8 + size])["__metadata__"]["mikv_sha256"]
    apart = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    return Mutant(kind, save(apart, {"mikv": text, "mikv_sha256": of_header}), rewritten)


def checksum(tensor: Tensor) -> str:
    """As the format has it: of dtype, shape and bytes."""
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + content).hexdigest()


def _edit_header(header: Header, tensors: Tensors, rng: random.Random) -> str:
    section = rng.choice(sorted(header))
    if isinstance(header[section], (dict, list)) and rng.random() < 0.9:
        _change_anything(header[section], rng)
    else:
        _change_one(header, section, rng)
    return f"header: {section}"


def _edit_layer(header: Header, tensors: Tensors, rng: random.Random) -> str:
    layers = header["layers"]
    i, j = rng.sample(range(len(layers)), 2)
    fields = [field for field in layers[i] if field in layers[j]]
    field = rng.choice(fields)
    if rng.random() < 0.3:
        layers[i][field], layers[j][field] = layers[j][field], layers[i][field]
    elif isinstance(layers[i][field], (dict, list)):
        _change_anything(layers[i][field], rng)
        if rng.random() < 0.3:
            layers[j][field] = layers[i][field]
    else:
        _change_one(layers[i], field, rng)
    return f"layer: {field}"


def _change_anything(root: Any, rng: random.Random) -> None:
    """Change something below `root`, a dictionary or list, at a depth of its own."""
    where = root
    while True:
        keys = sorted(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            where.update(x=1) if isinstance(where, dict) else where.append(rng.choice(VALUES))
            return
        key = rng.choice(keys)
        if not isinstance(where[key], (dict, list)) or rng.random() < 0.3:
            _change_one(where, key, rng)
            return
        where = where[key]


def _change_one(where: Any, key: Any, rng: random.Random) -> None:
    value, kind = where[key], rng.choice(["remove", "value", "value", "near", "other", "twice", "rename"])
    if kind == "remove":
        del where[key]
    elif kind == "near" and type(value) in (int, float):
        where[key] = rng.choice([value + 1, value - 1, value + 32, value - 32, value * 2, -value])
    elif kind == "near" and isinstance(value, bool):
        where[key] = not value
    elif kind == "other":
        where[key] = rng.choice(list(where.values()) if isinstance(where, dict) else where)
    elif kind == "twice" and isinstance(where, list):
        where.insert(key, value)
    elif kind == "rename" and isinstance(where, dict):
        where[rng.choice(["x", f"{key}x", *map(str, where)])] = where.pop(key)
    else:
        where[key] = rng.choice(VALUES)


def _edit_tensors(header: Header, tensors: Tensors, rng: random.Random) -> str:
    name, other = rng.sample(sorted(tensors), 2)
    tensor = tensors[name]
    dim = rng.randrange(tensor.dim())
    kind = rng.choice(["remove", "rename", "swap", "copy", "turn", "flat", "dtype", "bits", "cut", "double", "extra"])
    if kind == "remove":
        del tensors[name]
    elif kind == "rename":
        tensors[rng.choice([f"{name}x", other, f"9{name}", "x"])] = tensors.pop(name)
    elif kind == "swap":
        alike = [twin for twin in tensors if twin != name and tensors[twin].shape == tensor.shape]
        twin = rng.choice(alike or [other])
        tensors[name], tensors[twin] = tensors[twin], tensor
    elif kind == "copy":
        tensors[name] = tensors[other]
    elif kind == "turn":
        tensors[name] = tensor.transpose(dim, rng.randrange(tensor.dim()))
    elif kind == "flat":
        tensors[name] = rng.choice([tensor.flatten(), tensor[None], tensor[:0], torch.zeros(())])
    elif kind == "dtype":
        tensors[name] = tensor.nan_to_num().to(rng.choice(DTYPES))
    elif kind == "bits":
        tensors[name] = tensor.view(rng.choice([x for x in DTYPES if x.itemsize == tensor.dtype.itemsize]))
    elif kind == "cut":
        tensors[name] = tensor.narrow(dim, 0, rng.randrange(tensor.shape[dim] + 1))
    elif kind == "double":
        tensors[name] = torch.cat([tensor, tensor], dim)
    else:
        tensors[rng.choice(["x", "0.x", "0.high.x", "9.keys", ""])] = tensor.clone()
    return f"tensors: {kind}"


def _edit_numbers(header: Header, tensors: Tensors, rng: random.Random) -> str:
    name = rng.choice([name for name, tensor in tensors.items() if tensor.numel()])
    flat = tensors[name].view(-1)
    kind = rng.choice(["one", "all", "noise", "bit", "moved"])
    at = rng.randrange(flat.numel())
    if kind in ("one", "all"):
        number = rng.choice(NUMBERS)
        if not flat.is_floating_point():
            number = rng.choice([0, 1, 127, 255] if flat.dtype == torch.uint8 else [-1, 0, 1, 10**6, 2**31 - 1])
        flat[at if kind == "one" else slice(None)] = number
    elif kind == "noise":
        noise = torch.frombuffer(bytearray(rng.randbytes(flat.nbytes)), dtype=torch.uint8)
        flat.view(torch.uint8)[:] = noise
    elif kind == "bit":
        content = flat.view(torch.uint8)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        flat[:] = flat.roll(1 + at)
    return f"numbers: {kind}"


def faults(names: list[str], count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Outcomes of that many mutants of these states by kind, and the descriptions of those that are faults."""
    found, wrong = Counter[str](), []
    streams = {name: mutants(state_of(name), random.Random(f"{seed} {name}")) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            name = names[i % len(names)]
            mutant = next(streams[name])
            result = outcome(state_of(name), mutant, Path(folder))
            found[result.partition(":")[0]] += 1
            if result[0].isupper():
                wrong.append(f"{name}, {mutant.kind}, {'new' if mutant.rewritten else 'old'} checksums: {result}")
    return found, wrong


def main() -> int:
    """The exit code is 1 if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    arguments = parser.parse_args()
    logging.getLogger("mikv").setLevel(logging.ERROR)
    found, wrong = faults(list(STATES), arguments.count, arguments.seed)
    print(f"{arguments.count} saved caches changed, seed {arguments.seed}: {dict(found)}")
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
