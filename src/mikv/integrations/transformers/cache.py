"""`MiKVCache`: the two-tier cache as a transformers Cache. Only full-attention layers are compressed."""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicLayer, get_layer_types_and_kwargs

from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import FULL_ATTENTION, shared_layers, text_config
from mikv.errors import CacheStateError, ConfigError
from mikv.integrations.transformers import attention, compiled, loan, support
from mikv.integrations.transformers.layer import MiKVLayer
from mikv.integrations.transformers.memory import LayerMemory, MemoryReport
from mikv.integrations.transformers.step import MOST_REVOCABLE, Step

logger = logging.getLogger("mikv")


class MiKVCache(Cache):
    """A KV cache that keeps every token: important ones in high precision, all others in 2 to 4 bits.

    Use it as any transformers cache: `model.generate(**inputs, cache=MiKVCache(model.config))`; before transformers
    5.24 the argument is `past_key_values`. The model's attention is borrowed for the moment of each compressed layer's.
    Layers that are not full attention (sliding window, linear) keep transformers' own storage.

    A step counts in all layers or in none. If it was interrupted, the next one raises CacheStateError until `crop(0)`
    takes it back, or `reset`; if mikv itself raised, it is taken back already.

    Args:
        model_config: the model's transformers configuration, or the model
        config: what to keep in which precision, or the name of a preset; the default is the preset `balanced`
        offloading: keep layers in CPU memory while they are not in use (for models on a GPU)

    Raises UnsupportedModelError for models that cache no keys and values per head (multi-head latent attention) or have
    an encoder, ConfigError for layers in `skip_layers` and `layer_settings` that do not exist.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: MiKVConfig | str | None = None,
        *,
        offloading: bool = False,
    ) -> None:
        self.config = as_config(config)
        model_config = support.configuration(model_config)
        support.require_supported(model_config)
        self._model_config = text_config(model_config)
        loan.register(attention.mikv_attention, loan.own_name(self._model_config))
        self._kinds = _layer_types_and_kwargs(self._model_config)
        self.layer_types = [layer_type for layer_type, _ in self._kinds]
        self._shared, _ = shared_layers(self._model_config)
        self._require_layers(self.config.skip_layers)
        self._offloads = offloading
        super().__init__(layers=self._make_layers())
        self._adopt_layers()
        self._forget_step()
        if not self._compressed:
            logger.warning("%s; the cache stores them as transformers does", self.why_idle)

    @property
    def why_idle(self) -> str:
        """Why nothing is compressed, or nothing if something is."""
        if self._compressed:
            return ""
        found = ", ".join(f"{count} {kind}" for kind, count in Counter(self.layer_types).items())
        return (
            f"mikv compresses no layer of this model: of its {len(self.layers)} layers ({found}) none is "
            f"{FULL_ATTENTION} that no other layer reads and skip_layers does not name"
        )

    def _adopt_layers(self) -> None:
        own, caching = ref(self), (MiKVLayer, DynamicLayer)
        self._compressed = frozenset(i for i, layer in enumerate(self.layers) if isinstance(layer, MiKVLayer))
        self._caching = frozenset(i for i, layer in enumerate(self.layers) if isinstance(layer, caching))
        for index in self._compressed:
            self.layers[index].owner = own

    def _forget_step(self) -> None:
        self._step: Step | None = None  # under way, or interrupted
        self._changing: str | None = None  # the operation on all layers that is under way, or was interrupted

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._adopt_layers()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MiKVCache":
        memo[id(self._model_config)] = self._model_config  # a copy serves the same model
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__dict__, memo))
        return other

    def _make_layers(self) -> list[Any]:
        return [self._make_layer(i, layer_type, kwargs) for i, (layer_type, kwargs) in enumerate(self._kinds)]

    def _make_layer(self, layer_idx: int, layer_type: str, kwargs: dict[str, Any]) -> Any:
        if layer_type == FULL_ATTENTION and layer_idx not in {*self.config.skip_layers, *self._shared}:
            config = self.config.for_layer(layer_idx, len(self._kinds))
            return MiKVLayer(config, layer_idx, self._model_config)
        return DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs)

    def _require_layers(self, layer_indices: Sequence[int]) -> None:
        for layer_idx in layer_indices:
            if not 0 <= layer_idx < len(self.layer_types):
                raise ConfigError(
                    f"skip_layers names layer {layer_idx}; this model has layers 0 to {len(self.layer_types) - 1}"
                )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values (B, G, T, D) to a layer. Called by the model.

        Raises CacheStateError if the last step was interrupted, or if a layer's attention was not computed by `mikv`.
        """
        if torch.compiler.is_compiling() and not self._offloads:
            layer = self.layers[layer_idx]
            if not isinstance(layer, MiKVLayer):
                return layer.update(key_states, value_states, *args, **kwargs)
            own = loan.own_name(self._model_config)
            compiled.enter(layer.handle, self._model_config, loan.borrowed_name(own))
            return key_states, value_states
        return self._update(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable
    def _update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx >= len(self.layers):
            raise CacheStateError(
                f"the model has a layer {layer_idx}, but this cache was made for a model of {len(self.layers)} layers; "
                "make one for model.config"
            )
        self._require_whole(layer_idx)
        if self._step is None:
            self._step = Step(self.layers, self._caching)
        step, layer = self._step, self.layers[layer_idx]
        if self._offloads:
            layer.prefetch()
        try:
            if isinstance(layer, MiKVLayer):
                step.begun.add(layer_idx)
                return layer.update(key_states, value_states, *args, **kwargs)
            if layer_idx not in self._caching:
                return layer.update(key_states, value_states, *args, **kwargs)
            step.remember(layer_idx, layer)
            step.begun.add(layer_idx)
            states = layer.update(key_states, value_states, *args, **kwargs)
            self._made(layer_idx)
        except Exception:
            self.fail()
            raise
        return states

    def _require_whole(self, layer_idx: int | None = None) -> None:
        """Raise CacheStateError if a step or an operation was interrupted; `layer_idx` is a layer that begins its step.

        A step that all layers have made is brought to its end.
        """
        if self._changing:
            raise CacheStateError(f"{self._changing} was interrupted and has reached some layers only: cache.reset()")
        step = self._step
        if step is None:
            return
        if step.is_whole:
            self._commit()
            return
        pending = [i for i in self._compressed if self.layers[i].pending is not None]
        if layer_idx is not None and layer_idx not in step.begun and not pending:
            return
        if pending:
            what = f"layer {pending[0]} stored keys and values, but its attention was not computed by 'mikv'"
        else:
            missing = step.missing
            what = f"the last step was interrupted: {len(missing)} layers, the first is {missing[0]}, have not made it"
        can = "cache.crop(0) takes the step back, cache.reset() empties the cache"
        raise CacheStateError(f"{what}; {can if step.is_revocable or not step.length else 'call cache.reset()'}")

    def begin(self, layer_idx: int) -> None:
        """A compressed layer is about to compute a step; a compiled one begins with that."""
        step = self._step
        if step is None or layer_idx not in step.begun:
            self._require_whole(layer_idx)
            if self._step is None:
                self._step = Step(self.layers, self._compressed)
            self._step.begun.add(layer_idx)

    def end(self, layer_idx: int, num_queries: int) -> None:
        """A compressed layer has computed its step."""
        step = self._step
        assert step is not None
        if num_queries > MOST_REVOCABLE or self._offloads:
            step.is_revocable = False
            self.layers[layer_idx].tokens.commit()
        self._made(layer_idx)
        if self._offloads:
            self.layers[layer_idx].offload()

    def _made(self, layer_idx: int) -> None:
        step = self._step
        assert step is not None
        step.made.add(layer_idx)
        if step.is_whole:  # from here on the step counts, whatever interrupts
            self._commit()

    def _commit(self) -> None:
        for index in self._compressed:
            self.layers[index].tokens.commit()
        self._step = None

    def fail(self) -> None:
        """Take the step back that an error has ended, if that can be."""
        step = self._step
        if step is None or step.is_whole:
            return
        if not step.length:
            self.reset()
        elif step.is_revocable:
            step.take_back(self.layers)
            self._step = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that count in all layers, padding included: those of an interrupted step do not."""
        loan.heal(self._model_config)
        if self._step is not None and not self._step.is_whole:
            return self._step.length
        self._require_whole()
        return super().get_seq_length(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens from all layers or from none; 0 ends an interrupted step.

        Raises CacheStateError if a layer has demoted some of them, RuntimeError if a sliding window has dropped older
        ones that it would need again; `activate_past_recording` before the tokens come prevents both.
        """
        tokens_to_remove = int(tokens_to_remove)  # a tensor, up to transformers 5.17, would make the lengths tensors
        if self._step is not None and not self._step.is_whole:
            self.fail()
        if self._step is not None:
            self._require_whole()
        for index in self._compressed:
            self.layers[index].require_croppable(tokens_to_remove)
        # transformers' layers refuse before they change anything, and ours have been asked, so those go first
        layers = sorted(self.layers, key=lambda layer: isinstance(layer, MiKVLayer))
        if not tokens_to_remove:  # says to those that wait for it that nothing will be taken back
            layers = [layer for layer in layers if getattr(layer, "record_past", False)]
        self._on_all("crop", layers, lambda layer: layer.crop(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` become the rows, for beam search."""
        self._on_all("reorder_cache", self.layers, lambda layer: layer.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._on_all("batch_repeat_interleave", self.layers, lambda layer: layer.batch_repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` (or where a boolean `indices` is True)."""
        self._on_all("batch_select_indices", self.layers, lambda layer: layer.batch_select_indices(indices))

    def _on_all(self, name: str, layers: Sequence[Any], change: Callable[[Any], None]) -> None:
        """Change all layers. If that is interrupted, the cache refuses everything but `reset`."""
        self._require_whole()
        self._changing, done = name, 0
        try:
            for layer in layers:
                change(layer)
                done += 1
        except Exception:
            if not done:  # the first layer refuses what all would
                self._changing = None
            raise
        self._changing = None

    def reset(self) -> None:
        for index in self._compressed:
            self.layers[index].discard()
        self.layers: list[Any] = self._make_layers()  # a reset of transformers 5.16 leaves its own layers unusable
        self._adopt_layers()
        self._forget_step()

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
        """Write everything to one safetensors file, whole or not at all.

        Raises CheckpointError if it exists and `overwrite` is False, or cannot be written.
        """
        self._require_whole()
        from mikv.integrations.transformers.checkpoint import save_cache

        save_cache(self, path, overwrite=overwrite)

    @classmethod
    def load(cls, path: Any, model_config: PreTrainedConfig) -> "MiKVCache":
        """Read what `save` wrote, for the same model. Raises CheckpointError if it is damaged or of another model."""
        from mikv.integrations.transformers.checkpoint import load_cache

        return load_cache(path, model_config)


def as_config(config: MiKVConfig | str | None) -> MiKVConfig:
    """A configuration, the preset of that name, or the default. Raises ConfigError for anything else."""
    if isinstance(config, str):
        return MiKVConfig.preset(config)
    if config is None or isinstance(config, MiKVConfig):
        return config or MiKVConfig()
    raise ConfigError(f"config={config!r} must be a MiKVConfig or the name of a preset")


def _layer_types_and_kwargs(model_config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """Type and constructor arguments of every layer."""
    layer_types, kwargs = get_layer_types_and_kwargs(model_config)
    # transformers 5.16 returns one dictionary for all layers
    per_layer = [kwargs] * len(layer_types) if isinstance(kwargs, dict) else kwargs
    return list(zip(layer_types, per_layer, strict=False))  # early exit lowers num_hidden_layers, but not layer_types
