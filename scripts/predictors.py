"""Which practical score picks the tokens of the high tier best, and how far is it from an oracle?

Each model reads 1,024 tokens of a text exactly once. Every predictor scores those tokens per layer and KV head from
what the prompt showed (oracles: from the 128 tokens that follow); the real cache is partitioned by the scores, and the
128 tokens are read through it, 32 at a time, with demotion held, so that nothing but the choice differs. One record per
model, text, setting, recent window and predictor goes to docs/results/predictors.jsonl; finished ones are not repeated.
docs/results/predictors.md is made from the records.

    python scripts/predictors.py                             the bundled model, every predictor
    python scripts/predictors.py --model FOLDER --only gain --setting "4/K2V2 r .2" --texts 1
    python scripts/predictors.py --report                    only the page

G KV heads, R query heads of each, T prompt tokens, F tokens that follow, D head dim. Scores are (G, T), higher is
more important. Knows nothing about how a policy would gather its statistics while decoding.
"""

import argparse
import inspect
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from pydoc_data import topics
from typing import Any, ClassVar

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mikv import MiKVCache, MiKVConfig
from mikv.cache.formats import layer_formats
from mikv.cache.packed import fit_transforms
from mikv.cache.policies.base import ImportancePolicy, no_attention
from mikv.cache.policies.random import Random
from mikv.cache.warm_up import WarmUp
from mikv.lab.fidelity import Reading, compare, read_on
from mikv.lab.recording import LayerPrompt, Recording, fill, record
from mikv.models import load_model
from mikv.transforms import KeyTransform, ValueTransform

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RECORDS, PAGE = RESULTS / "predictors.jsonl", RESULTS / "predictors.md"
PROMPT_TOKENS, READ_TOKENS, CHUNK = 1024, 128, 32
SETTINGS = {
    "4/K2V2 r .2": MiKVConfig(importance_ratio=0.2, high="int4", low_k="int2", low_v="int2"),
    "4/K3V2 r .2": MiKVConfig(importance_ratio=0.2, high="int4", low_k="int3", low_v="int2"),
    "8/K4V3 r .08": MiKVConfig(importance_ratio=0.08, high="int8", low_k="int4", low_v="int3"),
    "8/K4V4 r .2": MiKVConfig(importance_ratio=0.2, high="int8", low_k="int4", low_v="int4"),
}
RECENT = {"half": 0.5, "32": 0.0}  # share of the high tier that is recent; at least 32 tokens are
FAR = 32  # tokens: what every high tier holds anyway
AHEAD = 64  # tokens: the middle of what follows
BASELINE, ORACLE = "normalized", "oracle gain"


def texts() -> dict[str, str]:
    """Text that is on every machine with Python: two parts of its language reference, and a module's source."""
    prose = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return {
        "reference-1": prose[20_000:40_000],
        "reference-2": prose[200_000:220_000],
        "source": inspect.getsource(argparse)[4000:],
    }


@dataclass(frozen=True)
class Noise:
    """What one tier's formats do to the prompt: errors of keys in the transformed basis and of values, (G, T, D)."""

    keys: Tensor
    values: Tensor


class Evidence:
    """What one layer showed while it read the prompt, and, for oracles, the tokens that follow."""

    def __init__(self, prompt: LayerPrompt, token_ids: Tensor, config: MiKVConfig, rope_theta: float) -> None:
        num_heads = prompt.keys.shape[1]
        self.scale, self.rope_theta = prompt.options.scale, rope_theta
        self.token_ids = token_ids[:PROMPT_TOKENS]
        queries = prompt.queries[0].unflatten(0, (num_heads, -1)).float()  # (G, R, T + F, D)
        self.queries, self.future_queries = queries[:, :, :PROMPT_TOKENS], queries[:, :, PROMPT_TOKENS:]
        self.all_keys = prompt.keys[0].float()
        self.keys = self.all_keys[:, :PROMPT_TOKENS]  # (G, T, D)
        self.values = prompt.values[0, :, :PROMPT_TOKENS].float()
        self.all_values = prompt.values[0].float()
        self.config = config

    @cached_property
    def attention(self) -> Tensor:
        """(G, R, T, T)."""
        return self.softmax(self.queries, self.keys, 0)

    @cached_property
    def future_attention_to_all(self) -> Tensor:
        """(G, R, F, T + F)."""
        return self.softmax(self.future_queries, self.all_keys, PROMPT_TOKENS)

    @property
    def future_attention(self) -> Tensor:
        """(G, R, F, T)."""
        return self.future_attention_to_all[..., :PROMPT_TOKENS]

    def softmax(self, queries: Tensor, keys: Tensor, first: int) -> Tensor:
        logits = queries @ keys[:, None].mT * self.scale
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(first + 1)
        return logits.masked_fill_(hidden, -torch.inf).softmax(-1)

    def moved(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Queries (G, R, N, D) of `positions` (N,), rotated as if they were asked AHEAD tokens after the prompt."""
        half = queries.shape[-1] // 2
        frequency = self.rope_theta ** (-torch.arange(half) / half)
        angle = (PROMPT_TOKENS + AHEAD - positions)[:, None] * frequency  # (N, D / 2)
        first, second = queries.split(half, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    @cached_property
    def moved_queries(self) -> Tensor:
        """Every fourth query of the prompt, asked again after it: (G, R, T / 4, D)."""
        chosen = torch.arange(3, PROMPT_TOKENS, 4)
        return self.moved(self.queries[:, :, chosen], chosen)

    @cached_property
    def replayed_attention(self) -> Tensor:
        """(G, R, T / 4, T)."""
        return (self.moved_queries @ self.keys[:, None].mT * self.scale).softmax(-1)

    @cached_property
    def transforms(self) -> tuple[KeyTransform, ValueTransform]:
        """As the cache would fit them."""
        warm_up = WarmUp(self.config, Scored(torch.empty(0)), self.keys[None])
        warm_up.tokens.append(self.keys[None], self.values[None])
        warm_up.query_max = self.queries.abs().amax((1, 2))[None]
        keys, values = fit_transforms(warm_up, torch.ones(1, PROMPT_TOKENS, dtype=torch.bool))
        return keys.of_row(0), values.of_row(0)

    @cached_property
    def noise(self) -> dict[str, Noise]:
        """Of the `high` and the `low` tier."""
        formats = layer_formats(self.config, self.keys.shape[-1], self.keys.dtype)
        assert formats.low is not None
        keys, values = (t.encode(x) for t, x in zip(self.transforms, (self.keys, self.values), strict=True))
        made = {}
        for name, (key_format, value_format) in {"high": formats.high, "low": formats.low}.items():
            made[name] = Noise(
                key_format.dequantize(key_format.quantize(keys)) - keys,
                value_format.dequantize(value_format.quantize(values)) - values,
            )
        return made

    def damage(self, queries: Tensor, attention: Tensor, values: Tensor) -> Tensor:
        """How much more a token's low form than its high form moves the output of each query: (G, R, N, T) squared.

        The output is o = sum_t p_t v_t; an error e_t = q.dk_t of a logit moves it by p_t e_t (v_t - o), an error dv_t
        of a value by p_t dv_t. `values` are those of all tokens that `attention` (G, R, N, any) sees.
        """
        outputs = attention @ values[:, None]
        distance = (
            outputs.square().sum(-1, keepdim=True)
            - 2 * outputs @ self.values[:, None].mT
            + self.values.square().sum(-1)[:, None, None]
        )
        asked = self.transforms[0].query(queries.flatten(1, 2)).view_as(queries) * self.scale
        low, high = self.noise["low"], self.noise["high"]
        logit_error = (asked @ low.keys[:, None].mT).square() - (asked @ high.keys[:, None].mT).square()
        value_error = low.values.square().sum(-1) - high.values.square().sum(-1)
        return attention[..., :PROMPT_TOKENS].square() * (logit_error * distance + value_error[:, None, None])

    @cached_property
    def received(self) -> Tensor:
        """Attention, sum over the group: (G, T, T)."""
        return self.attention.sum(1)

    @cached_property
    def squares(self) -> Tensor:
        """Squared attention, sum over the group: (G, T, T)."""
        return self.attention.square().sum(1)

    @cached_property
    def fragility(self) -> Tensor:
        """What the damage is to squared attention if every query is like the mean one: (G, T).

        Of the second moment of the prompt's queries, the errors of a token, and its value's distance to the mean.
        """
        asked = self.transforms[0].query(self.queries.flatten(1, 2)) * self.scale  # (G, R * T, D)
        moment = asked.mT @ asked / asked.shape[1]
        low, high = self.noise["low"], self.noise["high"]
        logit_error = ((low.keys @ moment) * low.keys).sum(-1) - ((high.keys @ moment) * high.keys).sum(-1)
        value_error = low.values.square().sum(-1) - high.values.square().sum(-1)
        return logit_error.clamp_min(0) * centred(self.values).square().sum(-1) + value_error.clamp_min(0)

    @cached_property
    def prompt_damage(self) -> Tensor:
        """Damage, sum over the group: (G, T, T)."""
        return self.damage(self.queries, self.attention, self.values).sum(1)

    @cached_property
    def replayed_damage(self) -> Tensor:
        """Damage to the replayed queries, sum over the group: (G, T / 4, T)."""
        return self.damage(self.moved_queries, self.replayed_attention, self.values).sum(1)

    def mean_output(self) -> Tensor:
        """Mean squared output (G, 1): what makes the damage of layers comparable."""
        return (self.attention[:, :, -256:] @ self.values[:, None]).square().sum(-1).mean((1, 2))[:, None]


def seen_mean(x: Tensor, weight: Tensor | None = None, distance: int = 0) -> Tensor:
    """x (G, T, T), mean over the queries at least `distance` after a token, by `weight` (T,): (G, T)."""
    weight = torch.ones(x.shape[1]) if weight is None else weight
    counted = torch.ones(x.shape[1:]).tril(-distance) * weight[:, None]  # (T, T)
    return (x * counted).sum(1) / counted.sum(0).clamp_min(1e-6)


def last(num_queries: int) -> Tensor:
    return (torch.arange(PROMPT_TOKENS) >= PROMPT_TOKENS - num_queries).float()


def half_life(num_queries: int) -> Tensor:
    return 0.5 ** (torch.arange(PROMPT_TOKENS).flip(0) / num_queries)


def pooled(scores: Tensor, size: int) -> Tensor:
    return torch.nn.functional.max_pool1d(scores, size, stride=1, padding=size // 2)


def smoothed(scores: Tensor, size: int) -> Tensor:
    return torch.nn.functional.avg_pool1d(scores, size, stride=1, padding=size // 2, count_include_pad=False)


def earlier_blocks(x: Tensor, size: int) -> Tensor:
    """What a token (G, T, T) got from each query of later blocks of `size`, mean: far attention without a kernel."""
    block = torch.arange(PROMPT_TOKENS) // size
    counted = (block[:, None] > block).float()
    return (x * counted).sum(1) / counted.sum(0).clamp_min(1)


def far(e: Evidence) -> Tensor:
    """Attention of the group from at least FAR tokens after, else 0: (G, T, T)."""
    return e.received.tril(-FAR)


def top(x: Tensor, count: int) -> Tensor:
    """The sum of the `count` largest of what a token (G, T, T) got."""
    return x.mT.contiguous().topk(count).values.sum(-1)


def like_the_last(e: Evidence) -> Tensor:
    """Attention weighted by how much its query resembles the last 32 ones."""
    every = torch.arange(PROMPT_TOKENS)
    queries = e.moved(e.queries, every)
    queries = torch.nn.functional.normalize(queries - queries.mean(2, keepdim=True), dim=-1)
    recent = torch.nn.functional.normalize(queries[:, :, -32:].mean(2, keepdim=True), dim=-1)
    weight = ((queries * recent).sum(-1) / 0.2).exp()  # (G, R, T)
    visible = torch.ones(PROMPT_TOKENS, PROMPT_TOKENS).tril()
    return ((weight[..., None, :] @ e.attention)[:, :, 0] / (weight @ visible)).sum(1)


def gaussian(e: Evidence) -> Tensor:
    """log E exp(q.k) for queries of the prompt's mean and covariance, asked after it; the heads' shares added up."""
    queries = e.moved_queries * e.scale
    mean = queries.mean(2, keepdim=True)
    centred = queries - mean
    covariance = centred.mT @ centred / queries.shape[2]
    keys = e.keys[:, None]
    logit = (mean @ keys.mT)[:, :, 0] + ((keys @ covariance) * keys).sum(-1) / 2  # (G, R, T)
    return logit.softmax(-1).sum(1)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def value_distance(e: Evidence) -> Tensor:
    return centred(e.values).norm(dim=-1)


def key_distance(e: Evidence) -> Tensor:
    return e.transforms[0].encode(e.keys).norm(dim=-1)


def low_density(e: Evidence) -> Tensor:
    """Few keys look alike."""
    keys = torch.nn.functional.normalize(e.transforms[0].encode(e.keys), dim=-1)
    return -(keys @ keys.mT).topk(17, dim=-1).values[..., 1:].mean(-1)


def repeats(e: Evidence) -> Tensor:
    """How often the token's word occurs in the prompt, up to 8; ties are broken by attention."""
    count = (e.token_ids[:, None] == e.token_ids).sum(0).clamp_max(8)
    return count + ranks(seen_mean(e.received)) * 0.5


def ranks(scores: Tensor) -> Tensor:
    """0 to 1 along the last dimension."""
    return scores.argsort(-1).argsort(-1).float() / (scores.shape[-1] - 1)


Predictor = Callable[[Evidence], Tensor]
PREDICTORS: dict[str, Predictor] = {
    "normalized": lambda e: seen_mean(e.received),
    "h2o": lambda e: e.received.sum(1),
    "random": lambda e: Random().priority(e.keys, torch.arange(PROMPT_TOKENS), PROMPT_TOKENS).expand(len(e.keys), -1),
    "window 32": lambda e: seen_mean(e.received, last(32)),
    "window 32, pool 7": lambda e: pooled(seen_mean(e.received, last(32)), 7),
    "window 128": lambda e: seen_mean(e.received, last(128)),
    "window 128, pool 7": lambda e: pooled(seen_mean(e.received, last(128)), 7),
    "normalized, smooth 5": lambda e: smoothed(seen_mean(e.received), 5),
    "half life 32": lambda e: seen_mean(e.received, half_life(32)),
    "half life 128": lambda e: seen_mean(e.received, half_life(128)),
    "half life 512": lambda e: seen_mean(e.received, half_life(512)),
    "far mean": lambda e: seen_mean(e.received, distance=FAR),
    "far max": lambda e: far(e).amax(1),
    "far top 8": lambda e: top(far(e), 8),
    "far max, last 256": lambda e: far(e)[:, -256:].amax(1),
    "far top 32": lambda e: top(far(e), 32),
    "group max": lambda e: torch.stack([seen_mean(x) for x in e.attention.unbind(1)]).amax(0),
    "far sum": lambda e: far(e).sum(1),
    "far sum, 8 tokens": lambda e: e.received.tril(-8).sum(1),
    "far sum, 128 tokens": lambda e: e.received.tril(-128).sum(1),
    "far sum, every 4th query": lambda e: far(e)[:, 3::4].sum(1),
    "far sum by root of age": lambda e: far(e).sum(1) / torch.arange(PROMPT_TOKENS, 0, -1).sqrt(),
    "far sum and key distance": lambda e: far(e).sum(1) * key_distance(e),
    "sum by root of age": lambda e: e.received.sum(1) / torch.arange(PROMPT_TOKENS, 0, -1).sqrt(),
    "squares, sum": lambda e: e.squares.sum(1),
    "squares, far sum": lambda e: e.squares.tril(-FAR).sum(1),
    "squares, far top 8": lambda e: top(e.squares.tril(-FAR), 8),
    "cubes, far sum": lambda e: e.attention.pow(3).sum(1).tril(-FAR).sum(1),
    "gain, sum": lambda e: e.prompt_damage.sum(1),
    "gain, far sum": lambda e: e.prompt_damage.tril(-FAR).sum(1),
    "gain, far top 8": lambda e: top(e.prompt_damage.tril(-FAR), 8),
    "normalized x fragility": lambda e: seen_mean(e.received) * e.fragility.sqrt(),
    "far mean x fragility": lambda e: seen_mean(e.received, distance=FAR) * e.fragility.sqrt(),
    "later blocks of 128": lambda e: earlier_blocks(e.received, 128),
    "later blocks of 128 x fragility": lambda e: earlier_blocks(e.received, 128) * e.fragility.sqrt(),
    "squared sums, far x fragility": lambda e: seen_mean(e.received.square(), distance=FAR) * e.fragility,
    "far mean x key distance": lambda e: seen_mean(e.received, distance=FAR) * key_distance(e),
    "far mean x norms": lambda e: seen_mean(e.received, distance=FAR) * key_distance(e) * value_distance(e),
    "normalized x norms": lambda e: seen_mean(e.received) * key_distance(e) * value_distance(e),
    "later blocks of 128 x norms": lambda e: earlier_blocks(e.received, 128) * key_distance(e) * value_distance(e),
    "squares, far x norms": lambda e: (
        seen_mean(e.squares, distance=FAR) * (key_distance(e) * value_distance(e)).square()
    ),
    "squares, later blocks of 128 x fragility": lambda e: earlier_blocks(e.squares, 128) * e.fragility,
    "h2o x fragility": lambda e: e.received.sum(1) * e.fragility.sqrt(),
    "far max x fragility": lambda e: far(e).amax(1) * e.fragility.sqrt(),
    "far top 8 x fragility": lambda e: top(far(e), 8) * e.fragility.sqrt(),
    "squares, far x fragility": lambda e: seen_mean(e.squares, distance=FAR) * e.fragility,
    "squares, far sum x fragility": lambda e: e.squares.tril(-FAR).sum(1) * e.fragility,
    "replay, squares x fragility": lambda e: e.replayed_attention.square().sum((1, 2)) * e.fragility,
    "fragility": lambda e: e.fragility,
    "replay, top 8": lambda e: top(e.replayed_attention.sum(1), 8),
    "replay, gain top 8": lambda e: top(e.replayed_damage, 8),
    "gain, far and replayed": lambda e: seen_mean(e.prompt_damage, distance=FAR) + e.replayed_damage.mean(1),
    "gain, far sum and replayed": lambda e: e.prompt_damage.tril(-FAR).sum(1) + 4 * e.replayed_damage.sum(1),
    "squares": lambda e: seen_mean(e.squares),
    "squares, far": lambda e: seen_mean(e.squares, distance=FAR),
    "squares, window 128": lambda e: seen_mean(e.squares, last(128)),
    "squares, half life 128": lambda e: seen_mean(e.squares, half_life(128)),
    "squares, half life 512": lambda e: seen_mean(e.squares, half_life(512)),
    "sharper": lambda e: seen_mean(e.softmax(2 * e.queries, e.keys, 0).sum(1)),
    "roots": lambda e: seen_mean(e.attention.sqrt().sum(1)),
    "gain": lambda e: seen_mean(e.prompt_damage),
    "gain, far": lambda e: seen_mean(e.prompt_damage, distance=FAR),
    "gain, half life 512": lambda e: seen_mean(e.prompt_damage, half_life(512)),
    "gain, window 128": lambda e: seen_mean(e.prompt_damage, last(128)),
    "noise": lambda e: e.noise["low"].keys.norm(dim=-1),
    "normalized x noise": lambda e: seen_mean(e.received) * e.noise["low"].keys.norm(dim=-1),
    "normalized x value distance": lambda e: seen_mean(e.received) * value_distance(e),
    "normalized x key distance": lambda e: seen_mean(e.received) * key_distance(e),
    "replay": lambda e: e.replayed_attention.sum((1, 2)),
    "replay, last 256": lambda e: e.replayed_attention[:, :, -64:].sum((1, 2)),
    "replay, last 64": lambda e: e.replayed_attention[:, :, -16:].sum((1, 2)),
    "replay, squares": lambda e: e.replayed_attention.square().sum((1, 2)),
    "replay, gain": lambda e: e.replayed_damage.sum(1),
    "gaussian": gaussian,
    "like the last": like_the_last,
    "key distance": key_distance,
    "low density": low_density,
    "repeats": repeats,
    "oracle mean": lambda e: e.future_attention.sum((1, 2)),
    "oracle squares": lambda e: e.future_attention.square().sum((1, 2)),
    "oracle gain": lambda e: e.damage(e.future_queries, e.future_attention_to_all, e.all_values).sum((1, 2)),
}

# Mean ranks of several scores.
COMBINED: dict[str, tuple[str, ...]] = {
    "normalized + far max": ("normalized", "far max"),
    "normalized + replay": ("normalized", "replay"),
    "normalized + repeats": ("normalized", "repeats"),
    "gain + replay, gain": ("gain", "replay, gain"),
    "gain, far + replay, gain": ("gain, far", "replay, gain"),
    "gain, far sum + replay, gain": ("gain, far sum", "replay, gain"),
    "gain, far top 8 + replay, gain": ("gain, far top 8", "replay, gain"),
    "far top 8 + replay, gain": ("far top 8", "replay, gain"),
    "far top 8 + replay": ("far top 8", "replay"),
    "six ranks": ("normalized", "squares", "far max", "replay", "half life 128", "gain"),
}
# The rank in a head and the mean rank over the heads of the layer, or of the model.
SHARED: dict[str, tuple[str, tuple[int, ...]]] = {
    "normalized + its layer": ("normalized", (1,)),
    "normalized + its model": ("normalized", (0, 1)),
    "gain, far + its layer": ("gain, far", (1,)),
}
# Scores whose sizes decide how many high tokens each layer gets; the choice within a layer is by the same score.
BUDGETED = {"gain, per-layer budget": "relative gain", "oracle gain, per-layer budget": "relative oracle gain"}
PARTS: dict[str, Predictor] = {
    "relative gain": lambda e: PREDICTORS["gain"](e) / e.mean_output(),
    "relative oracle gain": lambda e: PREDICTORS["oracle gain"](e) / e.mean_output(),
    "value distance": value_distance,
}
LEARNED = ("learned on the other model", "learned on the other texts")
FEATURES = (
    "normalized",
    "window 32",
    "far mean",
    "far max",
    "far sum",
    "squares, far",
    "gain, far",
    "replay, gain",
    "value distance",
    "key distance",
)


class Learned:
    """A linear model of the log of an oracle's gain on the logs of FEATURES, the same for every layer and head."""

    def __init__(self, examples: list[dict[str, Tensor]]) -> None:
        features = torch.cat([self.features(scores).flatten(0, 2) for scores in examples])
        targets = torch.cat([self.standard(scores[ORACLE]).flatten() for scores in examples])
        gram = features.mT @ features + 1e-3 * len(features) * torch.eye(features.shape[1])
        self.weights = torch.linalg.solve(gram, features.mT @ targets)

    @staticmethod
    def standard(scores: Tensor) -> Tensor:
        """Logs of positive scores (L, G, T), of mean 0 and deviation 1 in every head."""
        logs = scores.clamp_min(scores.mean(-1, keepdim=True) * 1e-6 + 1e-30).log()
        return (logs - logs.mean(-1, keepdim=True)) / logs.std(-1, keepdim=True)

    @classmethod
    def features(cls, scores: dict[str, Tensor]) -> Tensor:
        """(L, G, T, features)."""
        return torch.stack([cls.standard(scores[name]) for name in FEATURES], dim=-1)

    def __call__(self, scores: dict[str, Tensor]) -> Tensor:
        return self.features(scores) @ self.weights


@dataclass(frozen=True)
class Scored(ImportancePolicy):
    """Scores (G, T) of the prompt that were made elsewhere; later tokens are not scored."""

    scores: Tensor
    name: ClassVar[str] = "scored"
    uses_attention: ClassVar[bool] = False

    def initial_scores(self, keys: Tensor, attention: Tensor) -> Tensor:
        return self.scores[None] if keys.shape[2] == self.scores.shape[1] else no_attention(keys)


@dataclass(frozen=True)
class Trial:
    """A text that a model has read: the prompt, what follows, and what the full cache predicts there."""

    model: PreTrainedModel
    name: str
    text: str
    whole: Recording
    full: Reading

    @property
    def rest(self) -> Tensor:
        return self.whole.tokens[PROMPT_TOKENS:]

    @cached_property
    def prompt(self) -> Recording:
        """The recording of the prompt alone: attention is causal, so it is the beginning of the whole."""
        layers = tuple(
            replace(
                layer,
                queries=layer.queries[:, :, :PROMPT_TOKENS],
                keys=layer.keys[:, :, :PROMPT_TOKENS],
                values=layer.values[:, :, :PROMPT_TOKENS],
            )
            for layer in self.whole.layers
        )
        return replace(self.whole, tokens=self.whole.tokens[:PROMPT_TOKENS], layers=layers)


def make_trial(model: PreTrainedModel, tokenizer: Any, name: str, part: str, scratch: Path) -> Trial:
    """Read a part of a text exactly, or take that from `scratch`."""
    text, _, window = part.partition(":")
    file = scratch / f"{name}-{part}-reading.pt"
    if file.exists():
        whole, full = torch.load(file, weights_only=False)
    else:
        tokens = tokenizer(texts()[text], return_tensors="pt").input_ids[0]
        tokens = tokens.split(PROMPT_TOKENS + READ_TOKENS)[int(window)]
        whole = record(model, tokens)
        full = read_full(model, whole)
        torch.save((whole, full), file)
    return Trial(model, name, part, whole, full)


def read_full(model: PreTrainedModel, whole: Recording) -> Reading:
    unread = Reading(torch.empty(0), 0.0)
    trial = Trial(model, "", "", whole, unread)
    return read_on(model, fill(DynamicCache(config=model.config), trial.prompt), trial.rest, CHUNK)


def score(trial: Trial, setting: str, predictors: list[str], scratch: Path) -> dict[str, Tensor]:
    """The scores (L, G, T) that some predictors need, made once per text and setting."""
    file = scratch / f"{trial.name}-{trial.text}-{setting.replace('/', '-')}.pt"
    saved: dict[str, Tensor] = torch.load(file) if file.exists() else {}
    needed = {name for predictor in predictors for name in parts_of(predictor)}
    missing = sorted(needed - set(saved))
    rope = trial.model.config.rope_parameters
    if rope["rope_type"] != "default":
        raise SystemExit(f"{trial.name} has rope_type={rope['rope_type']!r}; queries are replayed for 'default' only")
    made = defaultdict(list)
    for layer in trial.whole.layers if missing else ():
        evidence = Evidence(layer, trial.whole.tokens, SETTINGS[setting], rope["rope_theta"])
        for name in missing:
            made[name].append((PREDICTORS | PARTS)[name](evidence))
    saved |= {name: torch.stack(layers) for name, layers in made.items()}
    torch.save(saved, file)
    return saved


def parts_of(predictor: str) -> tuple[str, ...]:
    """The scores that a predictor is made of."""
    if predictor in SHARED:
        return (SHARED[predictor][0],)
    if predictor in BUDGETED:
        return (BUDGETED[predictor],)
    if predictor in LEARNED:
        return (*FEATURES, ORACLE)  # the oracle is for those who learn from these scores
    return COMBINED.get(predictor, (predictor,))


def join(predictor: str, scores: dict[str, Tensor], examples: list[dict[str, Tensor]]) -> Tensor:
    """A predictor's scores (L, G, T) from its parts'."""
    if predictor in SHARED:
        name, dims = SHARED[predictor]
        return ranks(scores[name]) + ranks(scores[name]).mean(dims, keepdim=True)
    if predictor in LEARNED:
        return Learned(examples)(scores)
    parts = [scores[name] for name in parts_of(predictor)]
    return parts[0] if len(parts) == 1 else torch.stack([ranks(part) for part in parts]).mean(0)


def shares(gains: Tensor, config: MiKVConfig) -> list[float]:
    """Importance ratios of the layers, of the same mean as before, by where the highest gains (L, G, T) are."""
    num_tokens = gains.shape[-1]
    threshold = gains.flatten().kthvalue(int(gains.numel() * (1 - config.importance_ratio))).values
    wanted = (gains > threshold).float().mean((1, 2)).clamp(0.05, 0.6)
    wanted = (wanted + config.importance_ratio) / 2
    wanted = wanted * config.importance_ratio / wanted.mean()
    # whole blocks of 32 are demoted: spend exactly as many high tokens as without budgets
    blocks = ((1 - wanted) * num_tokens / 32).floor()
    target = int((num_tokens - config.high_budget(num_tokens)) // 32) * len(blocks)
    order = ((1 - wanted) * num_tokens / 32 - blocks).argsort(descending=True)
    blocks[order[: max(0, target - int(blocks.sum()))]] += 1
    return [float(1 - block * 32 / num_tokens) for block in blocks]


def measure(trial: Trial, setting: str, recent: str, predictor: str, own: Tensor) -> dict[str, Any]:
    """The record of one predictor with its scores (L, G, T)."""
    config = replace(SETTINGS[setting], recent_share=RECENT[recent])
    cache = MiKVCache(trial.model.config, config)
    ratios = shares(own, config) if predictor in BUDGETED else [config.importance_ratio] * len(own)
    for layer, layer_scores, ratio in zip(cache.layers, own, ratios, strict=True):
        layer.tokens.policy = Scored(layer_scores)
        layer.tokens.config = replace(config, importance_ratio=ratio)
    fill(cache, trial.prompt)
    tiers = [layer.tokens.tokens_by_tier() for layer in cache.layers]
    for layer in cache.layers:
        layer.tokens.hold_demotion()
    fidelity = compare(trial.full, read_on(trial.model, cache, trial.rest, CHUNK))
    return {
        "model": trial.name,
        "text": trial.text,
        "setting": setting,
        "recent": recent,
        "predictor": predictor,
        "high_tokens": sum(tier["high"] for tier in tiers) / len(tiers),
        "kl_mean": fidelity.kl_mean,
        "kl_p99": fidelity.kl_p99,
        "top1_agreement": fidelity.top1_agreement,
        "command": "python scripts/predictors.py",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    everything = [*PREDICTORS, *COMBINED, *SHARED, *BUDGETED, *LEARNED]
    parser.add_argument("--setting", action="append", choices=SETTINGS)
    parser.add_argument("--recent", action="append", choices=RECENT)
    parser.add_argument(
        "--only", action="append", choices=everything, help="a predictor; all but the learned if not given"
    )
    parser.add_argument("--texts", type=int, default=6, help="how many of the six parts of texts")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "mikv-predictors")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        options.scratch.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode(), Progress() as progress:
            run(options, progress)
    PAGE.write_text(page(read_records()), encoding="utf-8")


def run(options: argparse.Namespace, progress: Progress) -> None:
    loaded = load_model(options.model)
    name = Path(loaded.name).name
    done = {tuple(r[key] for key in ("model", "text", "setting", "recent", "predictor")) for r in read_records()}
    predictors = options.only or [*PREDICTORS, *COMBINED, *SHARED, *BUDGETED]
    for text in [f"{text}:{window}" for window in (0, 1) for text in texts()][: options.texts]:
        trial = make_trial(loaded.model, loaded.tokenizer, name, text, options.scratch)
        for setting in options.setting or SETTINGS:
            scores = score(trial, setting, predictors, options.scratch)
            cells = [(recent, predictor) for recent in options.recent or ["half"] for predictor in predictors]
            for recent, predictor in progress.track(cells, description=f"{name} {text} {setting}"):
                if (name, text, setting, recent, predictor) not in done:
                    examples = load_examples(trial, setting, predictor, options.scratch)
                    own = join(predictor, scores, examples)
                    write_record(measure(trial, setting, recent, predictor, own))


def load_examples(trial: Trial, setting: str, predictor: str, scratch: Path) -> list[dict[str, Tensor]]:
    """Scores of the other model or of this model's other texts, as far as they were made; none if none are needed."""
    if predictor not in LEARNED:
        return []
    own = f"{trial.name}-"
    found = []
    for file in sorted(scratch.glob(f"*-{setting.replace('/', '-')}.pt")):
        of_this_model = file.name.startswith(own)
        wanted = not of_this_model if predictor == LEARNED[0] else of_this_model and trial.text not in file.name
        scores = torch.load(file) if wanted else {}
        if {*FEATURES, ORACLE} <= set(scores):
            found.append(scores)
    if not found:
        raise SystemExit(f"{predictor!r}: nothing to learn from in {scratch}; measure the others first")
    return found


def read_records() -> list[dict[str, Any]]:
    if not RECORDS.exists():
        return []
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def write_record(record_: dict[str, Any]) -> None:
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record_) + "\n")


def page(records: list[dict[str, Any]]) -> str:
    """One table per setting and recent window: KL, share of the oracle's gain and parts of texts won, per model."""
    lines = [
        "# Which score picks the high tier best?",
        "",
        "Generated by `python scripts/predictors.py` from predictors.jsonl. KL is the mean divergence to the full "
        f"cache, in nats, over {READ_TOKENS} tokens after a prompt of {PROMPT_TOKENS}, mean over parts of texts; "
        "demotion is held while they are read, so that only the choice among the prompt's tokens differs. *Gain* is "
        f"the share of the way from `{BASELINE}` to `{ORACLE}`, which knows the attention of the {READ_TOKENS} tokens; "
        f"*won* counts the parts where the KL is lower than that of `{BASELINE}`. Where a predictor was measured on "
        "fewer parts than others, the KL of the baseline on those is beside it.",
    ]
    for setting in SETTINGS:
        for recent in RECENT:
            chosen = [r for r in records if (r["setting"], r["recent"]) == (setting, recent)]
            if chosen:
                lines += ["", f"## {setting}, recent {recent}", "", *_table(chosen)]
    return "\n".join([*lines, "", f"{len(records)} records.", ""])


def _table(records: list[dict[str, Any]]) -> list[str]:
    models = sorted({record["model"] for record in records})
    kl: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)  # by part of text
    for record_ in records:
        kl[record_["predictor"], record_["model"]][record_["text"]] = record_["kl_mean"]
    predictors = {record["predictor"] for record in records}
    first = models[0]
    order = sorted(predictors, key=lambda p: _mean(kl[p, first]) / _mean(kl[BASELINE, first], kl[p, first]))
    rows = [f"| {p} | " + " | ".join(_cell(p, model, kl) for model in models) + " |" for p in order]
    head = " | ".join(f"{model} KL | normalized there | gain | won" for model in models)
    return [f"| predictor | {head} |", "|---|" + "---|---|---|---|" * len(models), *rows]


def _cell(predictor: str, model: str, kl: dict[tuple[str, str], dict[str, float]]) -> str:
    own, baseline, oracle = (kl[name, model] for name in (predictor, BASELINE, ORACLE))
    parts = set(own) & set(baseline)
    if not parts:
        return "- | - | - | -"
    won = sum(own[part] < baseline[part] for part in parts)
    cell = f"{_mean(own, parts):.4f} | {_mean(baseline, parts):.4f}"
    if not parts <= set(oracle):
        return f"{cell} | - | {won} of {len(parts)}"
    gain = (_mean(baseline, parts) - _mean(own, parts)) / (_mean(baseline, parts) - _mean(oracle, parts))
    return f"{cell} | {gain:.0%} | {won} of {len(parts)}"


def _mean(kl: dict[str, float], parts: Collection[str] | None = None) -> float:
    chosen = [value for part, value in kl.items() if parts is None or part in parts]
    return sum(chosen) / len(chosen) if chosen else float("nan")


if __name__ == "__main__":
    main()
