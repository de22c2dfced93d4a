"""How far a cache moves a model's predictions from those with the full cache: KL divergence and top-1 agreement.

The continuation of a prompt is fed through the cache under test a few tokens at a time, so that every prediction reads
what the cache stores; a single forward over the whole text would never read it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Reading:
    """What a model predicted while reading a continuation.

    log_probs            (N, vocabulary) float32, after each of the N tokens of the continuation
    prefill_seconds      for the prompt
    seconds_per_token    median over the steps of the continuation
    """

    log_probs: Tensor
    prefill_seconds: float
    seconds_per_token: float


@dataclass(frozen=True)
class Fidelity:
    """Distance of a reading from the same reading through the full cache, over its positions."""

    kl_mean: float
    kl_p99: float
    top1_agreement: float


@torch.no_grad()
def read(
    model: PreTrainedModel,
    cache: Cache,
    prompt: Tensor,
    continuation: Tensor,
    chunk: int = 1,
    on_step: Callable[[], None] | None = None,
) -> Reading:
    """Prefill prompt (T,), then feed continuation (N,) token ids through `cache`, `chunk` tokens at a time."""
    start = time.perf_counter()
    model(prompt[None], past_key_values=cache, logits_to_keep=1)
    prefill_seconds = time.perf_counter() - start
    log_probs, seconds = [], []
    for piece in continuation.split(chunk):
        start = time.perf_counter()
        logits = model(piece[None], past_key_values=cache).logits[0]
        seconds.append((time.perf_counter() - start) / len(piece))
        log_probs.append(logits.float().log_softmax(-1))
        if on_step is not None:
            on_step()
    return Reading(torch.cat(log_probs), prefill_seconds, sorted(seconds)[len(seconds) // 2])


def compare(full: Reading, other: Reading) -> Fidelity:
    """KL(full || other) and how often both predict the same token."""
    kl = (full.log_probs.exp() * (full.log_probs - other.log_probs)).sum(-1)  # (N,)
    same = full.log_probs.argmax(-1) == other.log_probs.argmax(-1)
    return Fidelity(float(kl.mean()), float(kl.quantile(0.99)), float(same.float().mean()))
