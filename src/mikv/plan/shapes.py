"""The shape of a decoder: its matrices, what else it has, and the geometry of its cache. Knows no files and no bits.

M output rows and K inputs of a matrix, as everywhere.
"""

from dataclasses import dataclass

from mikv.cache.geometry import CacheGeometry, LayerGeometry


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder.

    small_parameters  all that is in no matrix: norms, biases, learned positions
    layers            what each layer caches
    dtype             of the checkpoint
    quantization      what its configuration says about quantized weights, or None
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

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(M, K) of the matrices of one layer: queries, keys, values, output, then the MLP's."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inward = ((self.intermediate_size, self.hidden_size),) * (2 if self.is_gated else 1)
        attention = ((queries, self.hidden_size), *((keys, self.hidden_size),) * 2, (self.hidden_size, queries))
        return (*attention, *inward, (self.hidden_size, self.intermediate_size))

    @property
    def matrix_parameters(self) -> int:
        """Weights in the matrices of all layers."""
        return self.num_layers * sum(rows * columns for rows, columns in self.matrices)

    @property
    def head_parameters(self) -> int:
        """Weights of the output head, which is the embedding itself where they are tied."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All of them."""
        embeddings = self.head_parameters * (1 if self.is_tied else 2)
        return self.matrix_parameters + embeddings + self.small_parameters

    def geometry(self, num_devices: int, dtype_bytes: int) -> CacheGeometry:
        """The cache of one of `num_devices`; where there are fewer KV heads than devices, they are replicated."""
        return CacheGeometry(self.layers, -(-self.num_kv_heads // num_devices), self.head_dim, dtype_bytes)
