"""The linear layer that multiplies with binary-coded weights: x (..., K) -> (..., M). For inference only."""

from torch import Tensor

from mikv import ops
from mikv.weights.module import BCQModule


class BCQLinear(BCQModule):
    """Takes the place of `torch.nn.Linear`. Inputs are float32, bfloat16 or float16; the output is of their dtype."""

    _hf_quantized_needs_local_tp = True  # transformers hands over plain tensors when it splits the layer

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., M)."""
        buffers = (
            self._buffers
        )  # attributes of a module are looked up in Python: a microsecond each, 210 layers a token
        codes = buffers["codes"]
        if codes is None:
            codes = self.arrange()
        scales = buffers[self._scales]
        assert scales is not None
        return ops.lut_matmul(x, codes, scales, self._parameters["bias"], self.shape)
