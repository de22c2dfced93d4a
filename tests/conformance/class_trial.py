"""One model class against transformers' own cache: equal tokens, or a refusal by name, and never a model left changed.

A trial builds the class tiny, generates with transformers' own cache, and repeats that with a MiKVCache that is exact,
with one that rounds, and attached. After each of them the model must compute without a cache, bit for bit, what it
computed before.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.utils import ModelOutput

import mikv
from conformance.model_classes import prompt, tiny_model
from mikv import MiKVCache, MiKVConfig
from mikv.errors import MiKVError
from mikv.integrations.transformers.cache import MiKVLayer

NEW_TOKENS = 24
LENGTHS = ((90,), (100, 84))  # beyond the warm-up; one row, and two that are padded on the left
EXACT = MiKVConfig(importance_ratio=1, high="exact")
FINE = MiKVConfig(high="int8", low="int8")  # all parts of `balanced`, so fine that wrong arithmetic shows
BALANCED = MiKVConfig.preset("balanced")
# The rms of differences of logits, relative to their spread, for each configuration; wrong arithmetic is near 1.
NOISE = 2e-4  # other orders of float32 sums
FINE_ROUNDING, ROUNDING = 0.1, 0.7
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else (
    "past_key_values"
)


@dataclass
class Outcome:
    """What became of a class: `equal`, `refused`, `not built`, or one of `FAILURES`; `stages` say more."""

    name: str
    kind: str = "equal"
    detail: str = ""
    stages: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES


FAILURES = ("wrong", "left changed", "other exception", "refused late", "not ours")


class Failure(Exception):
    """A stage ended in one of FAILURES."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Recorder(LogitsProcessor):
    """Keeps the logits of every step, and forces `tokens` (B, steps) where there are some."""

    def __init__(self, tokens: Tensor | None = None) -> None:
        self.logits: list[Tensor] = []
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        if self.tokens is None:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.tokens[:, len(self.logits) - 1, None], 0.0)


@dataclass
class Generated:
    tokens: Tensor  # (B, new tokens)
    logits: Tensor  # (B, new tokens, vocabulary)
    cache: Any


class Subject:
    """A model and the inputs that it is asked with."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.inputs = [_inputs(model, lengths) for lengths in LENGTHS]
        self.real = [prompt(lengths)["attention_mask"].bool() for lengths in LENGTHS]
        self.attention = _attention_names(model)

    def plain(self) -> list[Tensor]:
        """Logits of a forward without any cache, for each of the inputs."""
        accepted = inspect.signature(self.model.forward).parameters
        results = []
        for inputs in self.inputs:
            settings = {"use_cache": False} if "use_cache" in accepted else {}
            torch.manual_seed(5)
            with torch.no_grad():
                results.append(self.model(**inputs, **settings).logits)
        return results

    def generate(self, which: int, recorder: Recorder, **options: Any) -> Generated:
        inputs = dict(self.inputs[which])
        start = (inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]).shape[1]
        torch.manual_seed(5)
        result = self.model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([recorder]),
            **options,
        )
        cache = getattr(result, "cache", None) if CACHE == "cache" else getattr(result, "past_key_values", None)
        return Generated(result.sequences[:, start:], torch.stack(recorder.logits, 1), cache)

    def restore(self) -> None:
        for config, name in self.attention:
            config._attn_implementation_internal = name


def _configs(model: PreTrainedModel) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation") and all(config is not c for c in found):
            found.append(config)
    for config in list(found):
        for name in getattr(config, "sub_configs", None) or {}:
            part = getattr(config, name, None)
            if part is not None and all(part is not c for c in found):
                found.append(part)
    return found


def _attention_names(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    return [(config, config._attn_implementation_internal) for config in _configs(model)]


def _inputs(model: PreTrainedModel, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    words = prompt(lengths)
    if not model.config.is_encoder_decoder:
        return words
    width = _encoder_width(model)
    states = torch.randn((len(lengths), 12, width), generator=torch.Generator().manual_seed(4))
    mask = torch.ones((len(lengths), 12), dtype=torch.long)
    return {
        "encoder_outputs": EncoderStates(states, attention_mask=mask),
        "attention_mask": mask,
        "decoder_input_ids": words["input_ids"],
        "decoder_attention_mask": words["attention_mask"],
    }


@dataclass
class EncoderStates(ModelOutput):
    """What encoders of all families return."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_mask: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


def _encoder_width(model: PreTrainedModel) -> int:
    config = model.config
    parts = [config.get_text_config(encoder=True), *(getattr(config, name, None) for name in ("encoder", "encoder_config"))]
    for part in (*parts, *(getattr(part, "text_config", None) for part in parts)):
        for name in ("d_model", "hidden_size"):
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
    raise ValueError("no width of the encoder")


def off_by(found: Tensor, expected: Tensor) -> float:
    """The rms of the difference of logits over their standard deviation."""
    finite = torch.isfinite(expected)
    if not torch.isfinite(found[finite]).all():
        return float("inf")
    difference = (found - expected)[finite].double()
    return float(difference.pow(2).mean().sqrt() / expected[finite].double().std().clamp_min(1e-12))


def try_class(name: str) -> Outcome:
    """The outcome of a class; never raises."""
    began = time.monotonic()
    outcome = Outcome(name)
    try:
        subject = Subject(tiny_model(name))
        before = subject.plain()
        same = all(torch.equal(a, b) for a, b in zip(subject.plain(), before, strict=True))
        reference = [subject.generate(which, Recorder()) for which in range(len(LENGTHS))]
        if not same:
            raise RuntimeError("two forwards without a cache differ already")
    except Exception as error:
        outcome.kind, outcome.detail = "not built", _first_line(error)
        outcome.seconds = time.monotonic() - began
        return outcome
    outcome.stages["reference"] = type(reference[0].cache).__name__
    for stage in (exact, rounded, attached):
        try:
            outcome.stages[stage.__name__] = _run(stage, subject, reference, before)
        except Failure as failure:
            outcome.stages[stage.__name__] = str(failure)
            if not outcome.failed:
                outcome.kind, outcome.detail = failure.kind, f"{stage.__name__}: {failure.detail}"
    if not outcome.failed:
        refusals = [text for text in outcome.stages.values() if text.startswith("refused")]
        if refusals:
            outcome.kind, outcome.detail = "refused", refusals[0].partition(": ")[2]
    outcome.seconds = time.monotonic() - began
    return outcome


Stage = Callable[[Subject, list[Generated]], str]


def _run(stage: Stage, subject: Subject, reference: list[Generated], before: list[Tensor]) -> str:
    """The stage's word, if the model is afterwards what it was."""
    refused = False
    problem: Failure | None = None
    text = ""
    try:
        text = stage(subject, reference)
    except MiKVError as error:
        refused, text = True, f"refused: {type(error).__name__}: {_first_line(error, typed=False)}"
    except Failure as failure:
        problem = failure
    except Exception as error:
        problem = Failure("other exception", _first_line(error))
    changed = _changes(subject, before, live=not refused and problem is None and stage is not attached)
    subject.restore()
    if problem is not None:
        if changed:
            problem.detail += f"; and left changed: {changed}"
        raise problem
    if changed:
        raise Failure("left changed", f"{changed}; after {text}")
    return text


def _changes(subject: Subject, before: list[Tensor], live: bool) -> str:
    """What is not as it was, or "". While a cache is in use (`live`), another sum in the same attention is allowed."""
    names = [f"{type(config).__name__} {old!r} -> {config._attn_implementation_internal!r}"
             for config, old in subject.attention if config._attn_implementation_internal != old]
    try:
        after = subject.plain()
    except Exception as error:
        return f"a plain forward raises {_first_line(error)} ({', '.join(names)})"
    off = max(off_by(a[real], b[real]) for a, b, real in zip(after, before, subject.real, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    if live:
        return f"a plain forward is off by {off:.2g} ({', '.join(names)})" if off > NOISE else ""
    if not same or names:
        return f"a plain forward is off by {off:.2g} ({', '.join(names)})"
    return ""


def exact(subject: Subject, reference: list[Generated]) -> str:
    """A MiKVCache that keeps everything exact gives transformers' tokens."""
    for which, expected in enumerate(reference):
        cache = MiKVCache(subject.model.config, EXACT)
        found = _cached(subject, which, expected, cache)
        _require_near(found, expected, NOISE)
        if differ := int((found.logits.argmax(-1) != expected.tokens).sum()):
            raise Failure("wrong", f"{differ} of {expected.tokens.numel()} tokens differ")
        num_layers = _require_filled(cache)
    return f"equal with {num_layers} layers of {len(cache.layers)}"


def rounded(subject: Subject, reference: list[Generated]) -> str:
    """A MiKVCache that rounds a little gives logits near transformers' when it is fed the same tokens."""
    worst = 0.0
    for which, expected in enumerate(reference):
        cache = MiKVCache(subject.model.config, FINE)
        found = _cached(subject, which, expected, cache)
        worst = max(worst, _require_near(found, expected, FINE_ROUNDING))
        _require_packed(cache)
    return f"near ({worst:.2g})"


def attached(subject: Subject, reference: list[Generated]) -> str:
    """Plain generate of an attached model uses a MiKVCache, and says nothing that is far from what it said before."""
    worst = 0.0
    with mikv.attach(subject.model, BALANCED):
        for which, expected in enumerate(reference):
            found = _cached(subject, which, expected, None)
            if not isinstance(found.cache, MiKVCache):
                raise Failure("not ours", f"generate used a {type(found.cache).__name__}")
            worst = max(worst, _require_near(found, expected, ROUNDING))
            _require_packed(found.cache)
    return f"near ({worst:.2g})"


def _cached(subject: Subject, which: int, expected: Generated, cache: MiKVCache | None) -> Generated:
    """`generate` fed the expected tokens."""
    recorder = Recorder(expected.tokens)
    options = {} if cache is None else {CACHE: cache}
    try:
        found = subject.generate(which, recorder, **options)
    except MiKVError as error:
        if recorder.logits:
            late = f"after {len(recorder.logits)} tokens: {type(error).__name__}: {_first_line(error, typed=False)}"
            raise Failure("refused late", late) from error
        raise
    if cache is not None and found.cache is not cache:
        raise Failure("not ours", f"generate used a {type(found.cache).__name__} and not the cache it was given")
    return found


def _require_near(found: Generated, expected: Generated, allowed: float) -> float:
    """How far off a row is at most, in the median of its steps; a first step that is no noise is wrong.

    In the median, since a mixture of experts jumps where a rounded key tips the choice of an expert.
    """
    first = off_by(found.logits[:, 0], expected.logits[:, 0])
    rows = zip(found.logits, expected.logits, strict=True)
    off = max(median([off_by(a, b) for a, b in zip(*row, strict=True)]) for row in rows)
    if allowed == NOISE:
        off = off_by(found.logits, expected.logits)
    if first > NOISE or off > allowed:
        raise Failure("wrong", f"off by {off:.2g}, in the first step after the prompt by {first:.2g}")
    return off


def _require_filled(cache: MiKVCache) -> int:
    """Every layer of ours holds all tokens; how many layers those are."""
    for layer in _compressed(cache):
        if layer.get_seq_length() < min(LENGTHS[0]) + NEW_TOKENS - 1:
            raise Failure("not ours", f"layer {layer.layer_idx} holds {layer.get_seq_length()} tokens")
    return len(_compressed(cache))


def _require_packed(cache: MiKVCache) -> None:
    _require_filled(cache)
    for layer in _compressed(cache):
        if not layer.tokens.tokens_by_tier()["low"]:
            raise Failure("not ours", f"layer {layer.layer_idx} has packed nothing: {layer.tokens.tokens_by_tier()}")


def _compressed(cache: MiKVCache) -> list[MiKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, MiKVLayer)]


def _first_line(error: BaseException, typed: bool = True) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if typed else text


__all__ = ["EncoderDecoderCache", "Outcome", "try_class"]
