"""Presses of NVIDIA's kvpress, by name, where its package allows the installed transformers.

A press evicts once, at the end of the prompt, through hooks on the model that see the hidden states. Here it keeps as
much of the prompt as leaves room for the tokens that follow, stored in 16 bits, as by the other baselines that evict.
Refused are presses that mask tokens without freeing them, and those that keep different numbers of tokens in different
layers: transformers makes one attention mask for all.

Releases up to 0.5.5 forbid the transformers that mikv needs, so no test runs kvpress itself; presses of 0.5.5 were run
by hand on transformers 5.23, which had to be made to pass them `cache_position`.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module, metadata
from inspect import isclass, signature
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicLayer

from mikv.errors import ConfigError, UnsupportedModelError
from mikv.formats import raw_format
from mikv.integrations.transformers.versions import as_argument

_SUFFIX = "Press"


def why_unavailable() -> str | None:
    """Why kvpress cannot be used here, or None."""
    try:
        version, required = metadata.version("kvpress"), metadata.requires("kvpress") or []
    except metadata.PackageNotFoundError:
        return (
            "needs kvpress in a release that allows the installed transformers "
            f"{transformers_version}; 0.5.5 and older ones want transformers<5.3"
        )
    for requirement in map(Requirement, required):
        if requirement.name == "transformers" and not requirement.specifier.contains(transformers_version):
            return f"kvpress {version} wants {requirement}; {transformers_version} is installed"
    return None


def kvpress(model: PreTrainedModel, press: str, share: float, num_tokens: int) -> "PressedCache":
    """An empty cache whose prompt will be evicted by `press` (SnapKV, Knorm, ...) to `share` of the fp16 bytes.

    `num_tokens` is the length at the end. Raises ConfigError for presses that do not exist or take no ratio.
    """
    return PressedCache(model, find_press(press), share, num_tokens)


def find_press(name: str) -> Callable[..., Any]:
    """The class NAMEPress of kvpress. Raises ConfigError naming those that there are."""
    package = import_module("kvpress")
    exported = {exported: getattr(package, exported) for exported in package.__all__}
    presses = {
        class_name.removesuffix(_SUFFIX): value
        for class_name, value in exported.items()
        if isclass(value) and "compression_ratio" in signature(value).parameters
    }
    for press_name, press in presses.items():
        if press_name.lower() == name.lower().removesuffix(_SUFFIX.lower()):
            return press
    raise ConfigError(f"kvpress has no press {name!r} that takes a ratio; it has {', '.join(sorted(presses))}")


class PressedLayer(DynamicLayer):
    """A layer that a press has thinned out: it holds fewer tokens than it has read."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.num_read = 0
        self.stored_dtype: torch.dtype | None = None  # of the prompt: the model's own

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append exactly; what the step attends to is in the model's dtype."""
        self.num_read += key_states.shape[2]
        if self.stored_dtype is None:
            return super().update(key_states, value_states)
        self.keys, self.values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        seen: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        self.store_as(self.stored_dtype)
        return seen

    def store_as(self, dtype: torch.dtype) -> None:
        """From now on hold tokens in `dtype`."""
        self.stored_dtype = dtype
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)

    def get_seq_length(self) -> int:
        """Tokens read: the position of the next one."""
        return self.num_read

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What is held comes directly before the queries, as in a sliding window."""
        held = self.keys.shape[2] if self.is_initialized else 0
        return held + query_length, self.num_read - held


class PressedCache(DynamicCache):
    """A cache whose first forward pass runs under a press; hooks on the model wait for it and are gone after it."""

    layers: list[Any]

    def __init__(self, model: PreTrainedModel, press: Callable[..., Any], share: float, num_tokens: int) -> None:
        super().__init__(config=model.config)
        self.layers = [PressedLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.press, self.share, self.num_tokens = press, share, num_tokens
        self._model = weakref.ref(model)  # a copy of the cache is not a copy of the model
        self._wait_for_prompt(model)

    def read_prompt(self, tokens: Tensor) -> None:
        """Read the prompt `tokens` (T,): presses need hidden states, which no recording has."""
        model = self._model()
        assert model is not None, "the model was deleted before its cache was used"
        model(tokens[None], **as_argument(self), logits_to_keep=1)

    def compression_ratio(self, num_prompt: int) -> float:
        """The share of the prompt that has to go for all to fit at the end. Raises ConfigError if nothing can stay."""
        kept = int(self.share * self.num_tokens) - (self.num_tokens - num_prompt)
        if kept < 1:
            raise ConfigError(
                f"a press evicts from the prompt only, and the {self.num_tokens - num_prompt} tokens after it take "
                f"more than {self.share:g} of the fp16 bytes of {self.num_tokens}; use a larger share"
            )
        return max(0.0, 1 - (kept + 0.5) / num_prompt)  # presses round down

    def finish(self, model: nn.Module) -> None:
        """Store what the press has kept. Raises UnsupportedModelError if that is not the same number in each layer."""
        if any(getattr(module, "masked_key_indices", None) is not None for module in model.modules()):
            raise UnsupportedModelError(
                f"{self.press.__name__} masks tokens and keeps their bytes; use a press that removes them"
            )
        layers = [layer for layer in self.layers if isinstance(layer, PressedLayer)]
        if len({layer.keys.shape[2] for layer in layers}) > 1:
            raise UnsupportedModelError(
                f"{self.press.__name__} keeps different numbers of tokens in different layers, for which transformers "
                "has no mask; use a press that keeps as many in each"
            )
        for layer in layers:
            layer.store_as(raw_format("fp16", layer.keys.dtype, layer.keys.shape[3]).dtype)

    def _wait_for_prompt(self, model: PreTrainedModel) -> None:
        own, press = weakref.ref(self), ExitStack()  # the hooks do not keep the cache alive

        def prompt_of(kwargs: dict[str, Any]) -> PressedCache | None:
            cache = own()
            return cache if cache is not None and any(value is cache for value in kwargs.values()) else None

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (cache := prompt_of(kwargs)) is not None:
                tokens = kwargs.get("input_ids", args[0] if args else None)
                assert tokens is not None, "pressed caches read token ids"
                ratio = cache.compression_ratio(tokens.shape[1])
                press.enter_context(cache.press(compression_ratio=ratio)(module))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if (cache := prompt_of(kwargs)) is not None:
                stop()
                cache.finish(module)

        handles = (
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        )

        def stop() -> None:
            press.close()
            for handle in handles:
                handle.remove()

        weakref.finalize(self, stop)
