"""What is asked of the planner: a model on some devices, with weights and cache in some formats, and its load."""

from dataclasses import dataclass

from mikv.cache.settings import MOST
from mikv.errors import ConfigError
from mikv.plan.cache_formats import CacheFormat
from mikv.plan.constants import Constants
from mikv.plan.hardware import Hardware
from mikv.plan.shapes import ModelShape
from mikv.plan.weight_formats import WeightFormat

FP16_BYTES, FP32_BYTES = 2, 4


@dataclass(frozen=True)
class Deployment:
    """`batch` sequences of `context` tokens each.

    quantize_embeddings  the token embedding and the output head are stored as the layers' matrices are
    """

    shape: ModelShape
    hardware: Hardware
    weights: WeightFormat
    cache: CacheFormat
    constants: Constants
    batch: int = 1
    context: int = 2048
    quantize_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in (("--batch", self.batch), ("--context", self.context)):
            if not 1 <= value <= MOST:
                raise ConfigError(f"{name} {value} must be 1 or more, and at most {MOST:,}")
        most = self.shape.context_length
        if most is not None and self.context > most:
            raise ConfigError(f"--context {self.context} is more than the {most:,} that {self.shape.name} was made for")
        self.weights.matrix_bytes(*self.shape.matrices[0])  # refuses group sizes that cannot be stored

    @property
    def dtype_bytes(self) -> int:
        """Of activations and whatever is not quantized: 16 bits, but 32 on a CPU whose checkpoint has them."""
        if self.weights.name == "fp32":
            return FP32_BYTES
        return FP32_BYTES if self.hardware.is_cpu and self.shape.dtype == "float32" else FP16_BYTES

    @property
    def degrees(self) -> tuple[int, ...]:
        """Numbers of devices that the heads can be divided among: powers of two."""
        powers = (2**i for i in range(self.hardware.most.bit_length()))
        return tuple(n for n in powers if self.shape.num_heads % n == 0)

    def require_degree(self, gpus: int) -> None:
        """Raise ConfigError if the model cannot be divided among so many devices."""
        if self.hardware.is_cpu and gpus != 1:
            raise ConfigError(f"--gpus {gpus}: --hardware this is one machine; leave --gpus out")
        if gpus not in self.degrees:
            raise ConfigError(
                f"--gpus {gpus} cannot divide the {self.shape.num_heads} heads of {self.shape.name}; "
                f"use one of {', '.join(map(str, self.degrees))}"
            )
