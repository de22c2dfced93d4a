"""The table of all records: which columns, what each number means, how it is written, and by what it is sorted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mikv.lab.report.families import family_of, method_of
from mikv.records import Record

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One number or name of a record. `meaning` is one line; `write` turns the value into text."""

    key: str
    title: str
    meaning: str
    write: Callable[[Any], str] = str
    is_number: bool = True

    def text(self, record: Record) -> str:
        """What the cell says."""
        value = record.get(self.key)
        if value is None:
            return MISSING
        if self.key == "score" and record["score_stderr"] is not None:
            return f"{self.write(value)} ± {self.write(record['score_stderr'])}"
        return self.write(value)

    def sort_value(self, record: Record) -> str:
        """What the cell is sorted by; empty for what is missing or not a number, which always comes last."""
        value = record.get(self.key)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return ""
        return str(value).lower()


def percent(value: float) -> str:
    """`26.4 %`."""
    return f"{100 * value:.1f} %"


def divergence(value: float) -> str:
    """A KL divergence with two digits that count: `0.0020`, `1.3`, `8.1e-05`."""
    return f"{value:#.2g}" if value else "0"


COLUMNS = (
    Column("cache", "cache", "The cache's name, as --cache takes it.", is_number=False),
    Column("model", "model", "The model that reads and answers.", is_number=False),
    Column("task", "task", "The task and its options.", is_number=False),
    Column(
        "score",
        "score",
        "Mean over the samples of what the task counts as right, from 0 to 1, ± the standard error of that mean.",
        "{:.3f}".format,
    ),
    Column(
        "ratio",
        "of fp16",
        "Measured bytes of the cache, codes, scales and bookkeeping included, as a share of the same keys and values "
        "in 16-bit floats; the full cache of a float32 model is at 200 %.",
        percent,
    ),
    Column("bytes_per_token", "B/token", "The same bytes per cached token.", "{:,.0f}".format),
    Column(
        "kl_mean",
        "KL",
        "Kullback-Leibler divergence of the predictions from those with the full cache, in nats, mean over positions; "
        "0 is identical.",
        divergence,
    ),
    Column("kl_p99", "KL p99", "Its 99th percentile: how far off the worst positions are.", divergence),
    Column(
        "top1_agreement",
        "top-1",
        "Share of positions at which the likeliest token is the one that the full cache predicts.",
        percent,
    ),
    Column(
        "perplexity_delta",
        "Δ ppl",
        "Perplexity minus that of the full cache; only for tasks that read a text.",
        "{:+.3f}".format,
    ),
    Column(
        "decode_tokens_per_second",
        "tokens/s",
        "New tokens per second while answering; on a machine that does other things, too, a hint only.",
        "{:.1f}".format,
    ),
    Column("samples", "samples", "How many samples the means are over.", "{:,}".format),
)


def family_name(record: Record) -> str:
    """The family of the record's cache."""
    return family_of(record["cache"], record.get("config")).name


def method_name(record: Record) -> str:
    """The method of the record's cache."""
    return method_of(record["cache"], record.get("config")).name
