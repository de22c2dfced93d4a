"""Run the conformance suite of tests/conformance on mikv's caches, on transformers' own and on its optional backends.

    python scripts/conformance_table.py              all caches; optimum-quanto and hqq are listed where installed
    python scripts/conformance_table.py --report     only the page

Writes one record per check and cache to docs/results/conformance.jsonl, and docs/results/conformance.md from them.
"""

import argparse
import json
import logging
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conformance.subjects import EXACT, SHORT, packed  # noqa: E402
from conformance.suite import CHECKS  # noqa: E402
from conformance.trial import Subject, Trial  # noqa: E402
from mikv.errors import MiKVError  # noqa: E402
from tiny import FAMILIES, tiny_model  # noqa: E402

RECORDS, PAGE = (ROOT / "docs" / "results" / f"conformance.{suffix}" for suffix in ("jsonl", "md"))
COMMAND = "python scripts/conformance_table.py"
LONGEST = 192  # tokens of the longest text in the suite, for the cache that has to know
RESIDUAL = 16  # so that the backends quantize within the suite's short texts, as mikv's caches there do
PACKAGES = ("mikv", "transformers", "torch", "optimum-quanto", "hqq")
# Refusals with a message, instead of a wrong result or a crash half way.
REFUSALS = (ValueError, NotImplementedError, MiKVError)


def subjects() -> list[tuple[Subject, str | None]]:
    """Every cache of the table, and what is missing to run it here."""

    def exact(name: str, make: Callable[[PreTrainedModel], Cache], missing: str | None = None) -> Any:
        return Subject(name, make, exact=True), missing

    def quantized(backend: str, missing: str | None = None, **options: int) -> Any:
        name = f"QuantizedCache ({backend})"
        return Subject(name, lambda model: QuantizedCache(backend, model.config, **options), exact=False), missing

    cuda = None if torch.cuda.is_available() else "needs CUDA"
    quanto, hqq = (None if _is_installed(module) else "not installed" for module in ("optimum.quanto", "hqq"))
    # the axes are those that transformers recommends for each backend
    return [
        (EXACT, None),
        (packed("balanced"), None),
        exact("DynamicCache", lambda model: DynamicCache(config=model.config)),
        exact("DynamicCache (offloading)", lambda model: DynamicCache(config=model.config, offloading=True), cuda),
        exact("StaticCache", lambda model: StaticCache(config=model.config, max_cache_len=LONGEST)),
        quantized("quanto", quanto, nbits=4, residual_length=RESIDUAL, axis_key=0, axis_value=0),
        quantized("hqq", hqq, nbits=4, residual_length=RESIDUAL, axis_key=1, axis_value=1),
        quantized("fp8"),
    ]


def rows() -> list[tuple[str, str, str]]:
    """(title, check, family): every check on Llama, and padded batches on the other families."""
    others = [family for family in FAMILIES if family != "llama"]
    return [(_title(check), check, "llama") for check in CHECKS] + [
        (f"{family}: left-padded batch", "left_padding", family) for family in others
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        torch.set_num_threads(1)  # tiny matrices are faster on one thread
        for name in ("mikv", "transformers", "torch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        measure()
    PAGE.write_text(page([json.loads(line) for line in RECORDS.read_text("utf-8").splitlines()]), "utf-8")


def measure() -> None:
    versions = {package: _version(package) for package in PACKAGES}
    common = {"versions": versions, "hardware": platform.machine(), "command": COMMAND}
    work = [(row, subject, missing) for row in rows() for subject, missing in subjects()]
    records = []
    for (title, check, family), subject, missing in track(work, "checks"):
        record = {"row": title, "check": check, "family": family, "cache": subject.name}
        records.append(record | outcome(check, family, subject, missing) | common)
    RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def outcome(check: str, family: str, subject: Subject, missing: str | None) -> dict[str, Any]:
    """`result` is pass, refused, fail or what is `missing`; `reason` says why, in one line."""
    if missing is not None:
        return {"result": missing, "reason": None, "seconds": 0.0}
    start, result, reason = time.perf_counter(), "pass", None
    try:
        with torch.no_grad():
            CHECKS[check](Trial(tiny_model(family), subject))
    except Exception as error:
        result = "refused" if isinstance(error, REFUSALS) else "fail"
        reason = _in_one_line(error)
    return {"result": result, "reason": reason, "seconds": round(time.perf_counter() - start, 3)}


def page(records: list[dict[str, Any]]) -> str:
    """Checks down, caches across; the reasons of everything that is not a pass as footnotes."""
    caches = list(dict.fromkeys(record["cache"] for record in records))
    by_row: dict[str, dict[str, Any]] = {}
    for record in records:
        by_row.setdefault(record["row"], {})[record["cache"]] = record
    notes: dict[str, str] = {}
    lines = [f"| | {' | '.join(caches)} |", "|---" * (len(caches) + 1) + "|"]
    for row, cells in by_row.items():
        lines.append(f"| {row} | {' | '.join(_cell(cells[cache], notes) for cache in caches)} |")
    totals = [sum(cells[cache]["result"] == "pass" for cells in by_row.values()) for cache in caches]
    lines.append(f"| **passed of {len(by_row)}** | {' | '.join(f'**{total}**' if total else '' for total in totals)} |")
    reasons = [f"{number}. {reason}" for number, reason in enumerate(notes.values(), start=1)]
    return "\n".join([_introduction(records[0]), *lines, "", *reasons, ""])


def _introduction(record: dict[str, Any]) -> str:
    installed = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    settings = ", ".join(f"{name}={value}" for name, value in SHORT.items())
    return f"""# Conformance

What transformers does with a cache, and which caches let it. Generated by `{record["command"]}` from conformance.jsonl.
The checks are those of tests/conformance, on random models of two layers in float32; {installed}; {record["hardware"]},
on the CPU.

* **pass**, for a cache that keeps keys and values as they are: the tokens are those of a DynamicCache under the model's
  own attention. A cache that rounds passes if it runs, gives the same twice, has every token, stays near the full
  cache, and if a row of a padded, reordered or repeated batch gives what it gives alone, fed one token at a time: any
  difference must be below half of what the cache's own rounding does.
* **refused**: a message instead of a wrong result.
* **FAIL**: a wrong result or a crash.

MiKVCache (balanced) has tiers for short texts here ({settings}); quanto and hqq are at 4 bits with
residual_length={RESIDUAL} for the same reason. A cache is saved with its own method where it has one, else with pickle.
Contrastive search, DoLa, group and constrained beam search are not in the table: transformers 5 moved them to
`custom_generate` repositories. A footnote gives the numbers of the first of its cells.
"""


def _cell(record: dict[str, Any], notes: dict[str, str]) -> str:
    """The result; `notes` collects reasons, those that differ in numbers only as one."""
    if record["reason"] is None:
        return str(record["result"])
    kind = re.sub(r"[\d.]+", "#", record["reason"])
    notes.setdefault(kind, record["reason"])
    result = "FAIL" if record["result"] == "fail" else record["result"]
    return f"{result} <sup>{list(notes).index(kind) + 1}</sup>"


def _title(check: str) -> str:
    return (CHECKS[check].__doc__ or check).splitlines()[0]


def _in_one_line(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
