"""One model with one cache under test: runs both, and compares with DynamicCache or with the cache's own word.

An exact cache must give the tokens of DynamicCache under the model's own attention. A cache that rounds cannot, but it
can keep its word: what `generate` does with a padded, reordered, repeated batch must be what the same cache does with
each row alone, fed one token at a time (`replay`). B rows, T columns, N new tokens, V vocabulary. Knows no cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from mikv.integrations.transformers.versions import as_argument
from tiny import FIRST_WORD, PAD, VOCAB_SIZE

NEW_TOKENS = 16

# The largest error accepted, in units of the standard deviation of the logits, and why.
TOLERANCES = {
    "bitwise": 0.0,  # the same operations on the same numbers
    "float32": 2e-4,  # the same numbers in batches of another shape
    "bfloat16": 0.05,  # the same numbers with 8 bits each
}
# The same before a quantizer, as a share of the error of rounding: a number on the edge between two codes falls to the
# other side, and so do some of those computed from it. Two independent roundings are 1.4 of that error apart.
ON_THE_EDGE = 0.5


@dataclass(frozen=True)
class Subject:
    """A cache under test.

    make      builds an empty one for a model
    exact     it keeps keys and values as they are, so its tokens must be those of DynamicCache
    stored    how many tokens each layer holds that holds all of them; None if the cache does not tell
    rounding  what rounding may do to the logits of most tokens: root mean square error in units of their standard
              deviation; a cache that forgets is at 1
    """

    name: str
    make: Callable[[PreTrainedModel], Cache]
    exact: bool
    stored: Callable[[Cache], list[int]] | None = None
    rounding: float = 0.35


@dataclass(frozen=True)
class Prompt:
    """Left-padded token ids and their mask, both (B, T)."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def random(cls, *lengths: int, seed: int = 0) -> "Prompt":
        """One row per length."""
        generator = torch.Generator().manual_seed(seed)
        longest = max(lengths)
        ids = torch.randint(FIRST_WORD, VOCAB_SIZE, (len(lengths), longest), generator=generator)
        mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
        return cls(ids.where(mask, PAD), mask.long())

    @property
    def num_rows(self) -> int:
        return self.ids.shape[0]

    def row(self, row: int) -> Tensor:
        """The tokens (1, n) of a row, padding left out."""
        return self.ids[row, self.mask[row].bool()][None]

    def then(self, more: "Prompt") -> "Prompt":
        """Both, one after the other: the padding of `more` stands in the middle."""
        return Prompt(torch.cat((self.ids, more.ids), 1), torch.cat((self.mask, more.mask), 1))


@dataclass(frozen=True)
class Generated:
    """What `generate` returned: new tokens (B, N), their logits (B, N, V), and the scores (B,) of beams."""

    tokens: Tensor
    logits: Tensor
    scores: Tensor | None


class Trial:
    """A model, as `tiny_model` makes it, and the cache under test."""

    def __init__(self, model: PreTrainedModel, subject: Subject) -> None:
        self.model, self.subject = model, subject
        self._own_attention = model.config._attn_implementation

    def cache(self) -> Cache:
        """An empty cache of the kind under test."""
        return self.subject.make(self.model)

    @contextmanager
    def full_cache(self) -> Iterator[Cache]:
        """An empty DynamicCache, and the model's own attention while it is in use."""
        current, self.model.config._attn_implementation = self.model.config._attn_implementation, self._own_attention
        try:
            yield DynamicCache(config=self.model.config)
        finally:
            self.model.config._attn_implementation = current

    @contextmanager
    def same_tokens_cache(self) -> Iterator[Cache]:
        """The cache that must give the same tokens: DynamicCache, or for a cache that rounds another of its kind."""
        if not self.subject.exact:
            yield self.cache()
            return
        with self.full_cache() as cache:
            yield cache

    def generate(self, cache: Cache | None, prompt: Prompt, **options: Any) -> Generated:
        """Run `generate` with seed 0, greedy unless `options` say otherwise, and check that the result is sound."""
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "top_k": 0} | options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            result = self.model.generate(
                prompt.ids,
                attention_mask=prompt.mask,
                **as_argument(cache),
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
                **settings,
            )
        tokens, logits = result.sequences[:, prompt.ids.shape[1] :], torch.stack(result.logits, 1)
        assert torch.isfinite(logits).all(), "generate computed logits that are not finite"
        assert tokens.shape[1] == settings["max_new_tokens"], f"generate produced {tokens.shape[1]} tokens"
        copies = max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1))
        self.require_stored(cache, prompt, tokens.shape[1] - 1, copies)  # the last token is chosen, but not read yet
        return Generated(tokens, logits, getattr(result, "sequences_scores", None))

    def feed(self, cache: Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, n, V) of the next tokens (B, n); `mask` (B, columns so far + n)."""
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits = self.model(ids, attention_mask=mask, position_ids=positions, **as_argument(cache)).logits
        assert torch.isfinite(logits).all(), "the model computed logits that are not finite"
        return logits

    def feed_each(self, cache: Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `feed`, one token at a time."""
        logits = []
        for i in range(ids.shape[1]):
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
            logits.append(self.feed(cache, ids[:, i : i + 1], mask))
        return torch.cat(logits, 1)

    def replay(self, *pieces: Tensor, one_by_one: Tensor) -> Tensor:
        """Logits (1, 1 + n, V) after the last of `pieces`, and after each of the tokens (1, n) fed `one_by_one`.

        A row alone, unpadded, on an empty cache of the kind under test; each piece (1, any) is one step.
        """
        cache = self.cache()
        for piece in pieces:
            last = self.feed(cache, piece)[:, -1:]
        return torch.cat((last, self.feed_each(cache, one_by_one)), 1)

    @cached_property
    def on_the_edge(self) -> float:
        """What another batch shape may do to a row of a cache that rounds: a share of its rounding as measured."""
        row, one_by_one = Prompt.random(75, seed=4).ids, Prompt.random(NEW_TOKENS, seed=5).ids
        with self.full_cache() as cache:
            full = torch.cat((self.feed(cache, row)[:, -1:], self.feed_each(cache, one_by_one)), 1)
        rounding = relative_error(self.replay(row, one_by_one=one_by_one), full).square().mean().sqrt().item()
        return max(TOLERANCES["float32"], ON_THE_EDGE * rounding)

    def require_near(self, actual: Tensor, expected: Tensor, of_what: str) -> None:
        """Raise AssertionError if logits differ by more than rounding, for an exact cache that of float32."""
        if self.subject.exact:
            require_close(actual, expected, "float32", of_what)
            return
        error, allowed = typical_error(actual, expected), self.subject.rounding
        assert error <= allowed, f"logits are {error:.2g} (rms) from those of {of_what}, {allowed} allowed"

    def require_same_rows(self, actual: Tensor, expected: Tensor, of_what: str) -> None:
        """Raise AssertionError if logits (B, N, V) are not those of the same rows in batches of another shape."""
        if self.subject.exact:
            require_close(actual, expected, "float32", of_what)
            return
        errors = relative_error(actual, expected).square().mean((1, 2)).sqrt()
        row = int(errors.argmax())
        assert errors[row] <= self.on_the_edge, (
            f"logits of row {row} are {errors[row]:.2g} (rms) from those of {of_what}, {self.on_the_edge:.2g} allowed"
        )

    def require_stored(self, cache: Cache | None, prompt: Prompt, num_new: int, copies: int = 1) -> None:
        """Every token is accounted for: the prompt's without padding, and `num_new` more, `copies` times."""
        if cache is None:
            return
        columns = prompt.ids.shape[1] + num_new
        assert cache.get_seq_length() == columns, f"the cache counts {cache.get_seq_length()} columns of {columns}"
        if self.subject.stored is not None:
            num_tokens = copies * (int(prompt.mask.sum()) + num_new * prompt.num_rows)
            stored = self.subject.stored(cache)
            assert all(count == num_tokens for count in stored), f"the layers hold {stored} of {num_tokens} tokens"


def require_same_tokens(actual: Tensor, expected: Tensor, of_what: str) -> None:
    """Raise AssertionError naming the first token that is not that `of_what`."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} tokens, {of_what} has {tuple(expected.shape)}"
    wrong = (actual != expected).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        raise AssertionError(
            f"token {place} of row {row} is {actual[row, place]}, {of_what} has {expected[row, place]} "
            f"({len(wrong)} of {actual.numel()} differ)"
        )


def require_close(actual: Tensor, expected: Tensor, budget: str, of_what: str) -> None:
    """Raise AssertionError if logits are further from those `of_what` than TOLERANCES[budget]."""
    assert actual.shape == expected.shape, f"logits {tuple(actual.shape)}, {of_what} has {tuple(expected.shape)}"
    error = relative_error(actual, expected).max().item()
    tolerance = TOLERANCES[budget]
    assert error <= tolerance, f"logits are {error:.2g} from those of {of_what}, {tolerance:.2g} allowed ({budget})"


def typical_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square error of the median token: one rounded number can send a token to another expert."""
    return relative_error(actual, expected).square().mean(-1).sqrt().median().item()


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Absolute differences in units of the standard deviation of `expected`."""
    return (actual.float() - expected.float()).abs() / expected.float().std()
