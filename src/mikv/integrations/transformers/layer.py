"""One compressed layer of a MiKVCache: the contract of transformers' cache layers on top of `TwoTierLayer`."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from mikv.cache.config import MiKVConfig
from mikv.cache.layer import TwoTierLayer
from mikv.cache.warm_up import ExactAttention
from mikv.errors import CacheStateError, UnsupportedModelError
from mikv.integrations.transformers import attention, compiled
from mikv.integrations.transformers.loan import Loan
from mikv.ops import AttentionOptions


class Owner(Protocol):
    """What a layer needs of its cache, which decides when a step of all layers counts."""

    def begin(self, layer_idx: int) -> None:
        """The layer is about to compute a step."""

    def end(self, layer_idx: int, num_queries: int) -> None:
        """The layer has computed it."""

    def fail(self) -> None:
        """The layer could not."""


def _nobody() -> None:
    return None


class MiKVLayer(CacheLayerMixin):
    """What transformers asks of a layer, as a step that counts once all layers have made it.

    The cache that a layer belongs to is its `owner`, weakly: caches are freed as soon as nobody uses them.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, config: MiKVConfig, layer_idx: int, model_config: PreTrainedConfig) -> None:
        super().__init__()
        self.tokens = TwoTierLayer(config, layer_idx)
        self.layer_idx = layer_idx
        self.pending: tuple[Tensor, Tensor] | None = None
        self.handle = compiled.register(self)
        self.loan: Loan | None = None  # of the model's attention, for the step under way
        self.owner: Callable[[], Owner | None] = _nobody
        self.wants_proof = not config.keeps_everything_exact
        self._model_config = model_config

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"owner": _nobody, "handle": None, "pending": None, "loan": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = compiled.register(self)  # a copy is a layer of its own

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes drafts back: in the full cache at any time, in tiers while demotion waits for it."""
        return self.tokens.config.keeps_everything_exact or self.tokens.holds_demotion

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
        keys, values = attention.carriers(key_states, value_states, self, self._model_config)
        self.loan = keys.loan
        return keys, values

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
        owner = self.owner()
        if owner is None:
            return self.tokens.attend(queries, *new, mask, options, exact)
        owner.begin(self.layer_idx)
        try:
            output = self.tokens.step(queries, new, mask, options, exact)
            owner.end(self.layer_idx, queries.shape[2])
        except Exception:
            owner.fail()
            raise
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

    def discard(self) -> None:
        """Take back a step that does not count yet."""
        self.pending = None
        if self.loan is not None:
            self.loan.give_back()
        self.tokens.discard()

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
