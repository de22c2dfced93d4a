"""How far a cache moves a model's predictions from those with the full cache: KL divergence and top-1 agreement.

The continuation of a prompt is fed through the cache under test a few tokens at a time, so that every prediction reads
what the cache stores; a single forward over the whole text would never read it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mikv.integrations.transformers.versions import as_argument


@dataclass(frozen=True)
class Reading:
    """What a model predicted while reading tokens after a prompt.

    log_probs            (N, vocabulary) float32, after each of the N tokens
    seconds_per_token    median over the steps
    """

    log_probs: Tensor
    seconds_per_token: float


@dataclass(frozen=True)
class Fidelity:
    """Distance of a reading from the same reading through the full cache, over its positions."""

    kl_mean: float
    kl_p99: float
    top1_agreement: float


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: Cache, prompt: Tensor) -> float:
    """Feed prompt (T,) token ids to an empty cache at once; returns seconds."""
    start = time.perf_counter()
    model(prompt[None], **as_argument(cache), logits_to_keep=1)
    return time.perf_counter() - start


@torch.no_grad()
def read_on(
    model: PreTrainedModel, cache: Cache, tokens: Tensor, chunk: int = 1, on_step: Callable[[], None] = lambda: None
) -> Reading:
    """Feed tokens (N,) to a cache that has read a prompt, `chunk` at a time."""
    log_probs, seconds = [], []
    for piece in tokens.split(chunk):
        start = time.perf_counter()
        logits = model(piece[None], **as_argument(cache)).logits[0]
        seconds.append((time.perf_counter() - start) / len(piece))
        log_probs.append(logits.float().log_softmax(-1))
        on_step()
    return Reading(torch.cat(log_probs), statistics.median(seconds))


def compare(full: Reading, other: Reading) -> Fidelity:
    """KL(full || other) and how often both predict the same token."""
    kl = divergence(full.log_probs, other.log_probs)
    same = same_top1(full.log_probs, other.log_probs)
    return Fidelity(float(kl.mean()), float(kl.quantile(0.99)), float(same.float().mean()))


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) in nats of log-probabilities (N, vocabulary): (N,)."""
    return (full.exp() * (full - other)).sum(-1)


def same_top1(full: Tensor, other: Tensor) -> Tensor:
    """Where log-probabilities (N, vocabulary) predict the same token: (N,)."""
    return full.argmax(-1) == other.argmax(-1)
