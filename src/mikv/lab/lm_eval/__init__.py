"""The model type `mikv` of lm-evaluation-harness: its tasks, with any cache, in `lm_eval --model mikv`.

The beginning of a request's context is read at once and exactly, as every cache reads a prompt. The last `probe` tokens
of the context and all tokens that are scored or generated are read through the cache under test, a few at a time.
"""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from mikv.cache.accounting import cache_bytes
from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import CacheGeometry
from mikv.errors import ConfigError
from mikv.lab.examination import Reader
from mikv.lab.lm_eval.options import check_counts, check_is_greedy, check_options, named_cache
from mikv.lab.recording import Recording, fill, record
from mikv.models import BUNDLED_MODEL, load_model

_log = logging.getLogger("lm_eval.mikv")  # its command shows what its own loggers say

_Key = tuple[str, str] | None
_Request = tuple[_Key, list[int], list[int]]  # its name in lm-eval's own cache, context, continuation
_Answer = tuple[float, bool]  # log-likelihood of a continuation, whether it is the likeliest at every token


@dataclass(frozen=True)
class Given:
    """The tokens of a request that are read, all but the last of its continuation.

    prompt   read at once
    rest     read through the cache
    """

    prompt: tuple[int, ...]
    rest: tuple[int, ...]


@dataclass(frozen=True)
class Heard:
    """What the model predicted while it read `rest`.

    log_probs  of each token of it
    likeliest  whether each was the likeliest
    next       (vocabulary,) log-probabilities of the token after it
    """

    log_probs: tuple[float, ...]
    likeliest: tuple[bool, ...]
    next: Tensor

    def answer(self, continuation: Sequence[int]) -> _Answer:
        """Of a continuation whose last token comes next and whose other tokens are the last ones read."""
        num_read, last = len(continuation) - 1, continuation[-1]
        start = len(self.log_probs) - num_read
        log_likelihood = sum(self.log_probs[start:]) + float(self.next[last])
        return log_likelihood, all(self.likeliest[start:]) and int(self.next.argmax()) == last


@dataclass(frozen=True)
class Usage:
    """What the cache held at the end of one request."""

    tokens: int
    bytes: int
    fp16_bytes: int


@register_model("mikv")
class MiKVLM(HFLM):  # type: ignore[misc, unused-ignore]
    """A causal language model of transformers that reads through the cache under test, one request at a time."""

    def __init__(
        self,
        pretrained: str = BUNDLED_MODEL,
        *,
        preset: str | None = None,
        config: str | None = None,
        cache: str | None = None,
        chunk: int = 32,
        probe: int = 32,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """Load the model that `load_model` knows as `pretrained`; `options` are those of HFLM in PASSED_ON.

        preset, config, cache  one of a preset's name, a .json file of MiKVConfig, any cache name; `balanced` if none
        chunk                  tokens that are read through the cache at a time, after the context's beginning
        probe                  tokens at the context's end that are read through the cache too
        """
        named = named_cache(preset, config, cache)
        check_counts(chunk, probe)
        check_options(batch_size, device, dtype, options)
        if why_not := named.unavailable():
            raise ConfigError(f"cache={named.name}: {why_not}")
        _log.info("cache %s, on the CPU", named.name)
        loaded = load_model(pretrained, dtype=None if dtype in (None, "auto") else getattr(torch, str(dtype)))
        super().__init__(loaded.model, tokenizer=loaded.tokenizer, batch_size=1, **options)
        named.make(loaded.model, self.max_length)  # refuses a model whose layers it cannot hold
        self._named, self._chunk, self._probe = named, chunk, probe
        self._geometry = CacheGeometry.from_model_config(loaded.model.config)
        self._usages: list[Usage] = []

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to the `config` of its results: the model, the cache and the bytes it took."""
        info = {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}
        return {**info, "kv_cache": self._cache_info()}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See LM. Greedy; raises ConfigError before the first request if one asks for anything else."""
        for request in requests:
            check_is_greedy(request.task_name, request.args[1])
        return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[_Answer]:
        """Answers in the order of the requests; also serves the windows of `loglikelihood_rolling`."""
        given = [self._given(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=lambda i: (-len(given[i].prompt), given[i].prompt, given[i].rest))
        answers: dict[int, _Answer] = {}
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or len(requests) == 1) as progress:
            for prompt, of_prompt in groupby(order, lambda i: given[i].prompt):
                recording = record(self.model, torch.tensor(prompt))
                for rest, same in groupby(of_prompt, lambda i: given[i].rest):
                    heard = self._hear(recording, rest)
                    for i in same:
                        key, _, continuation = requests[i]
                        answers[i] = heard.answer(continuation)
                        if key is not None:  # windows have none
                            self.cache_hook.add_partial("loglikelihood", key, answers[i])
                        progress.update()
        return [answers[i] for i in range(len(requests))]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Context (1, T) and what follows it, up to `max_length` tokens in all."""
        (tokens,) = context.tolist()
        prompt, rest = self._split(tokens, len(tokens))
        recording = record(self.model, torch.tensor(prompt))
        reader, cache = self._reader(recording, max_length)
        prediction = recording.log_probs
        for start in range(0, len(rest), self._chunk):
            prediction = reader.read(rest[start : start + self._chunk])[-1]
        answer = reader.generate(prediction, self._ends(), partial(self._is_complete, max_length - len(tokens), stop))
        self._note_usage(reader.num_read, self._named.bytes(cache))
        return torch.tensor([tokens + answer])

    def _given(self, context: list[int], continuation: list[int]) -> Given:
        """What is read; a context that is too long loses its beginning, as in HFLM."""
        tokens = (context + continuation)[-(self.max_length + 1) : -1]
        return Given(*self._split(tokens, len(tokens) + 1 - len(continuation)))

    def _split(self, tokens: list[int], num_context: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is read at once, at least one token, and what is read through the cache."""
        num_prompt = max(1, num_context - self._probe)
        return tuple(tokens[:num_prompt]), tuple(tokens[num_prompt:])

    def _hear(self, recording: Recording, rest: tuple[int, ...]) -> Heard:
        reader, cache = self._reader(recording, len(recording.tokens) + len(rest))
        prediction = recording.log_probs  # (V,)
        log_probs: list[float] = []
        likeliest: list[bool] = []
        for start in range(0, len(rest), self._chunk):
            piece = torch.tensor(rest[start : start + self._chunk])
            after = reader.read(piece.tolist())  # (N, V)
            before = torch.cat((prediction[None], after[:-1]))
            log_probs += before.gather(1, piece[:, None])[:, 0].tolist()
            likeliest += (before.argmax(1) == piece).tolist()
            prediction = after[-1]
        self._note_usage(reader.num_read, self._named.bytes(cache))
        return Heard(tuple(log_probs), tuple(likeliest), prediction)

    def _reader(self, recording: Recording, num_tokens: int) -> tuple[Reader, Any]:
        """The model with a new cache that has read the prompt and will hold `num_tokens`."""
        cache = fill(self._named.make(self.model, num_tokens), recording)
        return Reader(self.model, cache, len(recording.tokens)), cache

    def _is_complete(self, max_new_tokens: int, stop: list[str], answer: list[int]) -> bool:
        return len(answer) == max_new_tokens or any(end in self.tok_decode(answer) for end in stop)

    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return {*(ends if isinstance(ends, list) else [ends]), self.eot_token_id}

    def _note_usage(self, num_tokens: int, num_bytes: int) -> None:
        fp16_bytes = cache_bytes(MiKVConfig(), self._geometry, num_tokens).fp16_bytes
        self._usages.append(Usage(num_tokens, num_bytes, fp16_bytes))

    def _cache_info(self) -> dict[str, Any]:
        """The cache under test and means over all requests of what it held at their end; logged in one line."""
        info = {
            "name": self._named.name,
            "config": None if self._named.config is None else self._named.config.to_dict(),
            "chunk": self._chunk,
            "probe": self._probe,
        }
        if not self._usages:
            return info
        used = {
            "tokens": statistics.fmean(usage.tokens for usage in self._usages),
            "bytes_per_token": statistics.fmean(usage.bytes / usage.tokens for usage in self._usages),
            "ratio": statistics.fmean(usage.bytes / usage.fp16_bytes for usage in self._usages),
        }
        _log.info("cache %s: %.0f tokens, %.0f bytes per token, %.3f of fp16", self._named.name, *used.values())
        return info | used
