"""One layer's cache from its first token on: warm-up, then two tiers. Knows nothing about transformers.

warm-up   the first tokens stay exact, until there are enough to fit the transforms on (usually: the whole prompt)
packed    every token is in the high or the low tier; a step attends to both and exactly to its own new tokens,
          appends those to the high tier, and demotes the least important ones, 32 at a time
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from mikv.cache.columns import Columns
from mikv.cache.config import MiKVConfig
from mikv.cache.formats import layer_formats
from mikv.cache.packed import Packed
from mikv.cache.policies import make_policy
from mikv.cache.warm_up import ExactAttention, WarmUp
from mikv.errors import CacheStateError, NumericsError
from mikv.formats import too_small
from mikv.ops import AttentionOptions

logger = logging.getLogger("mikv")

P = ParamSpec("P")
R = TypeVar("R")


def _writable_in_any_mode(method: Callable[P, R]) -> Callable[P, R]:
    """Switch autograd and inference mode off: what is allocated can then be written again in any mode."""

    @functools.wraps(method)
    def switched(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)  # switching takes as long as a small operation
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return switched


HELD_STEPS = 256  # longer than any draft: if nothing was cropped for so long, assisted decoding is over


class TwoTierLayer:
    """The keys and values of one layer for a batch of rows. The first step decides shapes, dtype and device."""

    def __init__(self, config: MiKVConfig, layer_idx: int) -> None:
        self.config = config
        self.layer_idx = layer_idx
        self.policy = make_policy(config.policy, config.policy_options)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.columns = Columns(0)
        self.tokens: WarmUp | Packed | None = None
        self.shape: tuple[int, int, int] | None = None  # (B, G, D)
        self.holds_demotion = False
        self.steps_since_crop = 0

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        """Attend from queries (B, H, Tq, D) to all tokens and the new ones, then store the new ones.

        keys and values (B, G, Tq, D) are the new tokens; `mask` (B, 1, Tq, columns + Tq) is transformers' boolean mask
        or None for causal; `exact(keys, values)` is the model's own attention over unpacked tokens. Returns
        (B, H, Tq, D), for inference: going backward through it raises CacheStateError. Raises UnsupportedModelError for
        masks that tiers cannot honour, NumericsError for NaN and Inf.
        """
        try:
            output = self._attend(queries, (keys, values), mask, options, exact)
        except NumericsError as error:
            raise NumericsError(f"layer {self.layer_idx}: {error}") from error
        if not torch.is_grad_enabled():
            return output
        return _Inference.apply(output, queries)  # type: ignore[no-untyped-call]

    @_writable_in_any_mode
    def _attend(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        if self.tokens is None:
            self._begin(new[0])
        step = self.columns.read_step(mask, queries.shape[2])
        if isinstance(self.tokens, Packed):
            output = self.tokens.attend(queries, new, step, options, self.columns)
        else:
            assert self.tokens is not None
            output = self.tokens.attend(queries, new, mask, step, options, exact)
        self.columns.advance(step.valid, queries.shape[2])
        self.steps_since_crop += 1
        self.holds_demotion = self.holds_demotion and self.steps_since_crop < HELD_STEPS
        self.settle()
        return output

    def _begin(self, keys: Tensor) -> None:
        layer_formats(self.config, keys.shape[3], keys.dtype)  # refuses what cannot be before any work is done
        self.columns = Columns(keys.shape[0])
        self.shape = (keys.shape[0], keys.shape[1], keys.shape[3])
        self.tokens = WarmUp(self.config, self.policy, keys)

    @_writable_in_any_mode
    def settle(self) -> None:
        """Bring the tiers to their budget, if that is due and allowed."""
        if self.holds_demotion or self.config.keeps_everything_exact:
            return
        if isinstance(self.tokens, Packed):
            self.tokens.demote(self.columns)
        elif self.tokens is not None and max(self.columns.num_tokens) >= max(1, self.config.warmup_tokens):
            for name, x in (("keys", self.tokens.tokens.keys), ("values", self.tokens.tokens.values)):
                if (largest := too_small(x)) is not None:
                    logger.warning(
                        "layer %d: a head's %s are at most %.1g, too small for scales of 16 bits, and lose much of "
                        "what they say; keep the layer exact with skip_layers=(%d,)",
                        *(self.layer_idx, name, largest, self.layer_idx),
                    )
            self.tokens = Packed.partition(self.tokens, self.columns)

    def hold_demotion(self) -> None:
        """From now on demote only in `crop`, so that what is appended between two crops can be taken back.

        Ends by itself after HELD_STEPS steps without a crop.
        """
        self.holds_demotion, self.steps_since_crop = True, 0

    def require_croppable(self, num_columns: int) -> None:
        """Raise CacheStateError if some of the last `num_columns` were demoted already."""
        if num_columns > self.columns.num_columns:
            raise CacheStateError(f"cannot take back {num_columns} tokens of {self.columns.num_columns}")
        if isinstance(self.tokens, Packed):
            self.tokens.slots_of_last(num_columns, self.columns)

    @_writable_in_any_mode
    def crop(self, num_columns: int) -> None:
        """Take back the last `num_columns`. Raises CacheStateError, changing nothing, if some were demoted already."""
        self.require_croppable(num_columns)
        if isinstance(self.tokens, Packed):
            self.tokens.crop(num_columns, self.columns)
        elif self.tokens is not None:
            self.tokens.crop(num_columns)
        self.columns.crop(num_columns)
        held, self.holds_demotion, self.steps_since_crop = self.holds_demotion, False, 0
        if self.tokens is not None:
            self.settle()
        self.holds_demotion = held

    @_writable_in_any_mode
    def select_rows(self, index: Tensor) -> None:
        """Rows `index` (B',) become the rows: for beam search, and to repeat or pick rows."""
        if self.tokens is None or self.shape is None:
            return
        self.columns.select_rows(index)
        self.tokens.select_rows(index)
        self.shape = (len(index), *self.shape[1:])

    @_writable_in_any_mode
    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        if self.tokens is not None:
            self.tokens.to(device)

    def bytes_by_part(self) -> dict[str, int]:
        """All bytes allocated: `warm_up`, `high`, `low`, `scores`, `positions`, `transforms`; absent parts are 0."""
        parts = dict.fromkeys(("warm_up", "high", "low", "scores", "positions", "transforms"), 0)
        return parts if self.tokens is None else parts | self.tokens.bytes_by_part()

    def tokens_by_tier(self) -> dict[str, int]:
        """Tokens of all rows by place: `warm_up`, `high`, `low`, `dropped`."""
        places = dict.fromkeys(("warm_up", "high", "low", "dropped"), 0)
        num_tokens = sum(self.columns.num_tokens)
        return places if self.tokens is None else places | self.tokens.tokens_by_tier(num_tokens)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors by name, and everything else as JSON types."""
        if self.tokens is None:
            return {}, {"kind": "empty"}
        tensors, meta = self.tokens.state()
        return tensors, meta | {"columns": self.columns.to_dict(), "shape": self.shape}

    @_writable_in_any_mode
    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """The inverse of `state`. Raises KeyError, TypeError or ValueError if the parts do not fit together."""
        self.reset()
        tensors = {name: tensor.clone() if tensor.is_inference() else tensor for name, tensor in tensors.items()}
        if meta["kind"] == "empty":
            return
        batch, num_heads, head_dim = (int(size) for size in meta["shape"])
        self.shape = (batch, num_heads, head_dim)
        self.columns = Columns.from_dict(meta["columns"])
        if meta["kind"] == "warm_up":
            self.tokens = WarmUp.restore(self.config, self.policy, tensors)
        else:
            self.tokens = Packed.restore(self.config, self.policy, tensors, meta, self.shape)


class _Inference(torch.autograd.Function):
    """Passes attention on; a training step that goes back through it is stopped, codes have no gradients."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, queries: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        raise CacheStateError("a MiKV cache has no gradients; train with use_cache=False")
