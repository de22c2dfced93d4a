"""One sample through one cache after another: what the model answers, how far its predictions move, what it all takes.

The model reads the context once, exactly, for all caches. Everything after it is read through the cache under test, a
few tokens at a time, and answers are generated greedily, token by token.

Predictions are compared at *positions*: the tokens of questions, beginnings of answers and given replies, as long as
every token before was the same as with the full cache. So all positions of a sample count up to the first answer of the
model that differs from its answer with the full cache, and none after it; tokens of answers do not count themselves.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mikv.cache.geometry import CacheGeometry
from mikv.cache_names import NamedCache, parse_cache
from mikv.errors import MiKVError, NumericsError
from mikv.integrations.transformers.versions import as_argument
from mikv.lab.fidelity import divergence, same_top1
from mikv.lab.recording import fill, record
from mikv.lab.tasks.base import Sample, Turn
from mikv.lab.transcript import Transcript, is_answered, longest
from mikv.models import LoadedModel


@dataclass(frozen=True)
class Answer:
    """What the model answered to a turn, and its score if the turn has one."""

    text: str
    score: float | None
    label: str


@dataclass(frozen=True)
class SampleResult:
    """What one cache did with one sample.

    tokens          read into the cache by the end
    bytes           that the cache holds then
    fp16_bytes      of the full cache with as many tokens
    kl              divergence from the full cache at every position, nats
    agreements      positions at which the likeliest token is the same
    nll, full_nll   nats of all `predicted` given tokens together, through this cache and the full one
    decode_seconds  median of the steps of one token; None if there was none
    """

    answers: tuple[Answer, ...]
    tokens: int
    bytes: int
    fp16_bytes: int
    kl: tuple[float, ...]
    agreements: int
    nll: float
    full_nll: float
    predicted: int
    decode_seconds: float | None

    @property
    def score(self) -> float | None:
        """Mean over the answers that have one."""
        scores = [answer.score for answer in self.answers if answer.score is not None]
        return statistics.fmean(scores) if scores else None


@dataclass(frozen=True)
class Skipped:
    """Why a cache did nothing with a sample."""

    reason: str


class Examination:
    """A sample that the model has read with the full cache, whose answers and predictions are the reference.

    With another `reference`, an examination of the same sample, predictions are compared with those of its model.
    """

    def __init__(
        self, loaded: LoadedModel, sample: Sample, chunk: int = 32, reference: "Examination | None" = None
    ) -> None:
        """Read the context, and the rest with the full cache, `chunk` tokens at a time."""
        self._loaded, self._sample, self._chunk = loaded, sample, chunk
        self._geometry = CacheGeometry.from_model_config(loaded.model.config)
        self._num_tokens = longest(loaded.tokenizer, sample)
        context = Transcript(loaded.tokenizer, sample).context
        self._recording = record(loaded.model, torch.tensor(context, device=loaded.model.device))
        # all tokens so far, and log-probabilities of the newest
        self._pieces: list[tuple[list[int], Tensor]] = [] if reference is None else reference._pieces
        full = parse_cache("full")
        self.full = self._converse(full, full.make(loaded.model, self._num_tokens))

    def through(self, named: NamedCache) -> SampleResult | Skipped:
        """The same through another cache; what another library's code raises is a reason to skip it."""
        if named.name == "full":
            return self.full
        try:
            cache = named.make(self._loaded.model, self._num_tokens)
        except ValueError as error:  # such as ConfigError, or a backend that cannot divide this head dim into groups
            return Skipped(_one_line(error))
        try:
            return self._converse(named, cache)
        except MiKVError as error:
            return Skipped(_one_line(error))
        except Exception as error:
            if not named.is_foreign:
                raise
            return Skipped(f"{type(error).__name__} in another library: {_one_line(error)}")

    def _converse(self, named: NamedCache, cache: Cache) -> SampleResult:
        """All turns through `cache`, which is empty."""
        fill(cache, self._recording)
        transcript = Transcript(self._loaded.tokenizer, self._sample)
        reader = Reader(self._loaded.model, cache, transcript.num_context)
        distance = Distance()
        answers = []
        for number, turn in enumerate(transcript.turns()):
            prediction = self._read_piece(number, transcript.token_ids, reader, distance)
            if is_answered(turn):
                tokens = reader.generate(prediction, self._ends(), partial(transcript.is_complete, turn))
                answers.append(_scored(turn, transcript.add_answer(turn, tokens)))
        return self._result(tuple(answers), reader, named.bytes(cache), distance)

    def _read_piece(self, number: int, token_ids: Sequence[int], reader: "Reader", distance: "Distance") -> Tensor:
        """Read what is new in `token_ids`, the transcript so far; returns log-probabilities of the next token (V,)."""
        piece = list(token_ids[reader.num_read :])
        is_reference = number == len(self._pieces)
        full = None if is_reference else self._predictions(number, token_ids)
        read = []
        for start in range(0, len(piece), self._chunk):
            stop = start + self._chunk
            log_probs = reader.read(piece[start:stop])  # (N, V)
            if is_reference:
                read.append(log_probs)
                distance.add(log_probs, log_probs, piece[start + 1 : stop + 1])
            elif full is not None:
                distance.add(full[start:stop], log_probs, piece[start + 1 : stop + 1])
        if is_reference:
            self._pieces.append((list(token_ids), torch.cat(read)))
        return log_probs[-1]

    def _predictions(self, number: int, token_ids: Sequence[int]) -> Tensor | None:
        """With the full cache, for a piece (N, V), or None if it was read after other tokens than `token_ids`."""
        known, log_probs = self._pieces[number]
        return log_probs if known == token_ids else None

    def _result(self, answers: tuple[Answer, ...], reader: "Reader", num_bytes: int, d: "Distance") -> SampleResult:
        return SampleResult(
            answers=answers,
            tokens=reader.num_read,
            bytes=num_bytes,
            fp16_bytes=self._geometry.fp16_bytes(reader.num_read),
            kl=tuple(d.kl),
            agreements=d.agreements,
            nll=d.nll,
            full_nll=d.full_nll,
            predicted=d.predicted,
            decode_seconds=statistics.median(reader.step_seconds) if reader.step_seconds else None,
        )

    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self._loaded.model.generation_config.eos_token_id
        return {*(ends if isinstance(ends, list) else [ends]), self._loaded.tokenizer.eos_token_id}


class Reader:
    """A model that reads on through a cache that has read `num_read` tokens. `step_seconds` are of single tokens."""

    def __init__(self, model: PreTrainedModel, cache: Cache, num_read: int) -> None:
        self._model, self._cache = model, cache
        self.num_read = num_read
        self.step_seconds: list[float] = []

    @torch.no_grad()
    def read(self, token_ids: Sequence[int]) -> Tensor:
        """Feed tokens (N,); returns log-probabilities (N, vocabulary) float32 after each."""
        start = time.perf_counter()
        ids = torch.tensor([list(token_ids)], device=self._model.device)
        # said explicitly, because a cache that has dropped tokens may count fewer than were read
        positions = torch.arange(self.num_read, self.num_read + len(token_ids), device=ids.device)[None]
        log_probs = self._model(ids, position_ids=positions, **as_argument(self._cache)).logits[0].float()
        log_probs = log_probs.log_softmax(-1)
        if len(token_ids) == 1:
            self.step_seconds.append(time.perf_counter() - start)
        self.num_read += len(token_ids)
        if log_probs[-1].isnan().any():
            raise NumericsError(f"the model predicts NaN after {self.num_read:,} tokens")
        return log_probs

    def generate(self, prediction: Tensor, ends: set[int], is_complete: Callable[[list[int]], bool]) -> list[int]:
        """The likeliest tokens one by one, from the prediction (V,) of the first; the last of them is not read."""
        answer: list[int] = []
        while (token := int(prediction.argmax())) not in ends:
            answer.append(token)
            if is_complete(answer):
                break
            prediction = self.read([token])[-1]
        return answer


@dataclass
class Distance:
    """Sums over positions, see SampleResult."""

    kl: list[float] = field(default_factory=list)
    agreements: int = 0
    nll: float = 0.0
    full_nll: float = 0.0
    predicted: int = 0

    def add(self, full: Tensor, other: Tensor, following: Sequence[int]) -> None:
        """Positions with log-probabilities (N, V), and the given tokens that follow them, N or one fewer."""
        self.kl += divergence(full, other).tolist()
        self.agreements += int(same_top1(full, other).sum())
        rows, targets = range(len(following)), list(following)
        self.nll -= float(other[rows, targets].double().sum())
        self.full_nll -= float(full[rows, targets].double().sum())
        self.predicted += len(targets)


def _scored(turn: Turn, text: str) -> Answer:
    return Answer(text, None if turn.score is None else float(turn.score(text)), turn.label)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
