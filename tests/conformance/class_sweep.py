"""All model classes of transformers in turn, in two processes: `python tests/conformance/class_sweep.py --out FILE`.

The file is Markdown, or JSON lines if it ends in .jsonl. Names of classes after the options try only those.
"""

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the script, and for the processes that it starts

from conformance.class_trial import FAILURES, Outcome, try_class
from conformance.model_classes import model_classes

PROCESSES = 2


@contextmanager
def outcomes(names: Sequence[str]) -> Iterator[dict[str, Future[Outcome]]]:
    """What will become of each class. Importing takes as long as a class does, so a process tries many of them."""
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    with ProcessPoolExecutor(PROCESSES, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield {name: pool.submit(try_class, name) for name in names}
        finally:
            pool.shutdown(cancel_futures=True)


def summary(results: Sequence[Outcome]) -> str:
    """The counts, in one line."""
    kinds = Counter(outcome.kind for outcome in results)
    idle = sum(", 0 layers" in outcome.stages.get("exact", "") for outcome in results if outcome.kind == "equal")
    parts = [f"{kinds['equal']} equal (in {idle} of them no layer is compressed)"]
    parts += [f"{kinds[kind]} {kind}" for kind in ("refused", "not built", *FAILURES) if kinds[kind]]
    return f"{len(results)} model classes of transformers {transformers.__version__}: {', '.join(parts)}"


def page(results: Sequence[Outcome]) -> str:
    """A Markdown table of all classes, failures first."""
    order = (*FAILURES, "refused", "equal", "not built")
    rows = sorted(results, key=lambda outcome: (order.index(outcome.kind), outcome.name))
    lines = [summary(results), "", "| class | outcome | exact | int8 | attached, balanced |", "|---|---|---|---|---|"]
    for outcome in rows:
        cells = [outcome.stages.get(stage, "") for stage in ("exact", "rounded", "attached")]
        if outcome.kind == "not built":
            cells[0] = outcome.detail
        lines.append("| " + " | ".join(text.replace("|", "/") for text in (outcome.name, outcome.kind, *cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, help="where the table goes")
    options = parser.parse_args()
    known = model_classes()
    if unknown := [name for name in options.classes if name not in known]:
        parser.error(f"{unknown[0]} is none of the {len(known)} classes")
    results = []
    with outcomes(options.classes or list(known)) as futures:
        for future in futures.values():
            results.append(outcome := future.result())
            print(f"{outcome.kind:16} {outcome.name:45} {outcome.detail[:200]}", flush=True)
    print(summary(results))
    if options.out:
        is_records = options.out.suffix == ".jsonl"
        text = "".join(json.dumps(asdict(outcome)) + "\n" for outcome in results) if is_records else page(results)
        options.out.write_text(text, encoding="utf-8")
    sys.exit(any(outcome.failed for outcome in results))


if __name__ == "__main__":
    main()
