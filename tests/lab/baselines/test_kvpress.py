"""The adapter to kvpress, with a stand-in for the package: its presses are context managers that hook a model."""

import contextlib
import copy
import gc
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from mikv.cache_names import parse_cache
from mikv.errors import ConfigError, UnsupportedModelError
from mikv.integrations.transformers.versions import CACHE_ARGUMENT, as_argument
from mikv.lab.baselines import kvpress
from mikv.lab.recording import fill, record
from tiny import tiny_model

NUM_PROMPT, NUM_TOKENS = 90, 100
IDS = torch.arange(NUM_TOKENS)[None] % 93 + 3


@dataclass
class EveryPress:
    """Keeps as many tokens as it may of the first ones, in the manner of kvpress."""

    compression_ratio: float = 0.0
    kept: ClassVar[list[int]] = []

    def num_kept(self, layer_idx: int, num_tokens: int) -> int:
        return max(1, int(num_tokens * (1 - self.compression_ratio)))

    def hook(self, module, args, kwargs, output):
        layer = kwargs[CACHE_ARGUMENT].layers[module.layer_idx]
        count = self.num_kept(module.layer_idx, layer.keys.shape[2])
        self.kept.append(count)
        layer.keys, layer.values = layer.keys[:, :, :count], layer.values[:, :, :count]
        return output

    @contextlib.contextmanager
    def __call__(self, model):
        hooks = [layer.self_attn.register_forward_hook(self.hook, with_kwargs=True) for layer in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()


class PyramidPress(EveryPress):
    def num_kept(self, layer_idx, num_tokens):
        return super().num_kept(layer_idx, num_tokens) - layer_idx


class MaskPress(EveryPress):
    def hook(self, module, args, kwargs, output):
        module.masked_key_indices = [0]
        return output


class OptionlessPress:
    def __init__(self, other: int = 0) -> None: ...


@pytest.fixture
def package(monkeypatch):
    presses = (EveryPress, PyramidPress, MaskPress, OptionlessPress)
    package = ModuleType("kvpress")
    package.__all__ = [press.__name__ for press in presses]
    for press in presses:
        setattr(package, press.__name__, press)
    monkeypatch.setitem(__import__("sys").modules, "kvpress", package)
    EveryPress.kept.clear()


@pytest.fixture
def model():
    return tiny_model()


def read(model, cache):
    pieces = IDS[:, NUM_PROMPT:].split((7, 1, 1, 1), dim=1)
    return torch.cat([model(piece, **as_argument(cache)).logits[0] for piece in pieces])


@pytest.mark.usefixtures("package")
def test_what_follows_reads_what_the_press_has_kept_at_its_own_positions(model) -> None:
    """As a full pass does under a mask that hides the rest from all queries after the prompt."""
    cache = parse_cache("kvpress:every@0.5").make(model, NUM_TOKENS)
    model(IDS[:, :NUM_PROMPT], **as_argument(cache))
    assert EveryPress.kept == [40, 40]  # and 10 that follow: half of 100
    found = read(model, cache)
    sees = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
    sees[NUM_PROMPT:, 40:NUM_PROMPT] = False
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]
    expected = model(IDS, attention_mask=mask).logits[0, NUM_PROMPT:]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)  # what is kept is in 16 bits
    assert (found - expected).abs().mean() < 0.005 * expected.abs().mean()


@pytest.mark.usefixtures("package")
def test_all_bytes_are_within_the_share(model) -> None:
    named = parse_cache("kvpress:EveryPress@0.5")
    cache = named.make(model, NUM_TOKENS)
    model(IDS[:, :NUM_PROMPT], **as_argument(cache))
    read(model, cache)
    assert cache.get_seq_length() == NUM_TOKENS
    assert named.bytes(cache) == 50 * 2 * 2 * 2 * 64 * 2  # tokens, layers, keys and values, heads, channels, 16 bits


@pytest.mark.usefixtures("package")
def test_filling_reads_the_prompt_itself(model) -> None:
    recording = record(model, IDS[0, :NUM_PROMPT])
    filled = fill(parse_cache("kvpress:Every@0.5").make(model, NUM_TOKENS), recording)
    prefilled = parse_cache("kvpress:Every@0.5").make(model, NUM_TOKENS)
    model(IDS[:, :NUM_PROMPT], **as_argument(prefilled))
    assert torch.equal(read(model, copy.deepcopy(filled)), read(model, prefilled))


@pytest.mark.usefixtures("package")
def test_the_hooks_wait_for_their_own_cache_and_are_gone_after_it(model) -> None:
    named = parse_cache("kvpress:Every@0.5")
    cache, abandoned = named.make(model, NUM_TOKENS), named.make(model, NUM_TOKENS)
    model(IDS, **as_argument(parse_cache("full").make(model, NUM_TOKENS)))
    assert EveryPress.kept == []
    model(IDS[:, :NUM_PROMPT], **as_argument(cache))
    assert len(EveryPress.kept) == 2
    del abandoned
    gc.collect()
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("press", "message"), [("Pyramid", "different numbers of tokens"), ("Mask", "masks tokens and keeps their bytes")]
)
def test_presses_that_free_nothing_or_not_the_same_are_refused(press, message, model) -> None:
    cache = parse_cache(f"kvpress:{press}@0.5").make(model, NUM_TOKENS)
    with pytest.raises(UnsupportedModelError, match=f"{press}Press {message}|{press}Press keeps {message}"):
        model(IDS[:, :NUM_PROMPT], **as_argument(cache))


@pytest.mark.usefixtures("package")
def test_a_share_that_the_tokens_after_the_prompt_take_alone_is_refused(model) -> None:
    cache = parse_cache("kvpress:Every@0.05").make(model, NUM_TOKENS)
    with pytest.raises(ConfigError, match=r"the 10 tokens after it take more than 0\.05 of the fp16 bytes of 100"):
        model(IDS[:, :NUM_PROMPT], **as_argument(cache))


@pytest.mark.usefixtures("package")
def test_an_unknown_press_is_refused_with_those_that_there_are(model) -> None:
    with pytest.raises(ConfigError, match=r"no press 'Optionless' that takes a ratio; it has Every, Mask, Pyramid"):
        parse_cache("kvpress:Optionless@0.5").make(model, NUM_TOKENS)


def test_the_reason_says_what_is_missing_or_what_kvpress_wants(monkeypatch) -> None:
    def missing(package):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(kvpress, "transformers_version", "5.23.0")
    monkeypatch.setattr(metadata, "version", missing)
    named = parse_cache("kvpress:SnapKV@0.25")
    assert named.unavailable() == (
        "needs kvpress in a release that allows the installed transformers 5.23.0; 0.5.5 and older ones want "
        "transformers<5.3"
    )
    monkeypatch.setattr(metadata, "version", lambda package: "0.5.5")
    monkeypatch.setattr(metadata, "requires", lambda package: ["fire<0.7", "transformers<5.3,>=4.56.0"])
    assert named.unavailable() == "kvpress 0.5.5 wants transformers<5.3,>=4.56.0; 5.23.0 is installed"
    monkeypatch.setattr(metadata, "requires", lambda package: ["transformers<6"])
    assert named.unavailable() is None
