"""The shape of a model's cache: layers, KV heads, head dim. Reads transformers configurations without importing them."""

from dataclasses import dataclass
from typing import Any, Self

from mikv.errors import UnsupportedModelError

FULL_ATTENTION = "full_attention"


@dataclass(frozen=True)
class LayerGeometry:
    """One layer: its type as transformers names it, and its window if it only keeps one."""

    layer_type: str
    window: int | None


@dataclass(frozen=True)
class CacheGeometry:
    """What has to be known of a model to count the bytes of its cache."""

    layers: tuple[LayerGeometry, ...]
    num_kv_heads: int
    head_dim: int
    model_dtype_bytes: int

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """Read a transformers configuration (the text part of a multimodal one).

        Raises UnsupportedModelError for multi-head latent attention, which caches no keys and values per head.
        """
        config = text_config(model_config)
        refuse_latent_attention(config)
        num_heads = config.num_attention_heads
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        dtype = str(getattr(config, "dtype", None) or "float16")
        dtype_bytes = 4 if dtype.endswith("float32") else 2
        return cls(_layer_geometries(config), num_kv_heads, head_dim, dtype_bytes)


def text_config(model_config: Any) -> Any:
    """The decoder's own configuration, also of a multimodal model."""
    get = getattr(model_config, "get_text_config", None)
    return model_config if get is None else get(decoder=True)


def refuse_latent_attention(config: Any) -> None:
    """Raise UnsupportedModelError if the model caches latents instead of keys and values (DeepSeek's MLA)."""
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{getattr(config, 'model_type', 'this model')} uses multi-head latent attention "
            f"(kv_lora_rank={config.kv_lora_rank}): it caches one compressed latent per token and no keys and values "
            "per head, so mikv has nothing to compress; use transformers' DynamicCache"
        )


def _layer_geometries(config: Any) -> tuple[LayerGeometry, ...]:
    sliding = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        inferred = "sliding_attention" if sliding else "chunked_attention" if chunk else FULL_ATTENTION
        layer_types = [inferred] * config.num_hidden_layers
    windows = {"sliding_attention": sliding, "chunked_attention": chunk}
    return tuple(LayerGeometry(layer_type, windows.get(layer_type)) for layer_type in layer_types)
