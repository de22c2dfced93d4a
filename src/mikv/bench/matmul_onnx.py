"""onnxruntime's MatMulNBits as a peer of `mikv bench matmul`: one session per matrix, activations bound in place."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor

from mikv.bench.matmul_weight import Grid
from mikv.errors import ConfigError

OPTIONS = "inter_op_num_threads 1, CPUExecutionProvider, activations and results bound, spinning ends with each run"
_OPSET, _CONTRIB_OPSET = 21, 1
_SMALLEST_BLOCK = 16
_LUT_OUTPUTS = 128  # onnxruntime multiplies in another way, and says nothing, where these do not divide the outputs


@dataclass
class OnnxNBits:
    """Codes, a float32 scale and a zero of as many bits as the codes per group, in a graph of one node.

    `accuracy_level` 4 multiplies in 8 bits, 0 in float32; `lut` asks for tables in the place of its multiplications.
    """

    grid: Grid
    bits: int
    accuracy_level: int
    lut: bool
    model: bytes = field(repr=False)
    session: Any
    dtype = torch.float32

    @classmethod
    def build(cls, weights: Tensor, bits: int, group_size: int, accuracy_level: int, lut: bool) -> Self:
        """Raises ConfigError for groups and sizes that it does not take."""
        if group_size < _SMALLEST_BLOCK or group_size & (group_size - 1):
            raise ConfigError(f"takes groups of a power of two, {_SMALLEST_BLOCK} or more")
        if lut and len(weights) % _LUT_OUTPUTS:
            raise ConfigError(f"takes --m in multiples of {_LUT_OUTPUTS}")
        grid = Grid.of(weights, bits, group_size)
        model = _model(grid, bits, accuracy_level)
        return cls(grid, bits, accuracy_level, lut, model, _session(model, lut))

    @property
    def bytes(self) -> int:
        """Codes, scales and zeros as the file has them."""
        m, n, g = self.grid.codes.shape
        return m * n * g * self.bits // 8 + self.grid.scales.nbytes + m * -(-n * self.bits // 8)

    def product(self, activations: Tensor) -> Callable[[], Tensor]:
        """A run of the session with activations and result in memory of ours."""
        ort = import_module("onnxruntime")
        result = torch.empty(len(activations), self.grid.codes.shape[0])
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(activations.numpy()))
        values = result.numpy()
        for_numpy = {"name": "y", "device_type": "cpu", "device_id": 0, "element_type": values.dtype}
        binding.bind_output(**for_numpy, shape=values.shape, buffer_ptr=values.ctypes.data)

        def multiply() -> Tensor:
            self.session.run_with_iobinding(binding)
            return result

        return multiply

    def exact(self) -> Tensor:
        """As the operator's documentation has it."""
        return self.grid.exact()

    def copy(self) -> Self:
        """Another session, which has packed the weights once more."""
        again = _session(self.model, self.lut)
        return type(self)(self.grid, self.bits, self.accuracy_level, self.lut, self.model, again)


def _session(model: bytes, lut: bool) -> Any:
    """With as many threads as PyTorch has."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # threads that go on spinning for a while would take the cores from what is measured next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if lut:
        options.add_session_config_entry("mlas.use_lut_gemm", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _model(grid: Grid, bits: int, accuracy_level: int) -> bytes:
    """A graph of one node with the weights in it."""
    helper, constant = import_module("onnx.helper"), import_module("onnx.numpy_helper").from_array
    float32 = import_module("onnx").TensorProto.FLOAT
    (m, _, g), k = grid.codes.shape, grid.in_features
    parts = {"codes": _packed(grid.codes, bits), "scales": grid.scales, "zeros": _packed(grid.zeros, bits)}
    attributes = {"K": k, "N": m, "bits": bits, "block_size": g, "accuracy_level": accuracy_level}
    node = helper.make_node("MatMulNBits", ["x", *parts], ["y"], domain="com.microsoft", **attributes)
    inputs = [helper.make_tensor_value_info("x", float32, ["rows", k])]
    outputs = [helper.make_tensor_value_info("y", float32, ["rows", m])]
    constants = [constant(part.numpy(), name) for name, part in parts.items()]
    graph = helper.make_graph([node], "matmul", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", _CONTRIB_OPSET)]
    return bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Several codes to a byte along the last axis, the first in the lowest bits."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (padded << shifts).sum(-1, dtype=torch.uint8)
