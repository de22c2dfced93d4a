"""`mikv bench generate`: a model reads a prompt and goes on token by token, with one cache after another.

Every (context, cache) cell runs in a fresh process (see cell.py). With several repeats all cells run once before any
runs again, so that the machine's moods fall on all of them alike; numbers are medians over the repeats.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mikv.bench import llama_cpp
from mikv.bench.cell import WARM_UP_TOKENS, Cell
from mikv.cache.geometry import context_length, text_config
from mikv.cache_names import NamedCache, parse_cache
from mikv.errors import ConfigError, UnsupportedModelError
from mikv.models import dtype_name, find_model, readable_source, require_dtype

METRICS = (
    "decode_tokens_per_second",
    "prefill_tokens_per_second",
    "time_to_first_token_s",
    "cache_bytes",
    "peak_rss_growth_bytes",
    "decode_peak_rss_growth_bytes",
)


@dataclass(frozen=True)
class Plan:
    """What to measure. `dtype` None is the checkpoint's own; the names of caches are checked when they are used."""

    model: str
    contexts: tuple[int, ...]
    caches: tuple[str, ...]
    new_tokens: int = 32
    dtype: str | None = None
    threads: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        if self.new_tokens <= WARM_UP_TOKENS:
            raise ConfigError(
                f"--new-tokens {self.new_tokens} must be more than the {WARM_UP_TOKENS} that warm up and do not count"
            )
        if self.repeats < 1:
            raise ConfigError(f"--repeats {self.repeats} must be 1 or more")

    def named_caches(self) -> tuple[NamedCache, ...]:
        """The caches by name. Raises ConfigError for names that do not exist."""
        return tuple(self._named(name) for name in self.caches)

    def _named(self, name: str) -> NamedCache:
        if name.startswith(llama_cpp.PREFIX):
            return llama_cpp.parse(name, self.model)
        return parse_cache(name, also=llama_cpp.NAMES)

    def require_room(self, longest: int | None) -> None:
        """Raise ConfigError if a context and its new tokens are more than the `longest` the model was trained for."""
        for context in self.contexts:
            if longest is not None and context + self.new_tokens > longest:
                raise ConfigError(
                    f"--contexts {context} with {self.new_tokens} new tokens is more than the {longest:,} that "
                    f"{self.model} was trained for; use {longest - self.new_tokens} at most"
                )


def parse_contexts(contexts: str) -> tuple[int, ...]:
    """The numbers of a comma-separated list. Raises ConfigError for anything but whole numbers, 1 or more."""
    found = []
    for word in contexts.split(","):
        if not word.strip().isdecimal() or int(word) < 1:
            raise ConfigError(
                f"--contexts {contexts!r}: {word.strip()!r} is not a whole number of tokens; "
                "for example --contexts 64,4096,8000"
            )
        found.append(int(word))
    return tuple(sorted(set(found)))


def run(plan: Plan, on_cell: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Measure all cells. Returns what was measured and `rows`, one per context and cache, as JSON types.

    Rows of caches that cannot run have a reason in `skipped` and None for every number. Raises ConfigError for unknown
    caches and contexts that are too long, ModelNotFoundError, before anything is loaded.
    """
    caches = plan.named_caches()
    find_model(plan.model)
    config = _configuration(plan.model)
    plan.require_room(context_length(config))
    cells = [(context, cache) for context in plan.contexts for cache in caches]
    results: dict[tuple[int, str], list[dict[str, Any]]] = {(context, cache.name): [] for context, cache in cells}
    for repeat in range(plan.repeats):
        for context, cache in cells:
            found = results[context, cache.name]
            if found and found[-1].get("skipped"):
                continue
            on_cell(f"{cache.name}, {context:,} tokens" + (f", turn {repeat + 1}" if plan.repeats > 1 else ""))
            found.append(_measure(plan, context, cache))
    return {
        "model": plan.model,
        "dtype": dtype_name(config, plan.dtype),
        "new_tokens": plan.new_tokens,
        "repeats": plan.repeats,
        "rows": [_row(context, name, found) for (context, name), found in results.items()],
    }


def _configuration(model: str) -> Any:
    """The text part of a model's configuration; loads no weights."""
    from transformers import AutoConfig

    source = readable_source(model)
    try:
        return text_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot read the configuration of {model!r}: {error}") from error


def _measure(plan: Plan, context: int, cache: NamedCache) -> dict[str, Any]:
    """The numbers of one cell, or the reason why there are none."""
    if (reason := cache.unavailable()) is not None:
        return {"skipped": reason}
    cell = Cell(plan.model, cache.name, context, plan.new_tokens, plan.dtype, plan.threads)
    command = [sys.executable, "-m", "mikv.bench.cell", cell.to_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"skipped": _why_it_failed(done)}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _why_it_failed(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        hint = ", perhaps for want of memory" if done.returncode == -9 else ""
        return f"its process was ended by signal {-done.returncode}{hint}"
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return f"its process failed: {last[0] if last else f'exit code {done.returncode}'}"


def _row(context: int, name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a cell's repeats."""
    reasons = [result["skipped"] for result in found if result.get("skipped")]
    row: dict[str, Any] = {"cache": name, "context": context}
    for metric in METRICS:
        values = [] if reasons else [result[metric] for result in found if result[metric] is not None]
        row[metric] = median(values) if values else None
    speeds = [] if reasons else [result["decode_tokens_per_second"] for result in found]
    row["decode_range"] = [min(speeds), max(speeds)] if speeds else None
    return row | {"skipped": reasons[0] if reasons else None}
