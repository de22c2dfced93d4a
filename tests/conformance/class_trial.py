"""One model class against transformers' own cache: equal, or refused by name, and never a model left changed.

A trial builds the class tiny, generates with transformers' own cache, and feeds the same tokens to a MiKVCache that is
exact, to one that rounds, and to the model attached. After each of them the model has to compute without a cache, bit
for bit, what it computed before. Knows nothing about which classes there are.
"""

import inspect
import io
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

import mikv
from conformance.model_classes import prompt, tiny_model
from mikv import MiKVCache, MiKVConfig
from mikv.errors import MiKVError
from mikv.integrations.transformers.cache import MiKVLayer

NEW_TOKENS = 24
LENGTHS = ((90,), (100, 84))  # beyond the warm-up; one row, and two of which one is padded on the left
EXACT = MiKVConfig(importance_ratio=1, high="exact")
FINE = MiKVConfig(high="int8", low="int8")  # all parts of `balanced`, so fine that wrong arithmetic shows
BALANCED = MiKVConfig.preset("balanced")
# How far logits may be off, as the rms of the difference over their spread; garbage is near 1.
NOISE = 2e-4  # other orders of float32 sums; they were 1e-6, and 0 where both are sdpa
FINE_ROUNDING = 0.15  # .11 was the worst of 190 classes
ROUNDING = 0.7  # .57 was the worst: random models have no attention that forgives
CPU_SECONDS = 60  # a class that takes longer has failed
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
FAILURES = ("wrong", "left changed", "other exception", "refused late", "misleading", "not ours")


@dataclass
class Outcome:
    """What became of a class: `equal`, `refused`, `not built` or one of FAILURES; `stages` says it per stage."""

    name: str
    kind: str = "equal"
    detail: str = ""
    stages: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES


class StageError(Exception):
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
    """What `generate` gave: tokens (B, T), logits (B, T, vocabulary), and the cache that it used."""

    tokens: Tensor
    logits: Tensor
    cache: Any


@dataclass
class EncoderStates(BaseModelOutput):
    """What encoders of all families return; decoders are tried without their encoders."""

    attention_mask: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class Subject:
    """A model, what it is asked, and what it was before anything of mikv."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.inputs = [_inputs(model, lengths) for lengths in LENGTHS]
        self.visible = [prompt(lengths)["attention_mask"].bool() for lengths in LENGTHS]
        self.attention = [(config, config._attn_implementation_internal) for config in _configurations(model)]
        self.plain = self.without_cache()
        if not all(map(torch.equal, self.plain, self.without_cache())):
            raise RuntimeError("two forwards without a cache differ already")
        self.reference = [self.generate(which, Recorder()) for which in range(len(LENGTHS))]
        self.has_cache = all(self._knows_caches(which) for which in range(len(LENGTHS)))

    def without_cache(self) -> list[Tensor]:
        """Logits (B, T, vocabulary) of a forward without any cache, for each of the inputs."""
        settings = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}
        results = []
        for inputs in self.inputs:
            torch.manual_seed(5)
            with torch.no_grad():
                results.append(self.model(**inputs, **settings).logits)
        return results

    def generate(self, which: int, recorder: Recorder, **options: Any) -> Generated:
        """Greedy decoding after prompt `which`."""
        inputs = dict(self.inputs[which])
        start = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        assert start is not None
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
        tokens = result.sequences[:, start.shape[1] :]
        return Generated(tokens, torch.stack(recorder.logits, 1), getattr(result, CACHE, None))

    def _knows_caches(self, which: int) -> bool:
        """Whether generate uses a cache of transformers, or one that it is given is right."""
        expected = self.reference[which]
        if isinstance(expected.cache, Cache):
            return True
        try:
            given = DynamicCache(config=self.model.config)
            found = self.generate(which, Recorder(expected.tokens), **{CACHE: given})
        except Exception:  # whatever the model says to a cache: it has none
            return False
        return found.cache is given and off_by(found.logits, expected.logits) <= NOISE

    def restore(self) -> None:
        """Undo by hand what was left, so that the next stage starts as the first did."""
        for config, name in self.attention:
            config._attn_implementation_internal = name

    def changes(self, live: bool) -> str:
        """What is not as it was, or "". While a cache is in use (`live`), other sums of the same attention are fine."""
        names = [
            f"{type(config).__name__} {old!r} -> {config._attn_implementation_internal!r}"
            for config, old in self.attention
            if config._attn_implementation_internal != old
        ]
        try:
            after = self.without_cache()
        except Exception as error:
            return f"a plain forward raises {first_line(error)} ({', '.join(names)})"
        off = max(off_by(a[seen], b[seen]) for a, b, seen in zip(after, self.plain, self.visible, strict=True))
        if off > NOISE if live else names or not all(map(torch.equal, after, self.plain)):
            return f"a plain forward is off by {off:.2g} ({', '.join(names)})"
        return ""


def try_class(name: str) -> Outcome:
    """The outcome of a class; raises nothing but KeyboardInterrupt."""
    began, outcome = time.monotonic(), Outcome(name)
    with _quietly(), _limited(CPU_SECONDS):
        try:
            subject = Subject(tiny_model(name))
        except Exception as error:
            outcome.kind, outcome.detail = "not built", first_line(error)
        else:
            _run_stages(subject, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def _run_stages(subject: Subject, outcome: Outcome) -> None:
    outcome.stages["reference"] = type(subject.reference[0].cache).__name__
    for stage in (exact, rounded, attached) if subject.has_cache else (attached,):
        try:
            outcome.stages[stage.__name__] = _run(stage, subject)
        except StageError as failure:
            outcome.stages[stage.__name__] = str(failure)
            if not outcome.failed:
                outcome.kind, outcome.detail = failure.kind, f"{stage.__name__}: {failure.detail}"
    refusals = [text for text in outcome.stages.values() if text.startswith("refused: ")]
    if refusals and not outcome.failed:
        outcome.kind, outcome.detail = "refused", refusals[0].removeprefix("refused: ")


def _run(stage: Callable[[Subject], str], subject: Subject) -> str:
    """The stage's own word for it; StageError if it failed or left the model changed."""
    problem, text = None, ""
    try:
        text = stage(subject)
    except MiKVError as error:
        text = f"refused: {first_line(error)}"
        if "attn_implementation='mikv'" in text:  # this is a model that would then compute wrong
            problem = StageError("misleading", first_line(error))
    except StageError as failure:
        problem = failure
    except Exception as error:
        problem = StageError("other exception", first_line(error))
    in_use = stage is not attached and problem is None and not text.startswith("refused: ")
    changed = subject.changes(live=in_use)
    subject.restore()
    if changed:
        raise StageError("left changed", f"{changed}; after {problem or text}")
    if problem is not None:
        raise problem
    return text


def exact(subject: Subject) -> str:
    """A MiKVCache that keeps everything exact gives transformers' tokens."""
    for which, expected in enumerate(subject.reference):
        cache = MiKVCache(subject.model.config, EXACT)
        found = _fed(subject, which, cache)
        _require_near(found, expected, NOISE)
        if differ := int((found.logits.argmax(-1) != expected.logits.argmax(-1)).sum()):
            raise StageError("wrong", f"{differ} of {expected.tokens.numel()} tokens differ")
        num_layers = len(_filled_layers(cache))
    return f"equal, {num_layers} layers of {len(cache.layers)}"


def rounded(subject: Subject) -> str:
    """A MiKVCache that rounds a little gives logits near transformers'."""
    worst = 0.0
    for which, expected in enumerate(subject.reference):
        cache = MiKVCache(subject.model.config, FINE)
        worst = max(worst, _require_near(_fed(subject, which, cache), expected, FINE_ROUNDING))
        _require_packed(cache)
    return f"off by {worst:.2g}"


def attached(subject: Subject) -> str:
    """Plain generate of an attached model uses a MiKVCache, and one with the default settings is not far off."""
    worst = 0.0
    with mikv.attach(subject.model, BALANCED):
        for which, expected in enumerate(subject.reference):
            found = _fed(subject, which, None)
            if not isinstance(found.cache, MiKVCache):
                raise StageError("not ours", f"generate used a {type(found.cache).__name__}")
            worst = max(worst, _require_near(found, expected, ROUNDING))
            _require_packed(found.cache)
    return f"off by {worst:.2g}"


def _fed(subject: Subject, which: int, cache: MiKVCache | None) -> Generated:
    """`generate` with `cache`, fed the tokens that transformers' cache gave. StageError if it refuses half way."""
    recorder = Recorder(subject.reference[which].tokens)
    try:
        found = subject.generate(which, recorder, **({} if cache is None else {CACHE: cache}))
    except MiKVError as error:
        if recorder.logits:
            raise StageError("refused late", f"after {len(recorder.logits)} tokens: {first_line(error)}") from error
        raise
    if cache is not None and found.cache is not cache:
        raise StageError(
            "not ours", f"generate used a {type(found.cache).__name__} and not the cache that it was given"
        )
    return found


def _require_near(found: Generated, expected: Generated, allowed: float) -> float:
    """How far a row is off in the median of its steps, since mixtures of experts jump where a key tips a choice.

    StageError if that is more than `allowed`, or if the first step after the prompt, which is exact, is off at all.
    """
    first = off_by(found.logits[:, 0], expected.logits[:, 0])
    rows = zip(found.logits, expected.logits, strict=True)
    off = max(median(off_by(a, b) for a, b in zip(*row, strict=True)) for row in rows)
    if first > NOISE or off > allowed:
        raise StageError("wrong", f"off by {off:.2g}, in the first step after the prompt by {first:.2g}")
    return off


def _filled_layers(cache: MiKVCache) -> list[MiKVLayer]:
    """The layers that are compressed. StageError if one does not hold the tokens."""
    ours = [layer for layer in cache.layers if isinstance(layer, MiKVLayer)]
    for layer in ours:
        if layer.get_seq_length() < LENGTHS[0][0] + NEW_TOKENS - 1:
            raise StageError(
                "not ours", f"layer {layer.layer_idx} holds {layer.get_seq_length()} tokens after generate"
            )
    return ours


def _require_packed(cache: MiKVCache) -> None:
    for layer in _filled_layers(cache):
        if not layer.tokens.tokens_by_tier()["low"]:
            raise StageError("not ours", f"layer {layer.layer_idx} has packed nothing: {layer.tokens.tokens_by_tier()}")


def off_by(found: Tensor, expected: Tensor) -> float:
    """The rms of the difference of logits over their standard deviation."""
    finite = torch.isfinite(expected)
    if not torch.isfinite(found[finite]).all():
        return float("inf")
    difference = (found - expected)[finite].double()
    return float(difference.pow(2).mean().sqrt() / expected[finite].double().std().clamp_min(1e-12))


def first_line(error: BaseException) -> str:
    """The error's type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _inputs(model: PreTrainedModel, lengths: tuple[int, ...]) -> dict[str, Any]:
    """The prompt; for an encoder-decoder as the decoder's, with random states for an encoder's."""
    words = prompt(lengths)
    if not model.config.is_encoder_decoder:
        return words
    generator = torch.Generator().manual_seed(4)
    states = torch.randn((len(lengths), 12, _encoder_width(model)), generator=generator)
    mask = torch.ones((len(lengths), 12), dtype=torch.long)
    return {
        "encoder_outputs": EncoderStates(last_hidden_state=states, attention_mask=mask),
        "attention_mask": mask,
        "decoder_input_ids": words["input_ids"],
        "decoder_attention_mask": words["attention_mask"],
    }


def _encoder_width(model: PreTrainedModel) -> int:
    outer = model.config
    parts = [outer.get_text_config(encoder=True), getattr(outer, "encoder", None)]
    for part in (*parts, *(getattr(part, "text_config", None) for part in parts)):
        for name in ("d_model", "hidden_size"):
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
    raise ValueError("how wide the encoder's states are is not known")


def _configurations(model: PreTrainedModel) -> list[Any]:
    """Every configuration object that a part of the model may read its attention from."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})
            for part in (config, *parts):
                if hasattr(part, "_attn_implementation_internal"):
                    found[id(part)] = part
    return list(found.values())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the advice that transformers logs, warns of and prints on tiny models."""
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity(logging.CRITICAL)
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            transformers.logging.set_verbosity(verbosity)


@contextmanager
def _limited(cpu_seconds: float) -> Iterator[None]:
    """TimeoutError after so much processor time of this process."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {cpu_seconds:g} s")

    former = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
