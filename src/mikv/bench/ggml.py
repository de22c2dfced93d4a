"""The few functions of ggml, llama.cpp's tensor library, that one matrix product takes, out of llama-cpp-python.

Weights lie in the buffer that llama.cpp itself would choose: where the processor has a kernel for rearranged weights,
they are rearranged. Pointers are plain integers; nothing here is freed before the process ends but what `Product` owns.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_POINTER, _SIZE, _LONG, _INT, _BOOL = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int, ctypes.c_bool
_FLOAT32 = 0  # its number in ggml
_SMALL_GRAPH = 1 << 20  # bytes for the descriptions of a graph of one product


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", _BOOL))


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", _LONG),
        ("block_size_interleave", _LONG),
        ("type_size", _SIZE),
        ("is_quantized", _BOOL),
        ("to_float", ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _LONG)),
        ("from_float_ref", _POINTER),
    )


_LOG = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)
_SILENT = _LOG(lambda level, text, data: None)
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # the result, then the arguments
    "ggml_log_set": (None, _LOG, _POINTER),
    "ggml_init": (_POINTER, _InitParams),
    "ggml_free": (None, _POINTER),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, _INT, _LONG, _LONG),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph": (_POINTER, _POINTER),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_row_size": (_SIZE, _INT, _LONG),
    "ggml_quantize_chunk": (_SIZE, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER),
    "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), _INT),
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_reg": (_POINTER,),
    "ggml_backend_cpu_buffer_type": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, _INT),
    "ggml_backend_reg_dev_get": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_backend_dev_supports_op": (_BOOL, _POINTER, _POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_buft_name": (ctypes.c_char_p, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_tensor_get": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_graph_compute": (_INT, _POINTER, _POINTER),
}


@cache
def library() -> Any:
    """ggml with the signatures of what is used here. Raises AttributeError if it has no such functions."""
    found = import_module("llama_cpp._ggml").libggml
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.ggml_log_set(_SILENT, None)  # it would name every matrix that it rearranges
    return found


@cache
def _backend() -> int:
    return int(library().ggml_backend_cpu_init())


def _buffer_types() -> list[int]:
    """In llama.cpp's order: those with kernels for rearranged weights, then plain memory."""
    ggml = library()
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(_device())
    found: list[int] = []
    while extra[len(found)]:
        found.append(int(extra[len(found)] or 0))
    return [*found, int(ggml.ggml_backend_cpu_buffer_type())]


@cache
def _device() -> int:
    return int(library().ggml_backend_reg_dev_get(library().ggml_backend_cpu_reg(), 0))


def quantize(weights: Tensor, kind: int) -> Tensor:
    """A float32 matrix (M, K) in ggml's format of that number: uint8 (M, bytes of a row)."""
    m, k = weights.shape
    codes = torch.empty(m, library().ggml_row_size(kind, k), dtype=torch.uint8)
    library().ggml_quantize_chunk(kind, weights.contiguous().data_ptr(), codes.data_ptr(), 0, m, k, None)
    return codes


def dequantize(codes: Tensor, kind: int, in_features: int) -> Tensor:
    """What `quantize` has returned as float32 (M, K)."""
    weights = torch.empty(len(codes), in_features)
    traits = library().ggml_get_type_traits(kind).contents
    traits.to_float(codes.data_ptr(), weights.data_ptr(), weights.numel())
    return weights


class Weights:
    """A quantized matrix (M, K) in memory of ggml's own; `buffer_type` names how it is arranged there."""

    def __init__(self, codes: Tensor, kind: int, in_features: int) -> None:
        self.shape = (len(codes), in_features)
        for place in _buffer_types():
            self._context = _context()
            self.tensor = library().ggml_new_tensor_2d(self._context, kind, in_features, len(codes))
            self._buffer = library().ggml_backend_alloc_ctx_tensors_from_buft(self._context, place)
            self.buffer_type = library().ggml_backend_buft_name(place).decode()
            if self._can_be_multiplied():
                break
            self._free()
        library().ggml_backend_tensor_set(self.tensor, codes.data_ptr(), 0, codes.nbytes)

    def product(self, activations: Tensor) -> Callable[[], Tensor]:
        """What multiplies activations float32 (rows, K), with as many threads as PyTorch has now: (rows, M)."""
        return Product(self, activations).run

    def __del__(self) -> None:
        self._free()

    def _can_be_multiplied(self) -> bool:
        """Whether there is a kernel for the weights where they are."""
        ggml, context = library(), _context()
        row = ggml.ggml_new_tensor_2d(context, _FLOAT32, self.shape[1], 1)
        product = ggml.ggml_mul_mat(context, self.tensor, row)
        possible = bool(ggml.ggml_backend_dev_supports_op(_device(), product))
        ggml.ggml_free(context)
        return possible

    def _free(self) -> None:
        library().ggml_backend_buffer_free(self._buffer)
        library().ggml_free(self._context)


class Product:
    """A graph that multiplies activations with weights."""

    def __init__(self, weights: Weights, activations: Tensor) -> None:
        ggml, self._weights, self._context = library(), weights, _context()
        (m, k), rows = weights.shape, len(activations)
        inputs = ggml.ggml_new_tensor_2d(self._context, _FLOAT32, k, rows)
        self._output = ggml.ggml_mul_mat(self._context, weights.tensor, inputs)
        place = ggml.ggml_backend_cpu_buffer_type()
        self._buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._context, place)
        ggml.ggml_backend_tensor_set(inputs, activations.contiguous().data_ptr(), 0, activations.nbytes)
        self._graph = ggml.ggml_new_graph(self._context)
        ggml.ggml_build_forward_expand(self._graph, self._output)
        ggml.ggml_backend_cpu_set_n_threads(_backend(), torch.get_num_threads())
        self._result = torch.empty(rows, m)

    def run(self) -> Tensor:
        """Compute, and copy the result out of ggml's memory: some KiB."""
        library().ggml_backend_graph_compute(_backend(), self._graph)
        library().ggml_backend_tensor_get(self._output, self._result.data_ptr(), 0, self._result.nbytes)
        return self._result

    def __del__(self) -> None:
        library().ggml_backend_buffer_free(self._buffer)
        library().ggml_free(self._context)


def _context() -> int:
    return int(library().ggml_init(_InitParams(_SMALL_GRAPH, None, True)))
