"""Seconds of a decode step and of a prefill: a roofline for the matrices, and what layers and links add.

    step = matrices + head + attention + communication + overhead

n rows (sequences), G devices, L layers, h hidden size. Matrices are read once, or multiply at the device's peak,
whichever takes longer; lookup tables go over the matrix once per row, so beyond `break_even_batch` rows it is faster to
dequantize and multiply. An all-reduce goes round a ring: 2 (G - 1) steps of n h / G numbers, twice in a layer.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from mikv.plan.deployment import FP16_BYTES, Deployment
from mikv.plan.memory import cache_bytes, head_bytes, read_bytes

_MICRO = 1e-6
_MOST_ROWS = 4096
_ALL_REDUCES = 2  # of a layer, after attention and after the MLP (Megatron-LM, arXiv 1909.08053)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a decode step by part. `is_compute` says whether the matrices wait for multiplication, not memory."""

    matrices: float
    head: float
    attention: float
    communication: float
    overhead: float
    is_compute: bool

    @property
    def seconds(self) -> dict[str, float]:
        """By part."""
        return {name: value for name, value in asdict(self).items() if name != "is_compute"}

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """What takes most of the step: bandwidth, compute, communication, or overhead of layers and launches."""
        memory, compute = self.head + self.attention, 0.0
        if self.is_compute:
            compute = self.matrices
        else:
            memory += self.matrices
        parts = {"bandwidth": memory, "compute": compute}
        parts |= {"communication": self.communication, "overhead": self.overhead}
        return max(parts, key=lambda name: parts[name])


def decode_time(deployment: Deployment, devices: int) -> StepTime:
    """One step of all sequences, each with a full context."""
    rows, shape = deployment.batch, deployment.shape
    matrices, is_compute = matrix_time(deployment, devices, rows)
    return StepTime(
        matrices=matrices,
        head=_head_time(deployment, devices, rows),
        attention=_attention_time(deployment, devices),
        communication=_communication_time(deployment, devices, rows),
        overhead=shape.num_layers * _layer_seconds(deployment),
        is_compute=is_compute,
    )


def prefill_time(deployment: Deployment, devices: int) -> float:
    """Reading all prompts: every chunk reads the weights, in 16 bits if they have to be dequantized."""
    shape, constants, device = deployment.shape, deployment.constants, deployment.hardware
    tokens = deployment.batch * deployment.context
    chunks = -(-tokens // int(constants["prefill_tokens"]))
    attended = sum(_attended(layer.num_cached, deployment.context) for layer in shape.layers)
    attention = 4 * deployment.batch * shape.num_heads * shape.head_dim * attended
    multiplying = 2 * tokens * shape.active_parameters / (devices * _matrix_rate(deployment))
    multiplying += attention / (devices * device.flops * constants["matmul"])
    reading = chunks * _read_for_multiplying(deployment, devices, tokens / chunks)
    overhead = chunks * shape.num_layers * constants["layer_us"] * _MICRO
    return max(multiplying, reading) + overhead + _communication_time(deployment, devices, tokens)


def matrix_time(deployment: Deployment, devices: int, rows: int) -> tuple[float, bool]:
    """The faster way to multiply `rows` rows with all matrices, and whether it waits for multiplication."""
    dense = _multiplied_time(deployment, devices, rows)
    if not deployment.weights.is_lut:
        return dense
    return min(dense, (lut_time(deployment, devices, rows), False))


def break_even_batch(deployment: Deployment, devices: int) -> int | None:
    """The fewest rows for which dequantizing and multiplying beats tables; None without tables, or if it never does."""
    if not deployment.weights.is_lut:
        return None
    for rows in range(1, _MOST_ROWS):
        if _multiplied_time(deployment, devices, rows)[0] < lut_time(deployment, devices, rows):
            return rows
    return None


def lut_time(deployment: Deployment, devices: int, rows: int) -> float:
    """All matrices through lookup tables."""
    constants = deployment.constants
    first = _read_time(deployment, read_bytes(deployment, 1) / devices, deployment.weights.kernel)
    first += deployment.shape.num_layers * constants["lut_layer_us"] * _MICRO
    return first * (1 + (rows - 1) * constants["lut_row"])


def _multiplied_time(deployment: Deployment, devices: int, rows: int) -> tuple[float, bool]:
    """Reading or multiplying, whichever takes longer; a copy that is written and read again comes on top."""
    shape = deployment.shape
    reading = _read_for_multiplying(deployment, devices, rows)
    multiplying = 2 * rows * shape.active_parameters / (devices * _matrix_rate(deployment))
    if deployment.weights.is_lut and deployment.hardware.is_cpu:
        return reading + multiplying, multiplying > reading  # tile by tile: first one, then the other
    return max(reading, multiplying), multiplying > reading


def _matrix_rate(deployment: Deployment) -> float:
    """Operations per second of a device with many rows."""
    return deployment.hardware.flops * deployment.constants["lut_matmul" if deployment.weights.is_lut else "matmul"]


def _read_for_multiplying(deployment: Deployment, devices: int, rows: float) -> float:
    """Reading the matrices that `rows` tokens need once; binary codes become 16-bit numbers on the way."""
    reading = _read_time(deployment, read_bytes(deployment, rows) / devices, deployment.weights.kernel)
    if not deployment.weights.is_lut:
        return reading
    shape = deployment.shape
    copies = deployment.constants["dequantized_passes"] * FP16_BYTES * shape.matrix_parameters * shape.share_read(rows)
    return reading + _read_time(deployment, copies / devices, "dense16")


def _head_time(deployment: Deployment, devices: int, rows: int) -> float:
    shape, device = deployment.shape, deployment.hardware
    dense = "dense32" if deployment.dtype_bytes > FP16_BYTES else "dense16"
    is_coded = deployment.quantize_embeddings or deployment.weights.head_bits is not None
    kernel = deployment.weights.kernel if is_coded else dense
    multiplying = 2 * rows * shape.head_parameters / (devices * device.flops * deployment.constants["matmul"])
    return max(_read_time(deployment, head_bytes(deployment) / devices, kernel), multiplying)


def _attention_time(deployment: Deployment, devices: int) -> float:
    """Reading the cache, and copying it where it grows by copying."""
    size, packed = cache_bytes(deployment, devices), deployment.cache.is_packed
    reading = _read_time(deployment, size, "packed_attention" if packed else "attention")
    if packed:
        return reading
    return reading + deployment.constants["append_passes"] * size / deployment.hardware.bandwidth


def _communication_time(deployment: Deployment, devices: int, rows: int) -> float:
    if devices == 1:
        return 0.0
    numbers = rows * deployment.shape.hidden_size / devices
    step = deployment.constants["hop_us"] * _MICRO + numbers * FP16_BYTES / deployment.hardware.link
    return _ALL_REDUCES * deployment.shape.num_layers * 2 * (devices - 1) * step


def _layer_seconds(deployment: Deployment) -> float:
    constants = deployment.constants
    packed = constants["packed_layer_us"] if deployment.cache.is_packed else 0.0
    return (constants["layer_us"] + packed) * _MICRO


def _read_time(deployment: Deployment, size: float, kernel: str) -> float:
    return size / (deployment.hardware.bandwidth * deployment.constants[kernel])


def _attended(num_cached: Callable[[int], int], context: int) -> float:
    """Pairs of a token and one before it in a layer."""
    kept = num_cached(context)
    return kept * context - kept**2 / 2
