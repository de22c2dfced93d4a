"""The shape of a model's cache: KV heads and head dim of every layer. Reads configurations, imports no transformers.

What a layer caches is decided by its own configuration: transformers lets single layers override any field.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from mikv.errors import UnsupportedModelError

FULL_ATTENTION = "full_attention"
FP16_BYTES = 2
_STATES = ("linear_attention", "conv")  # of fixed size
_NO_KEYS = (*_STATES, "moe", "mlp", "dummy")
_SLIDING = ("sliding_attention", "hybrid_sliding", "reference_sliding_attention")
_CHUNKED = "chunked_attention"
_DOUBLED = ("mimo_v2_flash",)  # sliding layers have twice the KV heads: it stands in the model's code alone
_KNOWN = (FULL_ATTENTION, "hybrid", _CHUNKED, *_SLIDING, *_NO_KEYS)


@dataclass(frozen=True)
class LayerGeometry:
    """One layer: its type as transformers names it, and what it caches per token.

    window     its length if the layer keeps only one
    head_dim   channels of a key; `value_dim` of a value, None if they are as many
    shared     whether other layers read its keys and values
    """

    layer_type: str
    window: int | None
    num_kv_heads: int
    head_dim: int
    value_dim: int | None = None
    shared: bool = False

    @property
    def is_compressible(self) -> bool:
        """Whether mikv can take its tokens apart: all of them are there, and no other layer wants them plain."""
        return self.layer_type == FULL_ATTENTION and not self.shared

    def num_cached(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens have keys and values in the layer after a step."""
        if self.layer_type in _NO_KEYS:
            return 0
        return num_tokens if self.window is None else min(num_tokens, self.window - 1)

    def num_numbers(self, num_tokens: int) -> int:
        """Numbers in the keys and values that it holds of a row of `num_tokens`."""
        dims = self.head_dim + (self.head_dim if self.value_dim is None else self.value_dim)
        return self.num_cached(num_tokens) * self.num_kv_heads * dims


@dataclass(frozen=True)
class CacheGeometry:
    """What has to be known of a model to count the bytes of the keys and values that it caches.

    States of fixed size (linear attention, convolutions) are not counted: they do not grow, and mikv leaves them alone.
    """

    layers: tuple[LayerGeometry, ...]
    model_dtype_bytes: int

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """Read a transformers configuration (the text part of a multimodal one).

        Raises UnsupportedModelError for multi-head latent attention, which caches no keys and values per head, and for
        configurations that do not say how many heads of how many channels there are.
        """
        config = text_config(model_config)
        refuse_latent_attention(config)
        dtype = str(getattr(config, "dtype", None) or "float16")
        dtype_bytes = 4 if dtype.endswith("float32") else 2
        return cls(_layer_geometries(config), dtype_bytes)

    def fp16_bytes(self, num_tokens: int) -> int:
        """Bytes of the keys and values of one row in 16-bit floats."""
        return FP16_BYTES * sum(layer.num_numbers(num_tokens) for layer in self.layers)


def text_config(model_config: Any) -> Any:
    """The decoder's own configuration, also of a multimodal model."""
    get = getattr(model_config, "get_text_config", None)
    return model_config if get is None else get(decoder=True)


def context_length(model_config: Any) -> int | None:
    """Tokens that the model was trained for, if its configuration says."""
    return getattr(text_config(model_config), "max_position_embeddings", None)


def refuse_latent_attention(config: Any) -> None:
    """Raise UnsupportedModelError if the model caches latents instead of keys and values (DeepSeek's MLA)."""
    layers = getattr(config, "per_layer_config", None)
    configs = layers if isinstance(layers, Sequence) else [config]
    if rank := next((rank for one in configs if (rank := getattr(one, "kv_lora_rank", None))), None):
        raise UnsupportedModelError(
            f"{getattr(config, 'model_type', 'this model')} uses multi-head latent attention "
            f"(kv_lora_rank={rank}): it caches one compressed latent per token and no keys and values "
            "per head, so mikv has nothing to compress; use transformers' DynamicCache"
        )


def shared_layers(config: Any) -> tuple[frozenset[int], frozenset[int]]:
    """Layers whose keys and values others read again, and those others (Gemma 3n and 4): (sources, readers)."""
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        sources, readers = ({i for i, mode in enumerate(modes) if mode == which} for which in ("store", "reuse"))
        return frozenset(sources), frozenset(readers)
    num_readers = getattr(config, "num_kv_shared_layers", None) or 0  # transformers 5.16
    types = config.layer_types if num_readers else []
    own = types[: len(types) - num_readers]
    sources = {max(i for i, kind in enumerate(own) if kind == wanted) for wanted in set(own)}
    return frozenset(sources), frozenset(range(len(own), len(types)))


def _layer_geometries(config: Any) -> tuple[LayerGeometry, ...]:
    configs = _layer_configs(config)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        blocks = getattr(config, "layers_block_type", None) or [None] * len(configs)  # RecurrentGemma until 5.16
        layer_types = [
            _STATES[0] if block == "recurrent" else _inferred_type(layer)
            for block, layer in zip(blocks, configs, strict=True)
        ]
    sources, readers = shared_layers(config)
    found = []
    for i, (layer_type, layer) in enumerate(zip(layer_types, configs, strict=False)):  # as transformers' caches do
        if layer_type in _NO_KEYS or i in readers:
            is_state = layer_type in _STATES and i not in readers
            found.append(LayerGeometry(layer_type if is_state else "dummy", None, 0, 0))
            continue
        num_kv_heads, head_dim, value_dim = _heads(layer, layer_type)
        window = _window(layer, layer_type)
        found.append(LayerGeometry(layer_type, window, num_kv_heads, head_dim, value_dim, i in sources))
    return tuple(found)


def _layer_configs(config: Any) -> Sequence[Any]:
    """The configuration of every layer."""
    per_layer = getattr(config, "per_layer_config", None)
    return [config] * config.num_hidden_layers if per_layer is None else list(per_layer)


def _inferred_type(config: Any) -> str:
    if getattr(config, "sliding_window", None):
        return "sliding_attention"
    return _CHUNKED if getattr(config, "attention_chunk_size", None) else FULL_ATTENTION


def _window(config: Any, layer_type: str) -> int | None:
    if layer_type in _SLIDING:
        return getattr(config, "sliding_window", None)
    return getattr(config, "attention_chunk_size", None) if layer_type == _CHUNKED else None


def _heads(config: Any, layer_type: str) -> tuple[int, int, int | None]:
    """KV heads, channels of a key, and of a value if they are others."""
    if layer_type not in _KNOWN:
        raise UnsupportedModelError(
            f"what layers of type {layer_type!r} cache is not known, so the cache cannot be sized"
        )
    own = "swa_" if layer_type in _SLIDING else ""  # Inkling's sliding layers have fields of their own
    num_heads = _first(config, f"{own}num_attention_heads", "num_attention_heads")
    num_kv_heads = _first(config, f"{own}num_key_value_heads", "num_key_value_heads") or num_heads
    if hasattr(config, "new_decoder_architecture"):  # Falcon
        shares_all = config.multi_query and not config.new_decoder_architecture
        num_kv_heads = 1 if shares_all else config.num_kv_heads if config.new_decoder_architecture else num_heads
    if own and getattr(config, "model_type", None) in _DOUBLED:
        num_kv_heads *= 2
    head_dim = _first(config, f"{own}head_dim", "head_dim", "attention_head_dim", "dim_head")
    if head_dim is None and num_heads:
        head_dim = getattr(config, "hidden_size", 0) // num_heads
    if not num_kv_heads or not head_dim:
        raise UnsupportedModelError(
            f"{getattr(config, 'model_type', 'this model')} does not say how many heads of how many channels its "
            f"attention has (num_key_value_heads={num_kv_heads!r}, head_dim={head_dim!r}), so its cache cannot be sized"
        )
    value_dim = _first(config, "v_head_dim")
    return num_kv_heads, head_dim, None if value_dim == head_dim else value_dim


def _first(config: Any, *names: str) -> Any:
    """The first of these fields that says something."""
    return next((value for name in names if (value := getattr(config, name, None))), None)
