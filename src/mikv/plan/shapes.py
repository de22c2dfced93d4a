"""The shape of a decoder: its matrices, what else it has, and the geometry of its cache. Knows no files and no bits.

M output rows and K inputs of a matrix, as everywhere.
"""

from dataclasses import dataclass, replace

from mikv.cache.geometry import CacheGeometry, LayerGeometry


@dataclass(frozen=True)
class Counted:
    """Matrices of a model whose layers differ: ((M, K), how many), and numbers of embeddings besides the tokens'."""

    matrices: tuple[tuple[tuple[int, int], int], ...]
    embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder, dense or with a mixture of experts in every layer.

    intermediate_size  of the MLP, or of one expert
    small_parameters  all that is in no matrix: norms, biases, learned positions, and the routers of experts
    layers            what each layer caches
    dtype             of the checkpoint
    quantization      what its configuration says about quantized weights, or None
    num_experts       of each layer, 0 if it is dense; a token takes `experts_per_token` of them
    left_out          parts of the model that are not counted: vision, audio
    counted           what was counted where layers differ; heads and dims are then those of the largest layer
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_gated: bool
    is_tied: bool
    small_parameters: int
    layers: tuple[LayerGeometry, ...]
    context_length: int | None = None
    dtype: str = "float16"
    quantization: dict[str, object] | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    left_out: str = ""
    counted: Counted | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(M, K) of the matrices of one layer: queries, keys, values, output, then the MLP's, or every expert's."""
        return (*self.attention_matrices, *self.mlp_matrices * max(1, self.num_experts))

    @property
    def attention_matrices(self) -> tuple[tuple[int, int], ...]:
        """(M, K) of queries, keys, values and output."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return ((queries, self.hidden_size), *((keys, self.hidden_size),) * 2, (self.hidden_size, queries))

    @property
    def mlp_matrices(self) -> tuple[tuple[int, int], ...]:
        """(M, K) of the MLP, or of one expert."""
        inward = ((self.intermediate_size, self.hidden_size),) * (2 if self.is_gated else 1)
        return (*inward, (self.hidden_size, self.intermediate_size))

    @property
    def matrix_parameters(self) -> int:
        """Weights in the matrices of all layers."""
        return sum(number * rows * columns for (rows, columns), number in self.all_matrices)

    @property
    def all_matrices(self) -> tuple[tuple[tuple[int, int], int], ...]:
        """(M, K) of the matrices of all layers, and how many there are of each."""
        return tuple((one, self.num_layers) for one in self.matrices) if self.counted is None else self.counted.matrices

    @property
    def active_parameters(self) -> int:
        """Those of them that one token is multiplied with."""
        if self.counted is not None:
            return self.matrix_parameters
        experts = self.experts_per_token if self.num_experts else 1
        return self.num_layers * (_numbers(self.attention_matrices) + experts * _numbers(self.mlp_matrices))

    def share_read(self, rows: float) -> float:
        """The share of the matrices' weights that `rows` tokens read, if each takes any experts with equal chance."""
        if not self.num_experts:
            return 1.0
        read = 1 - (1 - self.experts_per_token / self.num_experts) ** rows
        idle = (1 - read) * self.num_experts * _numbers(self.mlp_matrices)
        return 1 - idle / _numbers(self.matrices)

    @property
    def head_parameters(self) -> int:
        """Weights of the output head, which is the embedding itself where they are tied."""
        return self.vocab_size * self.hidden_size

    @property
    def other_embeddings(self) -> int:
        """Numbers in embeddings besides the tokens', of which a step reads a few rows."""
        return 0 if self.counted is None else self.counted.embeddings

    @property
    def num_parameters(self) -> int:
        """All of them."""
        embeddings = self.head_parameters * (1 if self.is_tied else 2) + self.other_embeddings
        return self.matrix_parameters + embeddings + self.small_parameters

    def geometry(self, num_devices: int, dtype_bytes: int) -> CacheGeometry:
        """The cache of one of `num_devices`; where there are fewer KV heads than devices, they are replicated."""
        layers = (replace(layer, num_kv_heads=-(-layer.num_kv_heads // num_devices)) for layer in self.layers)
        return CacheGeometry(tuple(layers), dtype_bytes)


def _numbers(matrices: tuple[tuple[int, int], ...]) -> int:
    return sum(rows * columns for rows, columns in matrices)
