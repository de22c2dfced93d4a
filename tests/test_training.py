"""Training a model whose attention is mikv's, without a cache: gradients and dropout are those of eager attention."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mikv import MiKVCache, reference
from mikv.errors import CacheStateError, UnsupportedModelError
from mikv.integrations.transformers.versions import as_argument
from mikv.ops import AttentionOptions, attend_unpacked, cpu, fallback
from mikv.reference import causal_mask
from numerics import gaussian
from tier_views import fitted, formats, tiers
from tiny import FIRST_WORD, VOCAB_SIZE, tiny_model

FAMILIES = ["llama", "gemma2", "gpt-oss"]  # neither, softcap, sinks


def ids(length: int = 40) -> Tensor:
    return torch.randint(FIRST_WORD, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(0))


def model_of(family: str, **settings: object) -> PreTrainedModel:
    model = tiny_model(family, **settings).requires_grad_(True)
    MiKVCache(model.config)  # makes the name known
    model.set_attn_implementation("mikv")
    return model


def trained(model: PreTrainedModel, implementation: str, padding: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one step on two rows, the second of which begins with `padding`."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    tokens, mask = ids(), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :padding] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[1, padding] = -100  # it would be foretold by padding, which sees nothing
    torch.manual_seed(7)
    output = model(tokens, attention_mask=mask, labels=labels, use_cache=False)
    output.loss.backward()
    return output.logits.detach()[mask == 1], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def require_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm().clamp_min(1e-6), name


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("when", ["before any cache", "after a cache was used"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager_attention(family: str, when: str, padding: int) -> None:
    model = model_of(family)
    if when == "after a cache was used":
        model(ids(100), **as_argument(MiKVCache(model.config)))
    logits, gradients = trained(model.train(), "mikv", padding)
    eager_logits, eager_gradients = trained(model, "eager", padding)
    assert (logits - eager_logits).abs().max() <= 1e-4 * eager_logits.abs().max()
    require_close(gradients, eager_gradients)


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_dropout_is_that_of_eager_attention_with_the_same_seed(family: str) -> None:
    model = model_of(family, attention_dropout=0.5).train()
    logits, gradients = trained(model, "mikv")
    eager_logits, eager_gradients = trained(model, "eager")
    assert (logits - eager_logits).abs().max() <= 1e-4 * eager_logits.abs().max()
    require_close(gradients, eager_gradients)
    assert (trained(model.eval(), "mikv")[0] - logits).abs().max() > 0.01, "there was no dropout"


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_with_a_cache_is_refused(family: str) -> None:
    model = model_of(family, attention_dropout=0.5).train()
    with pytest.raises(UnsupportedModelError, match=r"dropout of 0\.5 .* call model\.eval\(\) first"):
        model(ids(), **as_argument(MiKVCache(model.config)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [40, 100])
def test_a_step_with_a_cache_in_grad_mode_answers_and_has_no_gradients(family: str, length: int) -> None:
    model = model_of(family)
    with torch.no_grad():
        expected = [step.logits for step in two_steps(model, length)]
    found = two_steps(model, length)
    assert all(torch.equal(one.logits, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(CacheStateError, match="a MiKV cache has no gradients; train with use_cache=False"):
        found[1].logits.sum().backward()


def two_steps(model: PreTrainedModel, length: int) -> list[object]:
    cache = MiKVCache(model.config)
    return [model(ids(length), **as_argument(cache)), model(ids(3), **as_argument(cache))]


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 5, 9, dtype=torch.bool).tril(2)], ids=["causal", "masked"])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_gradients_of_attention_without_a_cache_are_those_of_the_oracle(extra: str, mask: Tensor | None) -> None:
    inputs = [gaussian((1, 4, 5, 8), 1), gaussian((1, 2, 9, 8), 2), gaussian((1, 2, 9, 8), 3), gaussian((4,), 4)]
    queries, keys, values, sinks = (x.requires_grad_() for x in inputs)
    softcap, sinks_of = 3.0 if extra == "softcap" else None, sinks if extra == "sinks" else None
    output = attend_unpacked(queries, keys, values, mask, AttentionOptions(0.3, softcap, sinks_of), causal=True)
    seen = causal_mask(5, 9, keys.device) if mask is None else mask
    expected = reference.attend(queries, keys, values, seen, 0.3, softcap, sinks_of)
    differentiated = [x for x in (queries, keys, values, sinks_of) if x is not None]
    direction = gaussian((1, 4, 5, 8), 5)
    gradients = torch.autograd.grad(output, differentiated, direction)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, differentiated, direction), strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_tiers_refuse_dropout() -> None:
    raw = formats("exact", "raw", 32)
    high, _ = tiers("growing", raw, raw)
    queries, new = gaussian((2, 4, 1, 32), 1), gaussian((2, 2, 1, 32), 2)
    transforms = fitted(queries, new, new)
    for attend in (cpu.attend, fallback.attend):
        with pytest.raises(UnsupportedModelError, match="dropout"):
            attend(queries, (new, new), None, (high, None), transforms, AttentionOptions(1.0, dropout=0.1), None, True)
