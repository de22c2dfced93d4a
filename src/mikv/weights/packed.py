"""Uniform codes packed into 32-bit words, as the files of GPTQ and AWQ have them. Knows no files and no models.

    w[m, k] = scales[n, m] (code[m, k] - zero[m, n])          group n = k // group_size

M outputs, K inputs, N groups. Numbers of b bits are one stream from the lowest bit of the first word on; of 3 bits, 32
take 3 words and two of them lie across words.

    GPTQ   qweight int32 (K b / 32, M)   along inputs         qzeros int32 (N, M b / 32)   along outputs
           version 1 ("gptq") stores zero - 1, version 2 ("gptq_v2") the zero; g_idx int32 (K,) is each input's group
    AWQ    qweight int32 (K, M / 8)      along outputs        qzeros int32 (N, M / 8)      along outputs
    (gemm) the 8 numbers of a word, from its lowest bits, are outputs 0 2 4 6 1 3 5 7 of the 8
    both   scales float16 (N, M)

Sources: AutoGPTQ and GPTQModel (`pack` of their linear layers), AutoAWQ (`WQLinear_GEMM`), vLLM's kernels for both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from mikv.errors import CheckpointError
from mikv.weights.imported import from_uniform
from mikv.weights.weight import BCQWeight, group_of_column, num_groups

_PLACE_OF_OUTPUT = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], dtype=torch.int64, device="cpu")  # in a word of AWQ
_AWQ_BITS = 4

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class UniformWeight:
    """Codes uint8 (M, K), scale not negative and zero, both (M, N), in groups of `group_size` columns."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int

    def coding(self) -> BCQWeight:
        """As sign planes: the same numbers, but for the rounding of scale and offset to float16."""
        return from_uniform(self.codes, self.scale, self.zero, self.bits, self.group_size)

    def dequantize(self) -> Tensor:
        """Float32 (M, K); exact for float16 scales."""
        columns = group_of_column(self.codes.shape[1], self.group_size)
        return self.scale.float()[:, columns] * (self.codes.float() - self.zero.float()[:, columns])


@dataclass(frozen=True)
class GPTQLayout:
    """`group_size` None is one group per row; `zero_shift` is what the file's zeros lack: 1 in version 1, else 0."""

    bits: int
    group_size: int | None
    zero_shift: int

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        """Of the tensors of a layer. Raises CheckpointError for sizes that whole words cannot hold."""
        whole = 32 // gcd(32, self.bits)
        _require_multiple("in_features", in_features, whole)
        _require_multiple("out_features", out_features, whole)
        groups = num_groups(in_features, self.group_size or in_features)
        return {
            "qweight": (in_features * self.bits // 32, out_features),
            "qzeros": (groups, out_features * self.bits // 32),
            "scales": (groups, out_features),
        }

    def codes(self, qweight: Tensor) -> Tensor:
        """Uint8 (M, K)."""
        return unpack_words(qweight.T.contiguous(), self.bits)

    def zeros(self, qzeros: Tensor) -> Tensor:
        """Int16 (M, N). Raises CheckpointError for zeros of version 1 that have wrapped around."""
        stored = unpack_words(qzeros, self.bits).short().T
        if self.zero_shift and int(stored.max()) == 2**self.bits - 1:
            raise CheckpointError(
                f"a zero-point is stored as {2**self.bits - 1}, which programs read differently (0 or {2**self.bits}); "
                "convert the model to checkpoint_format gptq_v2 with the program that made it"
            )
        return stored + self.zero_shift


@dataclass(frozen=True)
class AWQLayout:
    """AutoAWQ's "gemm"; `group_size` None is one group per row."""

    group_size: int | None
    bits: int = _AWQ_BITS

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        """Of the tensors of a layer. Raises CheckpointError for sizes that whole words cannot hold."""
        _require_multiple("out_features", out_features, len(_PLACE_OF_OUTPUT))
        groups, words = num_groups(in_features, self.group_size or in_features), out_features // len(_PLACE_OF_OUTPUT)
        return {"qweight": (in_features, words), "qzeros": (groups, words), "scales": (groups, out_features)}

    def codes(self, qweight: Tensor) -> Tensor:
        """Uint8 (M, K)."""
        return self._outputs(qweight)

    def zeros(self, qzeros: Tensor) -> Tensor:
        """Int16 (M, N)."""
        return self._outputs(qzeros).short()

    def _outputs(self, words: Tensor) -> Tensor:
        """The numbers of int32 (n, M / 8), uint8 (M, n)."""
        numbers = unpack_words(words, self.bits).unflatten(-1, (-1, len(_PLACE_OF_OUTPUT)))
        return numbers[..., _PLACE_OF_OUTPUT].flatten(-2).T.contiguous()


Layout = GPTQLayout | AWQLayout


def unpack(layout: Layout, parts: Mapping[str, Tensor]) -> UniformWeight:
    """The weights of `parts`, qweight, qzeros and scales of the layout's shapes.

    A negative scale, as AutoRound writes them, is turned round: s (u - z) = -s ((2**b - 1 - u) - (2**b - 1 - z)).
    """
    codes, zero = layout.codes(parts["qweight"]), layout.zeros(parts["qzeros"])
    scale, group_size = parts["scales"].T.contiguous(), layout.group_size or codes.shape[1]
    negative, largest = scale < 0, 2**layout.bits - 1
    flipped = negative[:, group_of_column(codes.shape[1], group_size)]
    return UniformWeight(
        torch.where(flipped, largest - codes, codes),
        scale.abs(),
        torch.where(negative, largest - zero, zero),
        layout.bits,
        group_size,
    )


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The numbers of `bits` bits, 1 to 8, in int32 (..., W) from the lowest bit on: uint8 (..., 32 W / bits)."""
    block = bits // gcd(32, bits)  # words after which a number begins with a word again
    blocks = (words.long() & 0xFFFFFFFF).unflatten(-1, (-1, block))
    numbers = torch.empty(*blocks.shape[:-1], 32 * block // bits, dtype=torch.uint8, device=words.device)
    for i in range(numbers.shape[-1]):
        word, shift = divmod(i * bits, 32)
        number = blocks[..., word] >> shift
        if shift + bits > 32:
            number = number | blocks[..., word + 1] << (32 - shift)
        numbers[..., i] = number & (2**bits - 1)
    return numbers.flatten(-2)


def _require_multiple(name: str, value: int, step: int) -> None:
    if value % step:
        raise CheckpointError(f"{name}={value} is not a multiple of {step}, the numbers that whole words hold")
