"""Measure what quantized weights do to a model's predictions, and what the paper's figure shows: quality over q and g.

`--cells refined:3:128,gptq:3:64` measures methods, bits and group sizes (`row`: one group per row; `exact`: no change).
One record each: bits per weight of the quantized matrices, scales included; perplexity, KL divergence and top-1
agreement with the exact model on held-out prose and code. What is in docs/results/weights.jsonl already is not measured
again. `--page` writes weights.md and a picture per model from the records.
"""

import argparse
import copy
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from weights_page import write_page

import mikv
from mikv.bench.machine import circumstances
from mikv.lab.weight_fidelity import Reference, calibration_texts
from mikv.models import LoadedModel, load_model
from mikv.records import Record, append_line, read_lines
from mikv.weights.solve import needs_hessian

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RECORDS = RESULTS / "weights.jsonl"
IDENTITY = ("model", "method", "bits", "group_size", "calibration_tokens", "samples", "num_tokens")
CALIBRATION_LENGTH = 512
GROUPS = ("32", "64", "128", "256", "row")
GRID = (
    "exact",
    *(f"{method}:{q}:{g}" for method in ("rtn", "offset", "gptq", "refined") for q in (2, 3, 4) for g in GROUPS),
)


def main() -> None:
    arguments = parsed()
    if arguments.page:
        errors, tasks = (read_lines(RESULTS / f"{name}.jsonl") for name in ("weight_errors", "weights_tasks"))
        write_page(read_lines(RECORDS), errors, tasks, RESULTS)
        return
    torch.set_num_threads(arguments.threads)
    known = {identity(record) for record in read_lines(RECORDS)} if RECORDS.exists() else set()
    wanted = [cell_of(spec, arguments) for spec in arguments.cells.split(",")]
    missing = [cell for cell in wanted if identity(cell) not in known]
    if not missing:
        return
    loaded = load_model(arguments.model)
    reference = Reference.of_model(loaded.model, loaded.tokenizer, arguments.samples, arguments.num_tokens)
    texts = calibration_texts(loaded.tokenizer, arguments.calibration, CALIBRATION_LENGTH)
    for cell in missing:
        place = arguments.keep and arguments.keep / "-".join(str(cell[name]) for name in IDENTITY[:4])
        numbers = measured(cell, loaded, reference, texts, place)
        record = cell | numbers | circumstances("python scripts/weights.py")
        append_line(RECORDS, record)
        Console().print(
            {name: record[name] for name in (*IDENTITY[:4], "bits_per_weight", "seconds", "kl_prose", "kl_code")}
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cells", default=",".join(GRID))
    parser.add_argument("--samples", type=int, default=4, help="held-out passages of each kind")
    parser.add_argument("--num-tokens", type=int, default=256, help="of a passage")
    parser.add_argument("--calibration", type=int, default=32, help=f"passages of {CALIBRATION_LENGTH} tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", type=Path, help="a folder for the quantized models, for `mikv eval`")
    parser.add_argument("--page", action="store_true")
    return parser.parse_args()


def cell_of(spec: str, arguments: argparse.Namespace) -> Record:
    """`gptq:3:64` as the beginning of a record."""
    method, bits, group = [*spec.split(":"), "0", "0"][:3]
    calibrated = method != "exact" and needs_hessian(method)
    return {
        "kind": "weights",
        "model": arguments.model,
        "method": method,
        "bits": int(bits) or None,
        "group_size": None if group in ("row", "0") else int(group),
        "calibration_tokens": arguments.calibration * CALIBRATION_LENGTH if calibrated else 0,
        "samples": arguments.samples,
        "num_tokens": arguments.num_tokens,
    }


def identity(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in IDENTITY)


def measured(cell: Record, loaded: LoadedModel, reference: Reference, texts: list[str], place: Path | None) -> Record:
    """Quantize a copy of the model, save it in `place`, if any, and compare it with the reference."""
    if cell["method"] == "exact":
        return {"bits_per_weight": 16.0, "seconds": 0.0, "output_error": 0.0} | reference.measure(loaded.model)
    start = time.perf_counter()
    model = copy.deepcopy(loaded.model)
    config = mikv.BCQConfig(bits=cell["bits"], group_size=cell["group_size"], method=cell["method"])
    calibration = texts if cell["calibration_tokens"] else None
    report = mikv.quantize(model, config, calibration=calibration, tokenizer=loaded.tokenizer)
    seconds = time.perf_counter() - start
    if place is not None:
        model.save_pretrained(place)
        loaded.tokenizer.save_pretrained(place)
    errors = [layer.output_error for layer in report.layers]
    return {
        "bits_per_weight": report.bits_per_weight,
        "seconds": seconds,
        "output_error": fmean(errors),
    } | reference.measure(model)


if __name__ == "__main__":
    main()
