"""Checks of a cache's own operations: rows, crop, reset, offload, save, compile, and what its numbers are worth."""

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache

from conformance.generation import ONE_ROW, RAGGED
from conformance.trial import Prompt, Trial, require_close, require_same_tokens
from mikv.integrations.transformers.versions import as_argument
from tiny import FIRST_WORD, VOCAB_SIZE

AFTER = 30  # tokens fed after an operation: enough for a tier to overflow
COMPILED_STEPS = 5


def close_to_full_cache(trial: Trial) -> None:
    """logits close to the full cache's on the same text"""
    prompt, after = Prompt.random(*RAGGED), _words(len(RAGGED), AFTER)
    logits = _continued(trial, trial.cache(), prompt, after)
    with trial.full_cache() as cache:
        expected = _continued(trial, cache, prompt, after)
    trial.require_near(logits, expected, "DynamicCache")


def reorder(trial: Trial) -> None:
    """reorder_cache"""
    rows = torch.tensor([2, 0, 0])
    _require_rows(trial, lambda cache: cache.reorder_cache(rows), rows)


def repeat_interleave(trial: Trial) -> None:
    """batch_repeat_interleave"""
    _require_rows(trial, lambda cache: cache.batch_repeat_interleave(2), torch.arange(3).repeat_interleave(2))


def select_indices(trial: Trial) -> None:
    """batch_select_indices"""
    rows = torch.tensor([2, 0])
    _require_rows(trial, lambda cache: cache.batch_select_indices(rows), rows)


def crop(trial: Trial) -> None:
    """crop of drafts, as assisted decoding does it"""
    prompt, after = _words(1, *ONE_ROW), _words(1, AFTER)
    drafts = _words(1, 66).split(22, 1)

    def logits(num_rejected: int) -> Tensor:
        """Three drafts of which two tokens each are accepted; the others are never fed, or cropped."""
        cache, after_drafts = trial.cache(), []
        cache.activate_past_recording()
        for past, draft in zip((prompt, prompt[:, :0], prompt[:, :0]), drafts, strict=True):
            trial.feed(cache, torch.cat((past, draft[:, : 2 + num_rejected]), 1))
            cache.crop(-num_rejected)
        for token in after.split(1, 1):
            after_drafts.append(trial.feed(cache, token))
            cache.crop(0)  # whoever records the past has to say after every step that it may be forgotten
        return torch.cat(after_drafts, 1)

    trial.require_near(logits(20), logits(0), "a cache that never saw the rejected tokens")


def crop_unprepared(trial: Trial) -> None:
    """crop without warning: done, or refused with nothing changed"""
    prompt, after = _words(1, *ONE_ROW), _words(1, AFTER)
    for num_tokens in (1, 20, 60):
        cache, expected = trial.cache(), trial.cache()
        trial.feed(cache, prompt)
        try:
            cache.crop(-num_tokens)
            kept = prompt[:, :-num_tokens]
        except (RuntimeError, ValueError):
            kept = prompt
        trial.feed(expected, kept)
        logits, uncropped = trial.feed_each(cache, after), trial.feed_each(expected, after)
        if kept is prompt:
            require_close(logits, uncropped, "bitwise", "a cache that crop was never called on")
        else:
            trial.require_near(logits, uncropped, f"a cache without the last {num_tokens} tokens")


def reset(trial: Trial) -> None:
    """reset, then use again"""
    prompt, after = Prompt.random(*RAGGED), _words(len(RAGGED), AFTER)
    cache = trial.cache()
    before = _continued(trial, cache, prompt, after)
    cache.reset()
    require_close(_continued(trial, cache, prompt, after), before, "bitwise", "the first use")


def interrupted_step(trial: Trial) -> None:
    """a step that fails in the last layer, then the same again"""
    prompt, after = _words(1, *ONE_ROW), _words(1, 8)
    cache, token = trial.cache(), after[:, :1]
    trial.feed(cache, prompt)
    last = trial.model.model.layers[-1]
    failing = last.register_forward_pre_hook(_fail)
    with suppress(_SimulatedError):
        trial.feed(cache, token)
    failing.remove()
    try:
        retried = trial.feed(cache, token)
    except RuntimeError as error:
        if "crop(0)" not in str(error):
            raise
        cache.crop(0)
        retried = trial.feed(cache, token)
    other = trial.cache()
    trial.feed(other, prompt)
    expected = trial.feed_each(other, after)
    actual = torch.cat((retried, trial.feed_each(cache, after[:, 1:])), 1)
    trial.require_same_rows(actual, expected, "steps that nothing interrupted")


def unchanged_model(trial: Trial) -> None:
    """the model is as before, without a cache"""
    model, prompt = trial.model, Prompt.random(*ONE_ROW)
    before, attention = model(prompt.ids, use_cache=False).logits, model.config._attn_implementation
    trial.generate(trial.cache(), prompt)
    assert model.config._attn_implementation == attention, (
        f"attention is {model.config._attn_implementation} afterwards"
    )
    assert torch.equal(model(prompt.ids, use_cache=False).logits, before), (
        "the model computes something else afterwards"
    )


def freed(trial: Trial) -> None:
    """memory is freed as soon as nobody uses the cache"""
    cache = trial.cache()
    trial.feed(cache, Prompt.random(*ONE_ROW).ids)
    alive = ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None, "a reference cycle keeps it until the collector runs"
    finally:
        gc.enable()


def offload(trial: Trial) -> None:
    """offload and prefetch of layers"""

    def offload_and_prefetch(cache: Cache) -> Cache:
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        return cache

    _require_no_change(trial, offload_and_prefetch)


def save_and_load(trial: Trial) -> None:
    """save to a file (own method, or pickle), load, continue"""

    def through_a_file(cache: Cache) -> Cache:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            if hasattr(cache, "save"):
                cache.save(path)
                return type(cache).load(path, trial.model.config)
            torch.save(cache, path)
            return torch.load(path, weights_only=False)

    _require_no_change(trial, through_a_file)


def hiding_mask(trial: Trial) -> None:
    """4D mask that hides stored tokens"""
    prompt, token = _words(1, *ONE_ROW), _words(1, 1)

    def logits(cache: Cache) -> Tensor:
        trial.feed(cache, prompt)
        columns = torch.arange(cache.get_mask_sizes(1, 0)[0])
        mask = ((columns <= prompt.shape[1]) & ((columns < 10) | (columns >= 30)))[None, None, None]
        return trial.model(token, attention_mask=mask, **as_argument(cache)).logits

    masked = logits(trial.cache())
    with trial.full_cache() as cache:
        expected = logits(cache)
    trial.require_near(masked, expected, "DynamicCache")


def hidden_endings(trial: Trial) -> None:
    """padding after rows that ended early, hidden in the next turn"""
    prompt, answer, more = Prompt.random(*RAGGED), _words(len(RAGGED), 12), _words(len(RAGGED), 20)
    mask = torch.nn.functional.pad(prompt.mask, (0, answer.shape[1] + more.shape[1]), value=1)
    mask[0, prompt.mask.shape[1] + 6 : -more.shape[1]] = 0

    def logits(cache: Cache) -> Tensor:
        _continued(trial, cache, prompt, answer)
        return trial.feed(cache, more, mask)

    produced = logits(trial.cache())
    with trial.full_cache() as cache:
        expected = logits(cache)
    trial.require_near(produced, expected, "DynamicCache")


def compiled_decoding(trial: Trial) -> None:
    """torch.compile of the decode step"""
    prompt = Prompt.random(*ONE_ROW)
    eager = _greedy_tokens(trial, trial.model, prompt)
    torch._dynamo.reset()
    try:
        compiled = _greedy_tokens(trial, torch.compile(trial.model, backend="aot_eager"), prompt)
    finally:
        torch._dynamo.reset()
    require_same_tokens(compiled, eager, "the model as it is")


class _SimulatedError(Exception):
    """What a model might raise in the middle of a step."""


def _fail(*args: Any) -> None:
    raise _SimulatedError


def _words(*shape: int) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(3))


def _continued(trial: Trial, cache: Cache, prompt: Prompt, after: Tensor) -> Tensor:
    """Logits of a padded prompt's continuation `after` (B, n)."""
    trial.feed(cache, prompt.ids, prompt.mask)
    return trial.feed_each(cache, after, prompt.mask)


def _require_rows(trial: Trial, change: Callable[[Cache], None], sources: Tensor) -> None:
    """After `change` row i of the cache is what row sources[i] was, and no two rows share anything."""
    prompt, before, after = Prompt.random(*RAGGED), _words(len(RAGGED), 2), _words(len(sources), AFTER)
    mask = torch.nn.functional.pad(prompt.mask, (0, before.shape[1]), value=1)

    def filled() -> Cache:
        cache = trial.cache()
        _continued(trial, cache, prompt, before)
        return cache

    changed = filled()
    change(changed)
    logits = trial.feed_each(changed, after, mask[sources])
    expected = [
        trial.feed_each(filled(), after[row].expand(prompt.num_rows, -1), mask)[source]
        for row, source in enumerate(sources.tolist())
    ]
    trial.require_same_rows(logits, torch.stack(expected), "the row that it was before")


def _require_no_change(trial: Trial, change: Callable[[Cache], Cache]) -> None:
    """A cache goes on as if `change` had not been."""
    prompt, before, after = Prompt.random(*RAGGED), _words(len(RAGGED), 2), _words(len(RAGGED), AFTER)
    mask = torch.nn.functional.pad(prompt.mask, (0, before.shape[1]), value=1)
    logits = []
    for operation in (change, lambda cache: cache):
        cache = trial.cache()
        _continued(trial, cache, prompt, before)
        logits.append(trial.feed_each(operation(cache), after, mask))
    require_close(logits[0], logits[1], "bitwise", "a cache left alone")


def _greedy_tokens(trial: Trial, model: Callable[..., Any], prompt: Prompt) -> Tensor:
    cache = trial.cache()
    tokens = [trial.feed(cache, prompt.ids)[:, -1:].argmax(-1)]
    for _ in range(COMPILED_STEPS):
        tokens.append(model(tokens[-1], **as_argument(cache)).logits.argmax(-1))
    return torch.cat(tokens, 1)
