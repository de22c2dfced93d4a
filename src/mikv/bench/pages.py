"""Tables of records, for the terminal and for docs/results alike, with the sentence that says what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Page:
    """A title, the circumstances, one sentence on how to read it, a table, and what was skipped and why."""

    title: str
    circumstances: str
    meaning: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    skipped: tuple[str, ...]
    command: str

    def to_markdown(self, picture: Path | None = None) -> str:
        """With the picture above the table, if there is one."""
        lines = [f"# {self.title}", "", f"{self.circumstances} {self.meaning}", "", f"    {self.command}", ""]
        if picture is not None:
            lines += [f"![{self.title}]({picture.name})", ""]
        lines += [_markdown_row(self.columns), _markdown_row(["---", *["---:"] * (len(self.columns) - 1)])]
        lines += [_markdown_row(row) for row in self.rows]
        if self.skipped:
            lines += ["", *(f"- skipped: {line}" for line in self.skipped)]
        return "\n".join([*lines, ""])


def page_of(records: Sequence[Record]) -> Page:
    """The page of the records of one bench."""
    pages = {"attention": attention_page, "generate": generate_page, "matmul": matmul_page}
    return pages[records[0]["bench"]](records)


def attention_page(records: Sequence[Record]) -> Page:
    """Kernels in the order in which they were measured."""
    first, shape = records[0], records[0]["shape"]
    measured = [record for record in records if record["skipped"] is None]
    columns: tuple[str, ...] = ("kernel", "ms", "MiB", "GB/s", "of stream", "ideal fp16", "error")
    upkeep = any("upkeep_share" in record for record in measured)
    return Page(
        title="Attention of one decode step",
        circumstances=(
            f"{shape['heads']} query heads on {shape['kv_heads']} KV heads of {shape['head_dim']}, "
            f"{shape['tokens']:,} tokens, batch {shape['batch']}; {_machine(first)}; "
            f"{_memory(first, 'step on one layer')}"
        ),
        meaning=(
            "Of stream: packed bytes per second as a share of what reading memory reaches in the same run; ideal fp16: "
            "how many times faster than a kernel that reads 16-bit keys and values at that speed; error: of the "
            "arithmetic, against float32 over the same stored numbers."
        ),
        columns=(*columns, "upkeep") if upkeep else columns,
        rows=tuple(
            (
                kernel_name(record),
                milliseconds(record["ms"]),
                f"{record['bytes'] / 2**20:.1f}",
                f"{record['gbps']:.2f}",
                f"{record['bandwidth_share']:.1%}",
                f"{record['ideal_fp16_speedup']:.2f}×",
                f"{record['rel_error']:.0e}",
                *([f"{record['upkeep_share']:+.1%}" if "upkeep_share" in record else ""] if upkeep else []),
            )
            for record in measured
        ),
        skipped=_skipped(records, kernel_name),
        command=first["command"],
    )


def generate_page(records: Sequence[Record]) -> Page:
    """Contexts from short to long, caches in the order in which they were asked for."""
    first = records[0]
    measured = [record for record in records if record["skipped"] is None]
    return Page(
        title=f"Decoding with {model_name(first)}",
        circumstances=(
            f"{first['dtype']}, {_machine(first)}; {first['new_tokens']} tokens after the prompt, "
            f"{_times(first['repeats'])}."
        ),
        meaning=(
            "Decode and prefill: tokens per second, first s: seconds up to the first new token; cache: all bytes that "
            "it holds at the end; peak growth: by how many MiB the process exceeded the loaded model at most, at any "
            "time and while decoding."
        ),
        columns=(
            "cache",
            "tokens",
            "decode",
            "of full",
            "prefill",
            "first s",
            "cache MiB",
            "peak growth",
            "peak in decode",
        ),
        rows=tuple(
            (
                record["cache"],
                f"{record['context']:,}",
                f"{record['decode_tokens_per_second']:.1f}",
                _of_full(record, measured),
                f"{record['prefill_tokens_per_second']:,.0f}",
                f"{record['time_to_first_token_s']:.2f}",
                _mebibytes(record["cache_bytes"]),
                _mebibytes(record["peak_rss_growth_bytes"]),
                _mebibytes(record["decode_peak_rss_growth_bytes"]),
            )
            for record in measured
        ),
        skipped=_skipped(records, lambda record: record["cache"]),
        command=first["command"],
    )


def matmul_page(records: Sequence[Record]) -> Page:
    """Numbers of rows in the order in which they were asked for, kernels in that in which they were measured."""
    first, shape = records[0], records[0]["shape"]
    measured = [record for record in records if record["skipped"] is None]
    return Page(
        title="Products with stored weights",
        circumstances=(
            f"{shape['m']:,} outputs of {shape['k']:,} inputs, groups of {shape['group_size']}; {_machine(first)}; "
            f"{_memory(first, 'visit of the same weights')} onnxruntime: {first['peer_options']['onnxruntime']}."
        ),
        meaning=(
            "Cold: weights that come from memory; warm: that were just read; × fp32: times as fast as PyTorch in "
            "float32 in the same turns, cold; of stream: bytes of weights per second when cold as a share of what "
            "reading memory reaches in the same run; error: of the arithmetic, against float64 over the same stored "
            "numbers; with format: against float64 over the weights as they were."
        ),
        columns=("kernel", "rows", "bits", "cold ms", "warm ms", "× fp32", "GB/s", "of stream", "error", "with format"),
        rows=tuple(
            (
                kernel_name(record),
                str(record["rows"]),
                f"{record['bits_per_weight']:.2f}",
                f"{record['ms_cold']:#.3g}",
                f"{record['ms_warm']:#.3g}",
                f"{record['speedup_cold']:#.3g}",
                f"{record['gbps']:.1f}",
                f"{record['bandwidth_share']:.0%}",
                f"{record['rel_error']:.0e}",
                f"{record['format_error']:.3f}",
            )
            for record in measured
        ),
        skipped=_skipped(records, kernel_name),
        command=first["command"],
    )


def kernel_name(record: Record) -> str:
    """`mikv 20% int8 + 80% int2`, `sdpa_fp32`; of products `mikv 3`, `llama.cpp_Q4_K`."""
    if record["bench"] == "matmul":
        several = record["kernel"].startswith(("mikv", "onnxruntime"))  # the others' names say how many bits
        return f"{record['kernel']} {record['bits']}" if several else str(record["kernel"])
    return f"mikv {record['config']}" if record["kernel"] == "mikv" else str(record["kernel"])


def milliseconds(ms: float) -> str:
    """With two decimals, but none from 100 on."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.2f}"


def model_name(record: Record) -> str:
    """The model without the folders that it lies in."""
    return str(record["model"]).rstrip("/").split("/")[-1]


def _machine(record: Record) -> str:
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    return f"{threads} on {record['hardware']}; kernels: {record['isa']}; torch {record['versions']['torch']}"


def _memory(record: Record, what: str) -> str:
    """How fast memory is, and how cold; `what` there is between two of."""
    return (
        f"memory read at {record['stream_gbps']:.1f} GB/s by {record['stream_method']}; from one {what} to the next "
        f"{record['cold_bytes'] / 2**20:,.0f} MiB are read, the last-level cache has "
        f"{record['last_level_cache_bytes'] / 2**20:,.0f}."
    )


def _times(count: int) -> str:
    return "measured once" if count == 1 else f"medians of {count} turns"


def _of_full(record: Record, records: Sequence[Record]) -> str:
    speeds = [
        r["decode_tokens_per_second"] for r in records if r["cache"] == "full" if r["context"] == record["context"]
    ]
    return f"{record['decode_tokens_per_second'] / speeds[0]:.2f}×" if speeds else "-"


def _mebibytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f}"


def _skipped(records: Sequence[Record], name: Any) -> tuple[str, ...]:
    """One line per reason; a cache that is skipped at every context is named once."""
    lines = [f"{name(record)}: {record['skipped']}" for record in records if record["skipped"] is not None]
    return tuple(dict.fromkeys(lines))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
