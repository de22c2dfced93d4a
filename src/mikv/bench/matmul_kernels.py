"""What `mikv bench matmul` compares: mikv's weights, PyTorch's, onnxruntime's and llama.cpp's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mikv.bench import matmul_ggml
from mikv.bench.matmul_ggml import GgmlWeight
from mikv.bench.matmul_mikv import PATHS, MikvWeight, why_unavailable
from mikv.bench.matmul_onnx import OnnxNBits
from mikv.bench.matmul_torch import TorchInt4, TorchLinear
from mikv.bench.matmul_weight import StoredWeight
from mikv.cache_names import is_installed

BASELINE = "torch_fp32"  # what speed-ups are over
_ONNX_BITS = (2, 4)


@dataclass(frozen=True)
class MatmulKernel:
    """A line of the comparison. `build` takes weights float32 (M, K), or raises ConfigError."""

    kernel: str
    bits: int
    build: Callable[[Tensor], StoredWeight]
    unavailable: str | None = None


def matmul_kernels(bits: tuple[int, ...], group_size: int) -> tuple[MatmulKernel, ...]:
    """All lines, peers only in the numbers of bits that are asked for and that they have."""
    return (
        *_mikv(bits, group_size),
        MatmulKernel(BASELINE, 32, partial(TorchLinear.build, dtype=torch.float32)),
        MatmulKernel("torch_bf16", 16, partial(TorchLinear.build, dtype=torch.bfloat16)),
        *(MatmulKernel("torch_int4pack", 4, partial(TorchInt4.build, group_size=group_size)) for b in bits if b == 4),
        *_onnxruntime(bits, group_size),
        *_llama_cpp(bits),
    )


def _mikv(bits: tuple[int, ...], group_size: int) -> Iterator[MatmulKernel]:
    for b in bits:
        for name, path in PATHS.items():
            build = partial(MikvWeight.build, bits=b, group_size=group_size, path=path)
            yield MatmulKernel(name, b, build, why_unavailable(path))


def _onnxruntime(bits: tuple[int, ...], group_size: int) -> Iterator[MatmulKernel]:
    """Products in 8 bits, in float32, and with tables, which it has for 2 bits."""
    missing = _missing(("onnxruntime", "onnx"), "onnxruntime and onnx")
    ways = (("onnxruntime", 4, False), ("onnxruntime_lut", 4, True), ("onnxruntime_fp32", 0, False))
    for b in (b for b in bits if b in _ONNX_BITS):
        for name, level, lut in ways:
            if not lut or b == 2:
                build = partial(OnnxNBits.build, bits=b, group_size=group_size, accuracy_level=level, lut=lut)
                yield MatmulKernel(name, b, build, missing)


def _llama_cpp(bits: tuple[int, ...]) -> Iterator[MatmulKernel]:
    missing = _missing(("llama_cpp",), "llama-cpp-python")
    for name, (_, b) in matmul_ggml.TYPES.items():
        if b in bits:
            yield MatmulKernel(f"llama.cpp_{name}", b, partial(GgmlWeight.build, name=name), missing)


def _missing(modules: tuple[str, ...], packages: str) -> str | None:
    """Why peers that need these modules cannot run, or None."""
    return None if all(map(is_installed, modules)) else f"needs {packages}: pip install 'mikv[bench]'"
