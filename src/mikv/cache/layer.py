"""One layer's cache from its first token on: warm-up, then two tiers. Knows nothing about transformers.

warm-up   the first tokens stay exact, until there are enough to fit the transforms on (usually: the whole prompt)
packed    every token is in the high or the low tier; a step attends to both and exactly to its own new tokens,
          appends those to the high tier, and demotes the least important ones, 32 at a time
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Held:
    """What a layer holds, replaced in one assignment. `heads` is (G, D)."""

    columns: Columns
    tokens: WarmUp | Packed
    heads: tuple[int, int]


@dataclass(frozen=True)
class Staged:
    """What a step will change: `change` in the tokens, the rest in the layer; all of it may be repeated."""

    held: Held
    change: Callable[[], None]
    holds: tuple[bool, int]


HELD_STEPS = 256  # longer than any draft: if nothing was cropped for so long, assisted decoding is over


class TwoTierLayer:
    """The keys and values of one layer for a batch of rows. The first step decides shapes, dtype and device.

    A step is two acts: `step` computes, writes new tokens where none are in use and says what is to change, `commit`
    changes it and cannot fail; it may be repeated if it was interrupted. `discard` instead of it takes the step back.
    """

    def __init__(self, config: MiKVConfig, layer_idx: int) -> None:
        self.config = config
        self.layer_idx = layer_idx
        self.policy = make_policy(config.policy, config.policy_options)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._staged: Staged | None = None
        self._is_due = False  # whether the tiers have yet to be brought to their budget
        self._holds = False, 0  # whether demotion waits for `crop`, and for how many steps it has
        self._held: Held | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_staged": None}  # a copy has made no step

    @property
    def columns(self) -> Columns:
        """Which columns are tokens."""
        return Columns(0) if self._held is None else self._held.columns

    @property
    def tokens(self) -> WarmUp | Packed | None:
        """What is stored."""
        return None if self._held is None else self._held.tokens

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(B, G, D), or None if nothing was stored yet."""
        return None if self._held is None else (len(self._held.columns.num_tokens), *self._held.heads)

    @property
    def holds_demotion(self) -> bool:
        """Whether demotion waits for `crop`."""
        return self._holds[0]

    @holds_demotion.setter
    def holds_demotion(self, value: bool) -> None:
        self._holds = value, self._holds[1]

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
        masks that tiers cannot honour, NumericsError for NaN and Inf; nothing is stored then.
        """
        output = self.step(queries, (keys, values), mask, options, exact)
        self.commit()
        return output

    def step(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        """As `attend`, but the new tokens count only after `commit`."""
        try:
            output = self._step(queries, new, mask, options, exact)
        except NumericsError as error:
            raise NumericsError(f"layer {self.layer_idx}: {error}") from error
        if not torch.is_grad_enabled():
            return output
        return _Inference.apply(output, queries)  # type: ignore[no-untyped-call]

    @_writable_in_any_mode
    def _step(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        self._staged = None
        held = self._begun(new[0])
        if self._is_due:  # the last commit was interrupted
            self.settle()
        held = self._held or held
        step = held.columns.read_step(mask, queries.shape[2])
        if isinstance(held.tokens, Packed):
            output, change = held.tokens.attend(queries, new, step, options, held.columns)
        else:
            output, change = held.tokens.attend(queries, new, mask, step, options, exact)
        columns = held.columns.advanced(step.valid, queries.shape[2])
        after, waited = Held(columns, held.tokens, held.heads), self._holds[1] + 1
        self._staged = Staged(after, change, (self._holds[0] and waited < HELD_STEPS, waited))
        return output

    def _begun(self, keys: Tensor) -> "Held":
        """What is held before a step: nothing yet, if it is the first."""
        if self._held is not None:
            return self._held
        layer_formats(self.config, keys.shape[3], keys.dtype)  # refuses what cannot be before any work is done
        return Held(Columns(keys.shape[0]), WarmUp(self.config, self.policy, keys), (keys.shape[1], keys.shape[3]))

    @_writable_in_any_mode
    def commit(self) -> None:
        """Make the last step count, if it does not yet, and bring the tiers to their budget."""
        staged = self._staged
        if staged is not None:  # every line may be repeated
            staged.change()
            self._held, self._holds, self._is_due = staged.held, staged.holds, True
            self._staged = None
        if self._is_due:
            self.settle()

    def discard(self) -> None:
        """Take back a step that does not count yet."""
        self._staged = None

    @property
    def has_staged(self) -> bool:
        """Whether a step waits for `commit` or `discard`."""
        return self._staged is not None

    @_writable_in_any_mode
    def settle(self) -> None:
        """Bring the tiers to their budget, if that is due and allowed."""
        held = self._held
        if held is not None and not self.holds_demotion and not self.config.keeps_everything_exact:
            if isinstance(held.tokens, Packed):
                held.tokens.demote(held.columns)
            elif max(held.columns.num_tokens) >= max(1, self.config.warmup_tokens):
                self._warn_of_small(held.tokens)
                self._held = replace(held, tokens=Packed.partition(held.tokens, held.columns))
        self._is_due = False

    def _warn_of_small(self, warm_up: WarmUp) -> None:
        for name, x in (("keys", warm_up.tokens.keys), ("values", warm_up.tokens.values)):
            if (largest := too_small(x)) is not None:
                logger.warning(
                    "layer %d: a head's %s are at most %.1g, too small for scales of 16 bits, and lose much of what "
                    "they say; keep the layer exact with skip_layers=(%d,)",
                    *(self.layer_idx, name, largest, self.layer_idx),
                )

    def hold_demotion(self) -> None:
        """From now on demote only in `crop`, so that what is appended between two crops can be taken back.

        Ends by itself after HELD_STEPS steps without a crop.
        """
        self._holds = True, 0

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
        held = self._held
        if held is None:
            return
        if isinstance(held.tokens, Packed):
            change = held.tokens.cropped(num_columns, held.columns)
        else:
            change = held.tokens.cropped(num_columns)
        holds, _ = self._holds
        columns = held.columns.cropped(num_columns)
        self._staged = Staged(replace(held, columns=columns), change, (False, 0))
        self.commit()
        self._holds = holds, 0

    @_writable_in_any_mode
    def select_rows(self, index: Tensor) -> None:
        """Rows `index` (B',) become the rows: for beam search, and to repeat or pick rows."""
        held = self._held
        if held is not None:
            self._held = replace(held, columns=held.columns.of_rows(index), tokens=held.tokens.of_rows(index))

    @_writable_in_any_mode
    def to(self, device: torch.device | str) -> None:
        """Move all bytes to `device`."""
        if self.tokens is not None:
            self.tokens.to(device)

    def bytes_by_part(self) -> dict[str, int]:
        """All bytes allocated by part, `statistics` being what transforms are fitted on; absent parts are 0."""
        parts = dict.fromkeys(("warm_up", "statistics", "high", "low", "scores", "positions", "transforms"), 0)
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
        columns = Columns.from_dict(meta["columns"])
        tokens: WarmUp | Packed
        if meta["kind"] == "warm_up":
            tokens = WarmUp.restore(self.config, self.policy, tensors)
        else:
            tokens = Packed.restore(self.config, self.policy, tensors, meta, (batch, num_heads, head_dim))
        self._held = Held(columns, tokens, (num_heads, head_dim))


class _Inference(torch.autograd.Function):
    """Passes attention on; a training step that goes back through it is stopped, codes have no gradients."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, queries: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        raise CacheStateError("a MiKV cache has no gradients; train with use_cache=False")
