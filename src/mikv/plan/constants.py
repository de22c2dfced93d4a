"""What formulas cannot know: how much of a device's speed programs reach, and what a layer costs besides its bytes.

One set for GPUs and one for CPUs; none is chosen per model or per row. Each has its source and can be overridden.
Shares are of the device's bandwidth or peak.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mikv.choices import require_one_of
from mikv.errors import ConfigError

_TABLE_1 = "LUT-GEMM (arXiv 2206.09557) table 1, first MLP layer of OPT-175B on A100-80"
_TABLES = "fitted once to the 33 rows of LUT-GEMM tables 3 and 4 together"
_FLEET = "vllm-sr-sim's power model, anchored to ML.ENERGY v3: Llama-70B on H100, 300 W at batch 1, 600 W at 128"
_BENCH = "docs/results/bench_generate.md"
_MATMUL = "docs/results/bench_matmul_1.md, 4096 x 4096, cold"


@dataclass(frozen=True)
class Constant:
    """A number with its unit, and where it comes from."""

    value: float
    unit: str
    source: str


class Constants:
    """Constants by name: `constants["lut"]` is the number."""

    def __init__(self, values: Mapping[str, Constant]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> float:
        return self._values[name].value

    def items(self) -> list[tuple[str, Constant]]:
        """In the order in which they are listed here."""
        return list(self._values.items())

    def overridden(self, text: str | None) -> "Constants":
        """With the values of `name=value,...` in their place. Raises ConfigError naming what there is."""
        changed = dict(self._values)
        for part in filter(None, (text or "").split(",")):
            name, _, value = part.partition("=")
            name = name.strip()
            require_one_of("--efficiency", name, changed)
            changed[name] = Constant(_number(name, value, changed[name].unit), changed[name].unit, "--efficiency")
        return Constants(changed)


def _number(name: str, text: str, unit: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    least, most = {"share": (1e-6, 1.0), "tokens": (1.0, 1e12)}.get(unit, (0.0, 1e12))
    if not least <= value <= most:
        limits = {"share": "more than 0 and at most 1", "tokens": "1 or more"}.get(unit, "0 or more")
        raise ConfigError(f"--efficiency {name}={text!r} must be a number, {limits} ({unit})")
    return value


GPU = Constants(
    {
        "dense32": Constant(0.82, "share", f"as dense16: {_TABLE_1}"),
        "dense16": Constant(0.82, "share", f"{_TABLE_1}: cuBLAS 1.208 GB in 0.7256 ms"),
        "dense8": Constant(0.82, "share", "as dense16; assumed"),
        "int4": Constant(0.49, "share", f"{_TABLE_1}: AWQ's kernel, 0.3238 ms; newer ones reach more"),
        "int3": Constant(0.32, "share", f"{_TABLE_1}: OPTQ's kernel, 0.3599 ms; newer ones reach more"),
        "lut": Constant(0.82, "share", f"as cuBLAS, which {_TABLES} gives too (0.81); the paper's kernels"),
        "lut_layer_us": Constant(55, "us per layer", f"{_TABLES}: building tables and adding up partial sums"),
        "lut_row": Constant(1.0, "of the first row", "the paper's kernel is a GEMV: every further row reads all again"),
        "dequantized_passes": Constant(
            2, "passes", "16-bit copies are written and read: the paper's code, then cuBLAS"
        ),
        "layer_us": Constant(100, "us per layer", f"{_TABLES}: norms, attention, launches in FasterTransformer"),
        "packed_layer_us": Constant(0, "us per layer", "mikv's cache has no GPU kernels yet"),
        "hop_us": Constant(1.4, "us", f"{_TABLES}: one of the 2 (G - 1) steps of a ring all-reduce"),
        "attention": Constant(0.82, "share", "as dense16; assumed"),
        "packed_attention": Constant(0.62, "share", "docs/results/bench_attention.md on a CPU; no GPU kernels yet"),
        "append_passes": Constant(0, "passes", "servers write new keys in place"),
        "matmul": Constant(0.5, "share", "Megatron-LM (arXiv 2104.04473): 44 to 52 % of peak on A100"),
        "lut_matmul": Constant(0.5, "of peak", "as matmul: from 16-bit copies"),
        "memory": Constant(0.9, "share", "vLLM's gpu_memory_utilization"),
        "reserved_gib": Constant(3.5, "GiB per GPU", "vllm-sr-sim: CUDA context, graphs and communication buffers"),
        "prefill_tokens": Constant(2048, "tokens", "read at once, as servers that chunk prefills do"),
        "power_low": Constant(0.43, "share", _FLEET),
        "power_high": Constant(0.86, "share", _FLEET),
        "lut_power": Constant(1.31, "of dense", "LUT-GEMM table 2: 0.27 of the energy in 1/4.85 of the time"),
    }
)
CPU = Constants(
    {
        "dense32": Constant(1.0, "share", f"{_MATMUL}: torch fp32, 109 % of the stream probe"),
        "dense16": Constant(0.61, "share", f"{_MATMUL}: torch bf16"),
        "dense8": Constant(0.6, "share", "as dense16; assumed"),
        "int4": Constant(0.58, "share", f"{_MATMUL}: torch int4pack with bf16"),
        "int3": Constant(0.58, "share", "as int4; assumed"),
        "lut": Constant(0.84, "share", f"{_MATMUL}: 81, 84 and 87 % with 2, 3 and 4 bits"),
        "lut_layer_us": Constant(0, "us per layer", "tables are built in the shadow of reading memory; assumed"),
        "lut_row": Constant(0.28, "of the first row", f"{_MATMUL}: 4 rows take 1.7 to 2.0 times as long as one"),
        "dequantized_passes": Constant(0, "passes", "tiles are dequantized into the processor's cache"),
        "layer_us": Constant(1330, "us per layer", f"{_BENCH}: full, 64 tokens, 17.1 tokens/s: transformers' overhead"),
        "packed_layer_us": Constant(380, "us per layer", f"{_BENCH}: mikv:balanced at 64 tokens, against full"),
        "hop_us": Constant(0, "us", "one machine"),
        "attention": Constant(0.3, "share", "docs/results/bench_attention.md: torch's SDPA in fp32"),
        "packed_attention": Constant(0.62, "share", "docs/results/bench_attention.md: mikv's kernel, balanced"),
        "append_passes": Constant(
            3, "passes", "transformers' DynamicCache copies itself to grow: read, allocate, write"
        ),
        "matmul": Constant(0.8, "share", "of what the probe multiplies per second; assumed"),
        "lut_matmul": Constant(2.3, "of peak", f"{_MATMUL}, 128 rows: bytes against torch fp32"),
        "memory": Constant(0.9, "share", "as on GPUs"),
        "reserved_gib": Constant(0.4, "GiB", "Python with PyTorch and transformers"),
        "prefill_tokens": Constant(1e9, "tokens", "transformers reads a prompt at once"),
        "power_low": Constant(0.43, "share", f"as on GPUs: {_FLEET}"),
        "power_high": Constant(0.86, "share", f"as on GPUs: {_FLEET}"),
        "lut_power": Constant(1.0, "of dense", "not known"),
    }
)
