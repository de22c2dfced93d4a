"""Bytes of a deployment, by part, on each of its devices; from them, how many devices it needs."""

from dataclasses import asdict, dataclass

from mikv.plan.deployment import FP32_BYTES, Deployment

_GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    weights      matrices of the layers, with scales, and norms and biases
    embeddings   of the tokens, and the output head
    kv_cache     of all sequences, at their full length
    activations  of the prompt tokens that are read at once, and logits
    reserved     libraries, communication buffers
    """

    weights: float
    embeddings: float
    kv_cache: float
    activations: float
    reserved: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(asdict(self).values())

    def of_all(self, devices: int) -> "Memory":
        """The same of so many devices together."""
        return Memory(**{part: size * devices for part, size in asdict(self).items()})


def memory(deployment: Deployment, devices: int) -> Memory:
    """What each of `devices` holds under tensor parallelism."""
    return Memory(
        weights=layer_bytes(deployment) / devices,
        embeddings=embedding_bytes(deployment) / devices,
        kv_cache=cache_bytes(deployment, devices),
        activations=_activation_bytes(deployment, devices),
        reserved=deployment.constants["reserved_gib"] * _GIB,
    )


def devices_needed(deployment: Deployment) -> int | None:
    """The fewest devices that have room, or None if no number of them has."""
    return next((n for n in deployment.degrees if memory(deployment, n).total <= usable_bytes(deployment)), None)


def usable_bytes(deployment: Deployment) -> float:
    """Of one device."""
    return deployment.constants["memory"] * deployment.hardware.memory_bytes


def matrix_bytes(deployment: Deployment) -> float:
    """Matrices of all layers."""
    return sum(number * deployment.weights.matrix_bytes(*size) for size, number in deployment.shape.all_matrices)


def layer_bytes(deployment: Deployment) -> float:
    """Matrices, norms and biases of all layers."""
    return matrix_bytes(deployment) + deployment.shape.small_parameters * deployment.dtype_bytes


def read_bytes(deployment: Deployment, rows: float) -> float:
    """What of `layer_bytes` a step of `rows` tokens reads: all, but for experts that none of them takes."""
    idle = (1 - deployment.shape.share_read(rows)) * matrix_bytes(deployment)
    return layer_bytes(deployment) - idle


def head_bytes(deployment: Deployment) -> float:
    """The output head, which every step reads whole."""
    shape = deployment.shape
    if deployment.weights.head_bits is not None:
        return shape.head_parameters * deployment.weights.head_bits / 8
    if deployment.quantize_embeddings:
        return deployment.weights.matrix_bytes(shape.vocab_size, shape.hidden_size)
    return shape.head_parameters * deployment.dtype_bytes


def embedding_bytes(deployment: Deployment) -> float:
    """The output head, and the embedding where it is another matrix; both are stored alike."""
    others = deployment.shape.other_embeddings * deployment.dtype_bytes
    return head_bytes(deployment) * (1 if deployment.shape.is_tied else 2) + others


def cache_bytes(deployment: Deployment, devices: int) -> float:
    """The KV cache of all sequences on one device."""
    geometry = deployment.shape.geometry(devices, deployment.dtype_bytes)
    return deployment.batch * deployment.cache.row_bytes(geometry, deployment.context)


def _activation_bytes(deployment: Deployment, devices: int) -> float:
    """Hidden states are on every device, what is divided among heads and channels only in part."""
    shape = deployment.shape
    tokens = min(deployment.batch * deployment.context, deployment.constants["prefill_tokens"])
    inner = max(1, shape.experts_per_token) * shape.intermediate_size
    divided = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim + 2 * inner
    logits = deployment.batch * shape.vocab_size / devices * FP32_BYTES
    return tokens * (3 * shape.hidden_size + divided / devices) * deployment.dtype_bytes + logits
