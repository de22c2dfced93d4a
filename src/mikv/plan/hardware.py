"""Devices by name: memory, bandwidth, peak, links and power, as their makers state them.

Peaks are of dense 16-bit multiplication with 32-bit sums; links are one direction of what one device has to its peers.
"""

from dataclasses import dataclass

from mikv.choices import did_you_mean
from mikv.errors import ConfigError
from mikv.plan.constants import CPU, GPU, Constants

THIS = "this"
_GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """A device. `watts` is its thermal design power, None if it is not known; `most` how many can be joined."""

    name: str
    title: str
    memory_bytes: float
    bandwidth: float
    flops: float
    link: float
    watts: float | None
    most: int = 1024
    is_cpu: bool = False

    @property
    def constants(self) -> Constants:
        """The set for its kind."""
        return CPU if self.is_cpu else GPU


def _gpu(name: str, title: str, memory: int, gbps: float, teraflops: float, link: float, watts: int) -> Hardware:
    """`memory` in GiB, `link` in GB/s of one direction."""
    return Hardware(name, title, memory * _GIB, gbps * 1e9, teraflops * 1e12, link * 1e9, watts)


# data sheets of NVIDIA and AMD
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40", "A100 SXM 40 GB", 40, 1555, 312, 300, 400),
        _gpu("a100-80", "A100 SXM 80 GB", 80, 2039, 312, 300, 400),
        _gpu("h100", "H100 SXM 80 GB", 80, 3350, 989, 450, 700),
        _gpu("h200", "H200 SXM 141 GB", 141, 4800, 989, 450, 700),
        _gpu("b200", "B200 180 GB", 180, 7700, 2250, 900, 1000),
        _gpu("mi300x", "MI300X 192 GB", 192, 5300, 1307, 448, 750),
        _gpu("v100", "V100 SXM 32 GB", 32, 900, 125, 150, 300),
        _gpu("t4", "T4 16 GB", 16, 320, 65, 16, 70),
        _gpu("a10", "A10 24 GB", 24, 600, 125, 32, 150),
        _gpu("l4", "L4 24 GB", 24, 300, 121, 32, 72),
        _gpu("l40s", "L40S 48 GB", 48, 864, 362, 32, 350),
        _gpu("rtx3090", "GeForce RTX 3090 24 GB", 24, 936, 71, 32, 350),
        _gpu("rtx4090", "GeForce RTX 4090 24 GB", 24, 1008, 165, 32, 450),
    )
}


def named_hardware(name: str) -> Hardware:
    """A GPU of the table. Raises ConfigError naming them all."""
    if (gpu := GPUS.get(name.lower())) is not None:
        return gpu
    near = did_you_mean(name, GPUS)
    raise ConfigError(f"--hardware {name!r} is not known{near or ';'} it is one of {', '.join(GPUS)}, {THIS}")
