"""The one place that changes a model's attention implementation, and gives it back.

A model looks its attention function up in its configuration after it has handed new keys to the cache. So a cache
borrows the configuration for just that moment: from `update`, which lends it the name `mikv:OWN`, to the attention
function of that name, which the model then calls. OWN is what the model had, so that whoever finds such a name knows
what to do: the attention function gives it back and computes what is not ours with OWN, the mask function is OWN's.
"""

import sys
from functools import partial
from threading import Lock
from typing import Any
from weakref import ref

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mikv.errors import UnsupportedModelError

NAME = "mikv"
_PREFIX = f"{NAME}:"
_OWN_OF_OURS = "sdpa"  # what a model computes with that was itself loaded with attn_implementation="mikv"


def borrowed_name(own: str) -> str:
    """What a configuration is told while it is borrowed."""
    return f"{_PREFIX}{own}"


def register(attention_function: Any, own: str) -> str:
    """Make the names `mikv` and `mikv:OWN` known to transformers. Idempotent. Returns the second."""
    borrowed = borrowed_name(own)
    if borrowed not in _REGISTERED:
        if own not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise UnsupportedModelError(
                f"attn_implementation={own!r} makes its own masks, which mikv cannot read; load the model with 'sdpa', "
                "'eager' or 'flash_attention_2'"
            )
        AttentionInterface.register(NAME, attention_function)
        AttentionInterface.register(borrowed, partial(attention_function, own=own))
        # without a mask function of the same name transformers passes no mask at all, and padding would be attended to
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[_OWN_OF_OURS])
        AttentionMaskInterface.register(borrowed, ALL_MASK_ATTENTION_FUNCTIONS[own])
        _REGISTERED.add(borrowed)
    return borrowed


def own_name(config: PreTrainedConfig) -> str:
    """The attention implementation that a model has, or had when its configuration was borrowed."""
    current = config._attn_implementation or "eager"
    return _OWN_OF_OURS if current == NAME else current.removeprefix(_PREFIX)


def own_function(own: str, module: torch.nn.Module) -> Any:
    """The function that `module` computes its attention with under the implementation `own`."""
    # transformers' modules fall back to a function of this name in their file, and may override the others there
    modeling = sys.modules[type(module).__module__]
    interface = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    found = getattr(modeling, "eager_attention_forward", None)
    if own != "eager" and interface is not None:
        found = interface.get(own)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not say how it computes attention under attn_implementation={own!r}; "
            "use transformers' DynamicCache"
        )
    return found


class Loan:
    """A configuration that is borrowed until `give_back`, or until `heal` finds that nobody holds the loan any more."""

    __slots__ = ("__weakref__", "config")

    def __init__(self, config: PreTrainedConfig, attention_function: Any) -> None:
        self.config: PreTrainedConfig | None = None
        if config._attn_implementation == NAME:  # the user's own choice
            return
        with _LOCK:
            borrowed = register(attention_function, own_name(config))
            _LENT[id(config)] = [*_held(config), ref(self)]
            self.config = config
            put(config, borrowed)

    def give_back(self) -> None:
        """Let the model have its own implementation again, unless another thread has borrowed it, too."""
        config, self.config = self.config, None
        if config is not None:
            heal(config)


def heal(config: PreTrainedConfig) -> None:
    """Give back a configuration that nobody holds any more: after its attention, or after a step was interrupted."""
    if not config._attn_implementation.startswith(_PREFIX):
        return
    with _LOCK:
        held = _LENT[id(config)] = _held(config)
        if not held:
            del _LENT[id(config)]
            put(config, own_name(config))


def _held(config: PreTrainedConfig) -> list["ref[Loan]"]:
    """The loans of a configuration that are neither given back nor gone."""
    return [loan for loan in _LENT.get(id(config), []) if (held := loan()) is not None and held.config is config]


def put(config: PreTrainedConfig, name: str) -> None:
    """Write the implementation of this very configuration; the public setter would also write those below it."""
    config._attn_implementation_internal = name


_REGISTERED: set[str] = set()
_LOCK = Lock()
# The loans of a configuration, by its id. Weakly, and without code that runs when they end: there Python would swallow
# the interruption that ended them.
_LENT: dict[int, list["ref[Loan]"]] = {}
