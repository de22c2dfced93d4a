"""A step counts in all layers or in none: whatever interrupts it, what follows is right or refused."""

import copy
import gc
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from conformance.subjects import packed_config
from mikv import CacheStateError, MiKVCache
from mikv.cache.config import MiKVConfig
from mikv.integrations.transformers.versions import as_argument
from tiny import tiny_model

DEMOTES = 137
LENGTH = 90  # of the prompt; more than the warm-up
IDS = torch.randint(3, 96, (1, LENGTH + 80), generator=torch.Generator().manual_seed(7))


class NoMemory(TorchDispatchMode):
    """Raises at the `which`-th operation that would allocate."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.left = which

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.name.endswith("_"):  # in-place operations allocate nothing
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("simulated")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def feed(model: PreTrainedModel, cache: MiKVCache, start: int, stop: int) -> Tensor:
    return model(IDS[:, start:stop], **as_argument(cache)).logits


def filled(model: PreTrainedModel, config: MiKVConfig, stop: int) -> MiKVCache:
    """A cache that has read the prompt at once and then tokens one by one up to `stop`."""
    cache = MiKVCache(model.config, config)
    if stop:
        feed(model, cache, 0, min(stop, LENGTH))
    for position in range(LENGTH, stop):
        feed(model, cache, position, position + 1)
    return cache


def continuation(model: PreTrainedModel, cache: MiKVCache, length: int) -> Tensor:
    """What the model predicts after the next tokens."""
    return torch.cat([feed(model, cache, at, at + 1) for at in range(length, length + 3)], 1)


def recovered(cache: MiKVCache, length: int) -> int:
    """Bring an interrupted cache back to a whole step; returns its length."""
    try:
        cache.crop(0)
    except CacheStateError:
        cache.reset()
    assert cache.get_seq_length() in (0, length)
    return cache.get_seq_length()


# where the step begins, and how many tokens it has: in the warm-up, its end, a packed step, one that demotes, chunks
STEPS = [(0, 90), (0, 10), (90, 1), (DEMOTES, 1), (100, 20), (100, 50)]
CASES = [("llama", *step) for step in STEPS] + [(family, DEMOTES, 1) for family in ("gemma3", "gpt-oss")]
FAMILIES = ["llama", "gemma3", "gpt-oss"]


def test_the_step_that_demotes_is_one_of_those_tried() -> None:
    model = tiny_model("llama")
    before = filled(model, packed_config("balanced"), DEMOTES).memory().tokens_by_tier["low"]
    assert filled(model, packed_config("balanced"), DEMOTES + 1).memory().tokens_by_tier["low"] > before


@pytest.mark.parametrize(("family", "start", "count"), CASES)
def test_a_step_that_finds_no_memory_is_taken_back(family: str, start: int, count: int) -> None:
    """At every allocation of the step, of the model's and of ours."""
    model = tiny_model(family)
    before = filled(model, packed_config("balanced"), start)
    expected = continuation(model, copy.deepcopy(before), start)
    whole = copy.deepcopy(before)
    feed(model, whole, start, start + count)
    after = continuation(model, whole, start + count)
    failures = 0
    for which in range(10_000):
        cache = copy.deepcopy(before)
        try:
            with NoMemory(which):
                feed(model, cache, start, start + count)
            break
        except torch.OutOfMemoryError:
            failures += 1
        assert model.config._attn_implementation in ("sdpa", "eager")
        if cache.get_seq_length() == start + count:  # the model failed after the last layer
            assert torch.equal(continuation(model, cache, start + count), after)
        elif recovered(cache, start) == start:
            assert torch.equal(continuation(model, cache, start), expected)
    assert failures > 20


def failing_at(module: torch.nn.Module, error: BaseException) -> Any:
    def fail(*args: Any) -> None:
        raise error

    return module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of the model")], ids=["ctrl-c", "error"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_boundary_between_modules(family: str, error: BaseException) -> None:
    model, config = tiny_model(family), packed_config("balanced")
    before = filled(model, config, DEMOTES)
    expected = continuation(model, copy.deepcopy(before), DEMOTES)
    for name, module in model.named_modules():
        if not name:
            continue
        cache = copy.deepcopy(before)
        handle = failing_at(module, error)
        try:
            feed(model, cache, DEMOTES, DEMOTES + 1)
        except type(error):
            pass
        else:
            handle.remove()
            continue  # a module that is not called
        handle.remove()
        if cache.get_seq_length() == DEMOTES + 1:
            continue  # after the last layer
        began = cache._step is not None
        if began:  # going on without a word is refused
            with pytest.raises(CacheStateError, match=r"cache\.crop\(0\)"):
                feed(model, cache, DEMOTES, DEMOTES + 1)
        assert recovered(cache, DEMOTES) == DEMOTES
        assert torch.equal(continuation(model, cache, DEMOTES), expected), name


@pytest.mark.parametrize("start", [0, LENGTH])
def test_states_that_cannot_be_taken_back_are_refused_or_begun_anew(start: int) -> None:
    """Linear attention writes over its states: crop(0) of a step that some layers have made would leave them ahead."""
    types = ["full_attention", "linear_attention", "full_attention"]
    model, config = tiny_model("qwen3-next", num_hidden_layers=3, layer_types=types), packed_config("balanced")
    expected = feed(model, filled(model, config, 0), 0, LENGTH)
    cache = filled(model, config, start)
    handle = failing_at(model.model.layers[-1].self_attn, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, start, start + 10)
    handle.remove()
    if start:
        with pytest.raises(CacheStateError, match=r"call cache\.reset\(\)"):
            cache.crop(0)
        cache.reset()
    else:
        cache.crop(0)
    assert torch.equal(feed(model, cache, 0, LENGTH), expected)


@pytest.mark.parametrize("operation", ["crop", "reorder_cache", "batch_repeat_interleave"])
def test_an_operation_on_some_layers_only_is_noticed(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    cache = filled(model, packed_config("balanced"), 100)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    argument = {"crop": -1, "reorder_cache": torch.tensor([0]), "batch_repeat_interleave": 2}[operation]
    monkeypatch.setattr(cache.layers[1], operation, interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(cache, operation)(argument)
    with pytest.raises(CacheStateError, match=rf"{operation} was interrupted"):
        feed(model, cache, 100, 101)
    cache.reset()
    assert torch.equal(feed(model, cache, 0, 90), feed(model, filled(model, packed_config("balanced"), 0), 0, 90))


@pytest.fixture
def interrupting() -> Iterator[Callable[[float], None]]:
    """Sends this process SIGINT after so many seconds, from another thread."""
    timers = []

    def after(seconds: float) -> None:
        timers.append(threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].start()

    yield after
    for timer in timers:
        timer.cancel()
        timer.join()


def test_random_interruptions(interrupting: Callable[[float], None]) -> None:
    """Ctrl-C at any moment of a dialogue: going on gives the tokens of one that nobody interrupted, or is refused."""
    model, config, generator = tiny_model("llama", num_hidden_layers=3), packed_config("balanced"), random.Random(5)
    whole = MiKVCache(model.config, config)
    feed(model, whole, 0, LENGTH)
    states = {LENGTH: copy.deepcopy(whole)}
    expected = {}
    for at in range(LENGTH, LENGTH + 70):
        expected[at] = feed(model, whole, at, at + 1)
        states[at + 1] = copy.deepcopy(whole)
    interrupted = 0
    for _ in range(int(os.environ.get("MIKV_INTERRUPTIONS", "60"))):
        at = generator.randrange(LENGTH, LENGTH + 40)
        cache = copy.deepcopy(states[at])
        try:
            interrupting(generator.random() * 0.04)
            for _ in range(1000):
                position = cache.get_seq_length()
                if position == LENGTH + 70:
                    cache, position = copy.deepcopy(states[at]), at
                assert torch.equal(feed(model, cache, position, position + 1), expected[position])
        except KeyboardInterrupt:
            interrupted += 1
        try:
            cache.crop(0)
        except CacheStateError:
            continue  # refused: it says so
        position = cache.get_seq_length()
        assert model.config._attn_implementation == "sdpa"
        for step in range(position, min(position + 35, LENGTH + 70)):
            assert torch.equal(feed(model, cache, step, step + 1), expected[step]), (at, position, step)
    assert interrupted > 20


def test_a_cache_is_freed_without_the_collector() -> None:
    model, config = tiny_model("llama"), packed_config("balanced")
    gc.collect()
    gc.disable()
    try:
        before = sum(type(found) is MiKVCache for found in gc.get_objects())
        for _ in range(5):
            filled(model, config, 100)
        assert sum(type(found) is MiKVCache for found in gc.get_objects()) == before
    finally:
        gc.enable()
