"""This machine as a device: memory as the system reports it, bandwidth and multiplications measured for a second."""

import os
from time import perf_counter

import torch

from mikv.bench.machine import hardware
from mikv.bench.streaming import MOST_BYTES, Stream
from mikv.plan.hardware import THIS, Hardware

_SIZE = 1024  # of the square matrices that are multiplied


def this_machine(seconds: float = 1.0) -> Hardware:
    """Measure for `seconds`, most of it reading memory, with as many threads as PyTorch takes. Power is not known."""
    bandwidth = 1e9 * _read(0.8 * seconds)
    flops = _multiply(0.2 * seconds)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    title = f"{hardware()}, {torch.get_num_threads()} threads"
    return Hardware(THIS, title, memory, bandwidth, flops, link=0, watts=None, most=1, is_cpu=True)


def _read(seconds: float) -> float:
    """GB/s, the best of all readings: other programs only ever take from it."""
    stream = Stream()
    size = stream.size_like(MOST_BYTES)
    readings, end = [stream.read(size)], perf_counter() + seconds
    while perf_counter() < end:
        readings.append(stream.read(size))
    return max(readings)


def _multiply(seconds: float) -> float:
    """Floating-point operations per second of float32 matrices."""
    x = torch.ones(_SIZE, _SIZE)
    torch.mm(x, x)
    times: list[float] = []
    end = perf_counter() + seconds
    while perf_counter() < end or not times:
        start = perf_counter()
        torch.mm(x, x)
        times.append(perf_counter() - start)
    return 2 * _SIZE**3 / min(times)
