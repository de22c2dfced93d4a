"""`MiKVCache`: the two-tier cache as a transformers Cache. Only full-attention layers are compressed."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import FULL_ATTENTION, refuse_latent_attention, shared_layers, text_config
from mikv.cache.layer import TwoTierLayer
from mikv.cache.warm_up import ExactAttention
from mikv.errors import CacheStateError, ConfigError, UnsupportedModelError
from mikv.integrations.transformers import attention, compiled
from mikv.integrations.transformers.memory import LayerMemory, MemoryReport
from mikv.ops import AttentionOptions

logger = logging.getLogger("mikv")


class MiKVLayer(CacheLayerMixin):
    """One compressed layer: the contract of transformers' cache layers on top of `TwoTierLayer`."""

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, config: MiKVConfig, layer_idx: int, after_attend: Callable[[int], None]) -> None:
        super().__init__()
        self.tokens = TwoTierLayer(config, layer_idx)
        self.layer_idx = layer_idx
        self.pending: tuple[Tensor, Tensor] | None = None
        self.handle = compiled.register(self)
        self._after_attend = after_attend

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = compiled.register(self)  # a copy is a layer of its own

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace: true of the full cache only, tiers remember the scores that queries gave."""
        return self.tokens.config.keeps_everything_exact

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if key_states.shape != value_states.shape:
            raise UnsupportedModelError(
                f"layer {self.layer_idx} has keys of shape {tuple(key_states.shape)} and values of shape "
                f"{tuple(value_states.shape)}; mikv needs the same head dim for both"
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values (B, G, Tq, D); what is returned only leads the attention function here."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.device != key_states.device:  # loaded from a file, which is on the CPU
            self.device = key_states.device
            self.tokens.to(self.device)
        self.pending = (key_states, value_states)
        return attention.carrier(key_states, self), value_states[:, :, :0]

    def attend(
        self,
        queries: Tensor,
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        """Attend to everything stored and to the pending keys and values, and store those."""
        if self.pending is None:
            raise CacheStateError(f"layer {self.layer_idx} was asked for attention twice for one update of its cache")
        new, self.pending = self.pending, None
        return self.step(queries, new, mask, options, exact)

    def step(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        """Attend to everything stored and to new keys and values, and store those."""
        if not self.is_initialized:  # a compiled step has not been through `update`
            self.lazy_initialization(*new)
        output = self.tokens.attend(queries, *new, mask, options, exact)
        self._after_attend(self.layer_idx)
        return output

    def get_seq_length(self) -> int:
        return self.tokens.columns.num_columns

    def get_max_length(self) -> int:
        return -1

    # the name of `get_max_length` before transformers 5.17
    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def activate_past_recording(self) -> None:
        """Assisted decoding is about to take tokens back: demote only when it says, by `crop`, which ones it keeps."""
        self.tokens.hold_demotion()

    @property
    def record_past(self) -> bool:
        """Whether demotion waits for `crop`."""
        return self.tokens.holds_demotion

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.tokens.holds_demotion = value

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Raise CacheStateError if `crop` would."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove")
        self.tokens.require_croppable(-tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. Raises CacheStateError if some were demoted already."""
        self.require_croppable(tokens_to_remove)
        self.tokens.crop(-tokens_to_remove)

    def reset(self) -> None:
        self.tokens.reset()
        self.pending = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.tokens.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` (or where a boolean `indices` is True)."""
        rows = torch.arange(len(self.tokens.columns.num_tokens), dtype=torch.int64, device="cpu")
        self.tokens.select_rows(rows[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        rows = torch.arange(len(self.tokens.columns.num_tokens), dtype=torch.int64, device="cpu")
        self.tokens.select_rows(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        self.tokens.to("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.tokens.to(self.device)


class MiKVCache(Cache):
    """A KV cache that keeps every token: important ones in high precision, all others in 2 to 4 bits.

    Use it as any transformers cache: `model.generate(**inputs, past_key_values=MiKVCache(model.config))`. The model's
    attention is switched to `mikv` if it is something else, with a logged line. Layers that are not full attention
    (sliding window, linear) keep transformers' own storage.

    Args:
        model_config: the model's transformers configuration
        config: what to keep in which precision; the default is the preset `balanced`
        offloading: keep layers in CPU memory while they are not in use (for models on a GPU)

    Raises UnsupportedModelError for models that cache no keys and values per head (multi-head latent attention),
    ConfigError for layers in `skip_layers` and `layer_settings` that do not exist.
    """

    def __init__(
        self, model_config: PreTrainedConfig, config: MiKVConfig | None = None, *, offloading: bool = False
    ) -> None:
        self.config = config or MiKVConfig()
        self._model_config = text_config(model_config)
        refuse_latent_attention(self._model_config)
        attention.register()
        self._kinds = _layer_types_and_kwargs(self._model_config)
        self.layer_types = [layer_type for layer_type, _ in self._kinds]
        self._shared, _ = shared_layers(self._model_config)
        self._require_layers(self.config.skip_layers)
        layers = self._make_layers()
        super().__init__(layers=layers)
        self._offloads = offloading
        self._waiting: MiKVLayer | None = None  # the layer whose attention comes next
        self._use_mikv_attention()
        if not any(isinstance(layer, MiKVLayer) for layer in layers):
            logger.warning("no layer of this model has full attention, so MiKVCache compresses nothing; see memory()")

    def _make_layers(self) -> list[Any]:
        return [self._make_layer(i, layer_type, kwargs) for i, (layer_type, kwargs) in enumerate(self._kinds)]

    def _make_layer(self, layer_idx: int, layer_type: str, kwargs: dict[str, Any]) -> Any:
        if layer_type == FULL_ATTENTION and layer_idx not in {*self.config.skip_layers, *self._shared}:
            config = self.config.for_layer(layer_idx, len(self._kinds))
            return MiKVLayer(config, layer_idx, self._after_attend)
        return DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs)

    def _require_layers(self, layer_indices: Sequence[int]) -> None:
        for layer_idx in layer_indices:
            if not 0 <= layer_idx < len(self.layer_types):
                raise ConfigError(
                    f"skip_layers names layer {layer_idx}; this model has layers 0 to {len(self.layer_types) - 1}"
                )

    def _use_mikv_attention(self) -> None:
        current = self._model_config._attn_implementation
        if current != attention.NAME:
            logger.warning("switching the model's attention from %r to 'mikv', which MiKVCache needs", current)
            # the text configuration is the object that the model's attention layers read at every step
            self._model_config._attn_implementation = attention.NAME

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values (B, G, Tq, D) to a layer. Called by the model.

        Raises CacheStateError if the model does not compute its attention with the function `mikv`.
        """
        layer = self.layers[layer_idx]
        if torch.compiler.is_compiling() and not self._offloads:
            if not isinstance(layer, MiKVLayer):
                return layer.update(key_states, value_states, *args, **kwargs)
            if self._model_config._attn_implementation == attention.NAME:
                compiled.enter(layer.handle)
                return key_states, value_states
        return self._update(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable
    def _update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        waiting = self._waiting
        if waiting is not None and waiting.pending is not None:
            raise CacheStateError(
                f"layer {waiting.layer_idx} stored keys and values but its attention was not computed by 'mikv' (in "
                f"use: {self._model_config._attn_implementation!r}); load the model with attn_implementation='mikv' "
                "and call cache.reset() before using this cache again"
            )
        layer = self.layers[layer_idx]
        self._waiting = layer if isinstance(layer, MiKVLayer) else None
        if self._offloads:
            layer.prefetch()
        return layer.update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens from all layers or from none.

        Raises CacheStateError if a layer has demoted some of them, RuntimeError if a sliding window has dropped older
        ones that it would need again; `activate_past_recording` before the tokens come prevents both.
        """
        for layer in self.layers:
            if isinstance(layer, MiKVLayer):
                layer.require_croppable(tokens_to_remove)
        # transformers' layers refuse before they change anything, and ours have been asked, so those go first
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, MiKVLayer)):
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        self._waiting = None
        self.layers = self._make_layers()  # a reset of transformers 5.16 leaves its own layers unusable

    def _after_attend(self, layer_idx: int) -> None:
        if self._offloads:
            self.layers[layer_idx].offload()

    def memory(self) -> MemoryReport:
        """What the cache holds and takes, per layer and in total; every allocated byte counts."""
        return MemoryReport(tuple(self._layer_memory(i) for i in range(len(self.layers))))

    def _layer_memory(self, layer_idx: int) -> LayerMemory:
        layer, layer_type = self.layers[layer_idx], self.layer_types[layer_idx]
        if isinstance(layer, MiKVLayer):
            return LayerMemory.of_tiers(layer_idx, layer.tokens)
        if layer_idx in self.config.skip_layers:
            reason = "named in skip_layers"
        elif layer_idx in self._shared:
            reason = "other layers read its keys and values too"
        else:
            reason = f"{layer_type}: only full_attention is compressed"
        return LayerMemory.of_other(layer_idx, reason, layer)

    def save(self, path: Any, *, overwrite: bool = False) -> None:
        """Write everything to one safetensors file. Raises CheckpointError if it exists and `overwrite` is False."""
        from mikv.integrations.transformers.checkpoint import save_cache

        save_cache(self, path, overwrite=overwrite)

    @classmethod
    def load(cls, path: Any, model_config: PreTrainedConfig) -> "MiKVCache":
        """Read what `save` wrote, for the same model. Raises CheckpointError if the file is not such a cache."""
        from mikv.integrations.transformers.checkpoint import load_cache

        return load_cache(path, model_config)


def _layer_types_and_kwargs(model_config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """Type and constructor arguments of every layer."""
    layer_types, kwargs = get_layer_types_and_kwargs(model_config)
    # transformers 5.16 returns one dictionary for all layers
    per_layer = [kwargs] * len(layer_types) if isinstance(kwargs, dict) else kwargs
    return list(zip(layer_types, per_layer, strict=False))  # early exit lowers num_hidden_layers, but not layer_types
