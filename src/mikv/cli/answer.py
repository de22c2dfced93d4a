"""One answer of a model: feeds what the cache lacks, hands out the text as it comes, and times both phases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from mikv.errors import ConfigError
from mikv.integrations.transformers import MiKVCache
from mikv.integrations.transformers.versions import as_argument
from mikv.models import LoadedModel


@dataclass(frozen=True)
class AnswerOptions:
    """How to answer. `on_text` gets the text piece by piece; the answer ends early once `stop` says so."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    on_text: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Answer:
    """What was generated; `token_ids` without the token that ends an answer, which was never fed to the cache."""

    token_ids: tuple[int, ...]
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens that were fed before the first new one, per second."""
        return self.num_prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first, per second; 0 if there is only one."""
        return (self.num_new_tokens - 1) / self.decode_seconds if self.num_new_tokens > 1 else 0.0


def answer(loaded: LoadedModel, token_ids: Sequence[int], cache: MiKVCache, options: AnswerOptions) -> Answer:
    """Continue `token_ids`, of which `cache` holds a beginning (possibly nothing).

    Raises ConfigError if there is nothing to continue.
    """
    if not token_ids:
        raise ConfigError("the prompt has no tokens")
    num_cached = cache.get_seq_length()
    streamer = _Streamer(loaded.tokenizer, options.on_text)
    input_ids = torch.tensor([list(token_ids)])
    start = perf_counter()
    output = loaded.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **as_argument(cache),
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([_Stop(options.stop)]),
        max_new_tokens=options.max_new_tokens,
        **_sampling(options.temperature),
    )
    new_ids = output[0, len(token_ids) :].tolist()
    num_new_tokens = len(new_ids)
    if new_ids and new_ids[-1] in _end_ids(loaded):
        new_ids.pop()
    return Answer(
        tuple(new_ids),
        loaded.tokenizer.decode(new_ids, skip_special_tokens=True),
        len(token_ids) - num_cached,
        num_new_tokens,
        streamer.first_token_at - start,
        streamer.last_token_at - streamer.first_token_at,
    )


def summary(answer: Answer, cache: MiKVCache) -> str:
    """One line: tokens, speed, bytes."""
    memory = cache.memory()
    exact = memory.tokens_by_tier.get("warm_up")
    note = f", still exact: the first {cache.config.warmup_tokens} tokens are not rounded" if exact else ""
    note += f" · {memory.note}" if memory.note else ""
    return (
        f"{answer.num_prompt_tokens:,} tokens read at {answer.prefill_tokens_per_second:,.0f}/s · "
        f"{answer.num_new_tokens:,} new at {answer.decode_tokens_per_second:.1f}/s · "
        f"cache {memory.bytes:,} bytes = {memory.ratio:.2f} of fp16{note}"
    )


def _sampling(temperature: float) -> dict[str, Any]:
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _end_ids(loaded: LoadedModel) -> set[int]:
    ends = loaded.model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


class _Streamer(TextStreamer):
    """Whole words to a callback; notes when tokens arrive."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.first_token_at = self.last_token_at = 0.0

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.last_token_at = perf_counter()
            self.first_token_at = self.first_token_at or self.last_token_at
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


class _Stop(StoppingCriteria):
    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._stop(), dtype=torch.bool, device=input_ids.device)
