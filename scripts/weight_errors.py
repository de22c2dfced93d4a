"""How far are the outputs of real layers off, by solver, bits and group size, on text that calibration never saw?

Inputs of a few linear layers are gathered on the split `tune`, prose and code in turns, for calibration, and on
`report` to measure with. The error is the energy of the output's error relative to that of the output. At most 512
output rows of each layer, evenly spread, are solved: rows do not depend on each other. Records are added to the file as
they are made.

    python scripts/weight_errors.py MODEL_FOLDER NAME docs/results/weight_errors.jsonl --tokens 8192 --layers 2,14,27
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mikv.lab.tasks.text import passages
from mikv.records import append_line
from mikv.weights.solve import METHODS, output_error, solve

CHUNK, MOST_ROWS, REPORT_TOKENS = 512, 512, 4096
PROJECTIONS = ("q_proj", "o_proj", "up_proj", "down_proj")
BITS = (2, 3, 4)
GROUP_SIZE = 128
OTHER_GROUP_SIZES = (32, 64, 256, None)
COMPARED = ("gptq", "refined", "refined-uniform")  # at all group sizes


def chunks(tokenizer, split: str, num_tokens: int) -> Iterator[Tensor]:
    """Prose and code in turns, (1, 512) tokens each, spread over the texts."""
    texts = [tokenizer(passages(kind, split), return_tensors="pt").input_ids[0] for kind in ("prose", "code")]
    each = num_tokens // CHUNK // len(texts)
    for index in range(each):
        for ids in texts:
            start = index * (len(ids) // each)
            yield ids[None, start : start + CHUNK]


def hessians(model: nn.Module, layers: dict[str, nn.Linear], parts: Iterator[Tensor]) -> dict[str, Tensor]:
    """The mean of x x^T over the inputs of every layer."""
    sums = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def gather(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, 1)
        sums[name].addmm_(x.T, x)
        counts[name] += len(x)

    hooks = [layer.register_forward_pre_hook(lambda _, x, name=name: gather(name, x)) for name, layer in layers.items()]
    with torch.inference_mode():
        for ids in parts:
            model.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def settings() -> Iterator[tuple[str, int, int | None]]:
    for bits in BITS:
        yield from ((method, bits, GROUP_SIZE) for method in METHODS)
        yield from ((method, bits, size) for method in COMPARED for size in OTHER_GROUP_SIZES)


def chosen_layers(model: nn.Module, wanted: list[int], projections: tuple[str, ...]) -> dict[str, nn.Linear]:
    """These projections of each of these decoder layers."""
    names = [f"model.layers.{index}." for index in wanted]
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name: module
        for name, module in found.items()
        if any(name.startswith(n) for n in names) and name.endswith(projections)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=8192, help="for calibration")
    parser.add_argument("--layers", default="2,14", help="decoder layers")
    parser.add_argument("--projections", default=",".join(PROJECTIONS), help="their linear layers")
    options = parser.parse_args()
    wanted = [int(index) for index in options.layers.split(",")]
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[: max(wanted) + 1]  # what follows is not needed
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    layers = chosen_layers(model, wanted, tuple(options.projections.split(",")))
    tune = hessians(model, layers, chunks(tokenizer, "tune", options.tokens))
    report = hessians(model, layers, chunks(tokenizer, "report", REPORT_TOKENS))
    for name, layer in track(layers.items(), description=options.name):
        weight = layer.weight.detach()[:: -(-layer.out_features // MOST_ROWS)].contiguous()
        for method, bits, group_size in settings():
            start = time.perf_counter()
            coded = solve(weight, bits, group_size, method, tune[name])
            record = {
                "kind": "weight-error",
                "model": options.name,
                "layer": name.removeprefix("model."),
                "method": method,
                "bits": bits,
                "group_size": group_size,
                "bits_per_weight": coded.bits_per_weight,
                "error": output_error(weight, coded, report[name]),
                "seconds": time.perf_counter() - start,
                "rows": len(weight),
                "calibration_tokens": options.tokens,
            }
            append_line(options.out, record)


if __name__ == "__main__":
    main()
