"""How weights are stored, by name: fp16, int4, bcq3, or a number of bits that has scales and all in it."""

from dataclasses import dataclass

from mikv.choices import did_you_mean
from mikv.errors import ConfigError
from mikv.weights.weight import GROUP_STEP, MOST_BITS, num_groups, require_group_size

_FLOATS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8}
_UNIFORM = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
_MOST_DIGITS = 9
_NUMBER_BYTES = 2  # a scale or an offset
SPELLINGS = (*_FLOATS, *_UNIFORM, f"bcq1 to bcq{MOST_BITS}", "a number of bits per weight such as 3.375")


@dataclass(frozen=True)
class WeightFormat:
    """One way to store the matrices of a model.

    kernel      what multiplies with it: dense32, dense16, dense8, int4, int3 (they dequantize in the kernel), lut
    bits        per weight, without scales unless `numbers` is 0
    numbers     16-bit numbers per group: scales and offset
    group_size  columns that share them, None for whole rows
    head_bits   per weight of the embedding and the output head, where a file says how it stores them
    """

    name: str
    kernel: str
    bits: float
    numbers: int = 0
    group_size: int | None = None
    head_bits: float | None = None

    @property
    def is_lut(self) -> bool:
        """Whether lookup tables multiply."""
        return self.kernel == "lut"

    def matrix_bytes(self, rows: int, columns: int) -> float:
        """All that a (rows, columns) matrix takes, as BCQWeight.num_bytes counts it."""
        groups = num_groups(columns, require_group_size(columns, self.group_size, "--group-size"))
        return rows * (columns * self.bits / 8 + groups * self.numbers * _NUMBER_BYTES)


def parse_weights(name: str, group_size: int | None) -> WeightFormat:
    """The format of that name. Raises ConfigError naming what there is."""
    if name in _FLOATS:
        return WeightFormat(name, f"dense{_FLOATS[name]}", _FLOATS[name])
    if name == "int8":
        return WeightFormat(name, "dense8", 8, numbers=1)
    if name in _UNIFORM:
        return WeightFormat(name, "int4" if name == "int4" else "int3", _UNIFORM[name], 2, group_size)
    if name.startswith("bcq") and name[3:] in map(str, range(1, MOST_BITS + 1)):
        planes = int(name[3:])
        return WeightFormat(name, "lut", planes, planes + 1, group_size)
    try:
        bits = float(name)
    except ValueError:
        bits = 0.0
    if not 1 <= bits <= 2 * MOST_BITS:
        near = did_you_mean(name, SPELLINGS)
        raise ConfigError(f"--weights {name!r} is not one of {', '.join(SPELLINGS)}{near}")
    return WeightFormat(f"{bits:g} bits", "lut", bits)


def parse_group_size(text: str) -> int | None:
    """A whole number of columns, or `row`. Raises ConfigError."""
    if text == "row":
        return None
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise ConfigError(f"--group-size {text!r} is neither row nor a multiple of 32 such as 128")
    size = int(text)
    if size < GROUP_STEP or size % GROUP_STEP:
        raise ConfigError(f"--group-size={size} is not a multiple of {GROUP_STEP}; use 32, 64, 128 or `row`")
    return size


def float_format(dtype: str) -> WeightFormat:
    """The format of a checkpoint's own dtype, or ConfigError if it is none."""
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(dtype)
    if short is None:
        raise ConfigError(f"the model's dtype is {dtype!r}; give --weights, one of {', '.join(SPELLINGS)}")
    return parse_weights(short, None)
