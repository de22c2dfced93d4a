"""How far quantized weights move a model's predictions: whole passages of held-out text, in one pass each.

Unlike a cache, weights are met by every token of a pass, so all its positions count. T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mikv.lab.fidelity import divergence, same_top1
from mikv.lab.tasks.text import passages

KINDS = ("prose", "code")


@dataclass(frozen=True)
class Passage:
    """Tokens (T,) of a text of a kind, and the exact model's log-probabilities (T, V) float32 after each of them."""

    kind: str
    tokens: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Reference:
    """What the exact model predicts."""

    passages: tuple[Passage, ...]

    @classmethod
    def of_model(cls, model: PreTrainedModel, tokenizer: Any, samples: int, num_tokens: int, seed: int = 0) -> Self:
        """Let the model read `samples` passages of each kind, drawn from the texts that results are reported on."""
        drawn = []
        for kind in KINDS:
            for tokens in draw(passages(kind, "report"), tokenizer, samples, num_tokens, seed):
                drawn.append(Passage(kind, tokens, predictions(model, tokens)))
        return cls(tuple(drawn))

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity, KL divergence (nats) and top-1 agreement of another model, for each kind of text."""
        results = {}
        for kind in KINDS:
            own = [passage for passage in self.passages if passage.kind == kind]
            read = [(passage, predictions(model, passage.tokens)) for passage in own]
            results[f"perplexity_{kind}"] = math.exp(fmean(negative_log_likelihood(p.tokens, x) for p, x in read))
            results[f"kl_{kind}"] = fmean(float(divergence(p.log_probs, x).mean()) for p, x in read)
            results[f"top1_{kind}"] = fmean(float(same_top1(p.log_probs, x).float().mean()) for p, x in read)
        return results


def draw(text: str, tokenizer: Any, samples: int, num_tokens: int, seed: int = 0) -> list[Tensor]:
    """Token ids (num_tokens,) of passages that begin at paragraphs, spread over the text and not overlapping."""
    random = Random(seed)
    stretch = len(text) // samples
    drawn = []
    for sample in range(samples):
        first = sample * stretch + random.randrange(stretch // 4 + 1)
        start = text.find("\n\n", first, first + stretch // 2)
        part = text[start + 2 if start >= 0 else first : (sample + 1) * stretch]
        ids = tokenizer(part[: 8 * num_tokens], add_special_tokens=False, verbose=False).input_ids[:num_tokens]
        drawn.append(torch.tensor(ids))
    return drawn


@torch.no_grad()
def predictions(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Log-probabilities (T, V) float32 after each token (T,)."""
    return model(tokens[None], use_cache=False).logits[0].float().log_softmax(-1)


def negative_log_likelihood(tokens: Tensor, log_probs: Tensor) -> float:
    """Nats per token, of all tokens but the first."""
    return -float(log_probs[range(len(tokens) - 1), tokens[1:]].mean())


def calibration_texts(tokenizer: Any, samples: int, num_tokens: int, seed: int = 0) -> Sequence[str]:
    """`samples` passages of `num_tokens`, half prose and half code, of texts that nothing is reported on."""
    texts = []
    for kind, count in zip(KINDS, (-(-samples // 2), samples // 2), strict=True):
        drawn = draw(passages(kind, "tune"), tokenizer, count, num_tokens, seed) if count else []
        texts += [tokenizer.decode(tokens) for tokens in drawn]
    return texts
