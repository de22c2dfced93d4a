"""Softmax attention over segments of tokens in PyTorch, for any device: a tile at a time, never a whole layer.

B batch, H query heads, G KV heads, R = H / G, Tq queries, T tokens, D head dim. A step sees its tokens as a list of
segments (high tier, low tier, the new tokens); a segment knows how to decode a range of its tokens. All arithmetic is
float32. Knows nothing about policies, models or how segments are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mikv.arithmetic import own_arithmetic
from mikv.errors import UnsupportedModelError
from mikv.transforms import KeyTransform, ValueTransform

TILE_TOKENS = 512  # decoded at once; a tile of keys and one of values are all that ever exists unpacked
_MAX_LOGITS = 1 << 21  # numbers in one matrix of logits (8 MiB); more queries are taken in turns


@dataclass(frozen=True)
class AttentionOptions:
    """What a model's attention does besides softmax(q.k * scale): Gemma's softcap, gpt-oss's sink logits (H,).

    `exact` asks for float arithmetic throughout, where an operation would otherwise round the query to 8 bits.
    `dropout` is the share of attention that training leaves out at random, of `attend_unpacked` only.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    exact: bool = False
    dropout: float = 0.0

    def require_inference(self) -> None:
        """Raise UnsupportedModelError if attention to a cache were to leave out some at random."""
        if self.dropout:
            raise UnsupportedModelError(
                f"attention dropout of {self.dropout} while using a MiKV cache; call model.eval() first"
            )


@dataclass(frozen=True)
class Segment:
    """`num_tokens` tokens per row that are stored alike.

    `keys(start, stop)` and `values(start, stop)` decode tokens to (B, G, stop - start, D) float32, in the basis of the
    transforms if `transformed`. `mask` is True where a query may look, broadcastable to (B, 1, Tq, T); None is
    everywhere. `causal` tokens end with the queries' own: a query sees itself and all before it, and no Tq x T mask is
    needed to say so.
    """

    num_tokens: int
    keys: Callable[[int, int], Tensor]
    values: Callable[[int, int], Tensor]
    mask: Tensor | None
    transformed: bool
    causal: bool = False

    @classmethod
    def of_tensors(cls, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False) -> "Segment":
        """Tokens held as plain tensors (B, G, T, D)."""
        return cls(
            keys.shape[2],
            lambda start, stop: keys[:, :, start:stop].float(),
            lambda start, stop: values[:, :, start:stop].float(),
            mask,
            transformed=False,
            causal=causal,
        )


@own_arithmetic
def attend_unpacked(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: AttentionOptions, causal: bool
) -> Tensor:
    """Attend from queries (B, H, Tq, D) to keys and values (B, G, T, D): (B, H, Tq, D), with gradients.

    `mask` (B, 1, Tq, T) is True where a query may look; None is everywhere, or what is not later if `causal`.
    """
    segment = Segment.of_tensors(keys, values, mask, causal and mask is None)
    return attend_segments(queries, [segment], None, options)[0]


def attend_segments(
    queries: Tensor,
    segments: list[Segment],
    transforms: tuple[KeyTransform, ValueTransform] | None,
    options: AttentionOptions,
    query_weight: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Softmax attention of queries (B, H, Tq, D) over all segments together.

    Returns the output (B, H, Tq, D) in the queries' dtype and, per segment, the attention each token received, summed
    over the group's heads and over the queries weighted by `query_weight` (B, Tq), (B, G, T) float32.
    """
    batch, num_heads, num_queries, _ = queries.shape
    num_tokens = sum(segment.num_tokens for segment in segments)
    step = max(1, _MAX_LOGITS // max(1, batch * num_heads * num_tokens))
    if step >= num_queries:
        sliced = [_as_seen_by(queries, slice(0, num_queries), segment) for segment in segments]
        return _attend_tile(queries, sliced, transforms, options, query_weight)
    outputs: list[Tensor] = []
    received: list[Tensor] | None = None
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        weight = None if query_weight is None else query_weight[:, rows]
        sliced = [_as_seen_by(queries, rows, segment) for segment in segments]
        output, part = _attend_tile(queries[:, :, rows], sliced, transforms, options, weight)
        outputs.append(output)
        received = part if received is None else [total + new for total, new in zip(received, part, strict=True)]
    assert received is not None
    return torch.cat(outputs, dim=2), received


def score_prompt(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
    query_weight: Tensor | None = None,
    stride: int = 1,
    distance: int = 0,
) -> Tensor:
    """The attention that tokens (B, G, T, D) receive from Tq of them, without the Tq x T matrix.

    The queries (B, H, Tq, D) are those of every `stride`-th token and end with the last token's. Their attention is
    summed over the group's heads and over the queries, weighted by `query_weight` (B, Tq). `mask`
    (B, 1, Tq, T) is True where a query may look; None is causal. A query looks at all those but counts only for tokens
    at least `distance` columns before its own; 0 counts everything. Returns (B, G, T) float32. Extra memory: tiles of
    logits of 8 MiB, whatever T.
    """
    num_kv_heads, num_queries = keys.shape[1], queries.shape[2]
    columns = range(keys.shape[2] - 1 - (num_queries - 1) * stride, keys.shape[2], stride)  # of the queries
    received = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
    grouped = queries.unflatten(1, (num_kv_heads, -1))  # (B, G, R, Tq, D)
    sinks = None if options.sinks is None else options.sinks.float().reshape(num_kv_heads, -1)
    for row in range(keys.shape[0]):
        for head in range(num_kv_heads):
            received[row, head] = _score_head(
                grouped[row, head].float() * options.scale,
                keys[row, head].float(),
                columns,
                None if mask is None else mask[min(row, mask.shape[0] - 1), 0],
                replace(options, sinks=None if sinks is None else sinks[head]),
                torch.ones(num_queries, dtype=torch.float32, device=keys.device)
                if query_weight is None
                else query_weight[row].float(),
                distance,
            )
    return received


def visible(mask: Tensor) -> Tensor:
    """Where a mask lets look: a boolean one says it, an additive one by zeros."""
    return mask if mask.dtype == torch.bool else mask == 0


def _score_head(
    queries: Tensor,
    keys: Tensor,
    columns: range,
    mask: Tensor | None,
    options: AttentionOptions,
    query_weight: Tensor,
    distance: int,
) -> Tensor:
    """`score_prompt` for the queries (R, Tq, D), already scaled, of one KV head with keys (T, D): (T,) float32."""
    num_heads, num_queries, head_dim = queries.shape
    received = torch.zeros(keys.shape[0], dtype=torch.float32, device=keys.device)
    step = max(1, _MAX_LOGITS // (num_heads * keys.shape[0]))
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        # later tokens are out of sight of the whole tile
        seen = columns[stop - 1] + 1 if mask is None else _last_visible(mask[start:stop])
        logits = (queries[:, start:stop].reshape(-1, head_dim) @ keys[:seen].mT).view(num_heads, stop - start, seen)
        logits = _capped(logits, options.softcap)
        if mask is None:
            first = columns[start]
            own = torch.tensor(columns[start:stop], dtype=torch.int64, device=keys.device)[:, None]
            logits[..., first:].masked_fill_(
                torch.arange(first, seen, dtype=torch.int64, device=keys.device) > own, -torch.inf
            )
        else:
            logits.masked_fill_(~mask[start:stop, :seen], -torch.inf)
        sinks = None if options.sinks is None else options.sinks[:, None, None]
        probabilities = _softmax(logits, sinks, may_be_blind=mask is not None)
        if distance:
            nearest = torch.tensor(columns[start:stop], dtype=torch.int64, device=keys.device)[:, None] - distance
            probabilities.masked_fill_(torch.arange(seen, dtype=torch.int64, device=keys.device) > nearest, 0.0)
        received[:seen] += (query_weight[start:stop].repeat(num_heads) @ probabilities.flatten(0, 1)).squeeze(0)
    return received


def _last_visible(mask: Tensor) -> int:
    """How many of the tokens it takes to hold all that the queries (Tq, T) see; at least 1."""
    visible = mask.any(0).nonzero()
    return int(visible[-1]) + 1 if len(visible) else 1


def _attend_tile(
    queries: Tensor,
    segments: list[Segment],
    transforms: tuple[KeyTransform, ValueTransform] | None,
    options: AttentionOptions,
    query_weight: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    num_queries = queries.shape[2]
    grouped = _grouped(queries.float() * options.scale, segments[0].keys(0, 0).shape[1])  # (B, G, R*Tq, D)
    logits = _logits(grouped, segments, None if transforms is None else transforms[0])
    visible = [
        _masked(_capped(part, options.softcap), segment.mask, num_queries)
        for part, segment in zip(logits, segments, strict=True)
    ]
    sinks = None if options.sinks is None else _sink_logits(options.sinks, grouped, num_queries)
    blind = any(segment.mask is not None for segment in segments)
    probabilities = _softmax(torch.cat(visible, dim=-1), sinks, may_be_blind=blind)  # (B, G, R*Tq, T)
    if options.dropout:
        probabilities = torch.nn.functional.dropout(probabilities, options.dropout)
    output = _weighted_values(probabilities, segments, None if transforms is None else transforms[1])
    received = [_received(part, num_queries, query_weight) for part in _split(probabilities, segments)]
    return output.unflatten(2, (-1, num_queries)).flatten(1, 2).to(queries.dtype), received


def _logits(grouped: Tensor, segments: list[Segment], transform: KeyTransform | None) -> list[Tensor]:
    """Of the queries (B, G, R*Tq, D) on each segment."""
    query = grouped if transform is None else transform.query(grouped)
    offset = None if transform is None else transform.logit_offset(grouped)
    logits = []
    for segment in segments:
        own = query if segment.transformed else grouped
        tiles = [own @ segment.keys(start, stop).mT for start, stop in _tiles(segment.num_tokens)]
        part = torch.cat(tiles, dim=-1) if tiles else own[..., :0]
        logits.append(part + offset if segment.transformed and offset is not None else part)
    return logits


def _masked(logits: Tensor, mask: Tensor | None, num_queries: int) -> Tensor:
    """Logits (B, G, R*Tq, T), minus infinity where a query may not look."""
    if mask is None:
        return logits
    by_query = logits.unflatten(2, (-1, num_queries))  # (B, G, R, Tq, T)
    return by_query.masked_fill(~mask[:, :, None], -torch.inf).flatten(2, 3)


def _weighted_values(probabilities: Tensor, segments: list[Segment], transform: ValueTransform | None) -> Tensor:
    raw: Tensor | float = 0.0
    transformed: Tensor | float = 0.0
    mass: Tensor | float = 0.0
    for segment, part in zip(segments, _split(probabilities, segments), strict=True):
        for start, stop in _tiles(segment.num_tokens):
            weighted = part[..., start:stop] @ segment.values(start, stop)
            if segment.transformed:
                transformed = transformed + weighted
            else:
                raw = raw + weighted
        if segment.transformed:
            mass = mass + part.sum(-1, keepdim=True)
    if isinstance(transformed, Tensor) and isinstance(mass, Tensor):
        assert transform is not None
        raw = raw + transform.output(transformed, mass)
    assert isinstance(raw, Tensor)
    return raw


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _softmax(logits: Tensor, sinks: Tensor | None, may_be_blind: bool) -> Tensor:
    """Softmax over the last axis; `sinks` (..., 1) take their share and give nothing.

    Queries that may look nowhere get zeros; `may_be_blind` says that there can be such.
    """
    if sinks is not None:
        extended = torch.cat((logits, sinks.expand(*logits.shape[:-1], 1)), dim=-1)
        return torch.softmax(extended, dim=-1)[..., :-1]
    probabilities = torch.softmax(logits, dim=-1)
    if may_be_blind:
        return probabilities.masked_fill(torch.isneginf(logits.amax(-1, keepdim=True)), 0.0)
    return probabilities


def _sink_logits(sinks: Tensor, grouped: Tensor, num_queries: int) -> Tensor:
    """Sinks (H,) as (B, G, R*Tq, 1)."""
    by_head = sinks.float().reshape(1, grouped.shape[1], -1, 1)
    return by_head.expand(grouped.shape[0], -1, -1, num_queries).flatten(2)[..., None]


def _received(probabilities: Tensor, num_queries: int, query_weight: Tensor | None) -> Tensor:
    """(B, G, R*Tq, T) summed over heads and weighted queries: (B, G, T)."""
    if query_weight is None:
        return probabilities.sum(2)
    repeats = probabilities.shape[2] // num_queries
    weight = query_weight.float().repeat(1, repeats)[:, None, None]  # (B, 1, 1, R*Tq)
    return (weight @ probabilities).squeeze(2)


def _grouped(queries: Tensor, num_kv_heads: int) -> Tensor:
    """(B, H, Tq, D) -> (B, G, R*Tq, D): the queries of all heads that share a KV head, side by side."""
    return queries.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)


def _split(matrix: Tensor, segments: list[Segment]) -> tuple[Tensor, ...]:
    return matrix.split([segment.num_tokens for segment in segments], dim=-1)


def _tiles(num_tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + TILE_TOKENS, num_tokens)) for start in range(0, num_tokens, TILE_TOKENS)]


def _as_seen_by(queries: Tensor, rows: slice, segment: Segment) -> Segment:
    """The segment with the mask of the queries `rows` of (B, H, Tq, D)."""
    num_queries, num_tokens = queries.shape[2], segment.num_tokens
    if segment.causal and num_queries > 1:
        seen = torch.ones(len(range(num_queries)[rows]), num_tokens, dtype=torch.bool, device=queries.device)
        return replace(segment, mask=seen.tril(num_tokens - num_queries + rows.start)[None, None])
    if segment.mask is None or segment.mask.shape[2] == 1:
        return segment
    return replace(segment, mask=segment.mask[:, :, rows])
