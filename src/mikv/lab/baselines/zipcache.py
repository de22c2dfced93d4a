"""ZipCache (arXiv 2405.14256): salient tokens in 4 bits, the others in 2, with few scales.

    keys      per channel of a head, over all tokens of one precision: scale and zero-point per channel
    values    c = sqrt(max |v|) per channel, then per token of v / c over all heads: scale and zero-point per token
    saliency  the mean attention that a token received from the probes that could see it (Eq. 8), per KV head
    probes    the last 5 % of the queries and a random 5 % of the others

60 % of the tokens are salient, as in its GSM8K experiments (3.2 bits). After the prompt new tokens wait in 16 bits
until there are 100; then they are judged by their own probes, and everything is quantized again from what storage gives
back; a token's precision never changes. Details that the paper leaves open are those of its authors' code: saliency per
KV head, and a row of values holds the tokens of equal rank of all heads.

B batch, H query heads, G KV heads, T tokens, D head dim.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mikv.cache.geometry import FP16_BYTES
from mikv.cache.warm_up import ExactAttention
from mikv.formats import quantized_format, raw_format
from mikv.integrations.transformers import attention
from mikv.lab.baselines.simulated import SimulatedCache, SimulatedLayer, code_bytes
from mikv.ops import AttentionOptions, score_prompt, visible

SALIENT_BITS, OTHER_BITS = 4, 2
OTHER_SHARE = 0.4
PROBE_SHARE = 0.05  # of the last queries, and again of the others
STREAMING_TOKENS = 100
_SEED = 2405


def zipcache(model: PreTrainedModel) -> SimulatedCache:
    """An empty cache. It borrows the model's attention, which brings the queries."""
    return SimulatedCache(model.config, partial(ZipCacheLayer, model.config.get_text_config(decoder=True)))


class ZipCacheLayer(SimulatedLayer):
    """One layer: tokens that are quantized, then those that wait.

    salient   (B, G, quantized tokens) bool, in 4 bits
    received  (B, G, waiting tokens) float32, attention from probes
    seen      (waiting tokens,) int32, how many probes could see each
    """

    pending: tuple[Tensor, Tensor]
    wants_proof = False

    def __init__(self, model_config: PreTrainedConfig) -> None:
        super().__init__()
        self._model_config = model_config

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin empty."""
        super().lazy_initialization(key_states, value_states)
        none = key_states[:, :, :0, 0]
        self.salient, self.received = none.bool(), none.float()
        self.seen = torch.zeros(0, dtype=torch.int32, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Lead the attention function here, which brings the queries."""
        self.pending = key_states, value_states
        return attention.carriers(key_states, value_states, self, self._model_config)

    def attend(self, queries: Tensor, mask: Tensor | None, options: AttentionOptions, exact: ExactAttention) -> Tensor:
        """Attend to what is stored and to the pending tokens, and store those."""
        return self.step(queries, self.pending, mask, options, exact)

    def step(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: AttentionOptions,
        exact: ExactAttention,
    ) -> Tensor:
        """Attend from queries (B, H, Tq, D) to what is stored and exactly to `new`, and store that."""
        seen_keys, seen_values = self.with_new(*new)
        self._score(queries, seen_keys, mask, options)
        is_prompt = not self.keys.shape[2]
        keys, values = (x.float() for x in new)
        self.keys, self.values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        if is_prompt or self.seen.shape[0] >= STREAMING_TOKENS:
            self._quantize()
        else:
            half = raw_format("fp16", self.dtype, keys.shape[3]).dtype
            self.keys, self.values = self.keys.to(half).float(), self.values.to(half).float()
        return exact(seen_keys, seen_values)

    def _score(self, queries: Tensor, keys: Tensor, mask: Tensor | None, options: AttentionOptions) -> None:
        """Add what waiting tokens receive from the probes among `queries`, who see all of `keys` (B, G, T, D)."""
        num_queries, num_quantized = queries.shape[2], self.salient.shape[2]
        waiting = self.seen.shape[0]
        self.received = torch.nn.functional.pad(self.received, (0, num_queries))
        self.seen = torch.nn.functional.pad(self.seen, (0, num_queries))
        segment = max(waiting + num_queries, STREAMING_TOKENS if num_quantized else 0)
        probes = probe_offsets(segment, num_quantized)
        probes = probes[(probes >= waiting) & (probes < waiting + num_queries)]  # offsets among the waiting tokens
        if not len(probes):
            return
        chosen = probes - waiting
        columns = torch.arange(keys.shape[2])
        may_see = (columns <= num_quantized + probes[:, None])[None, None].to(keys.device)  # (1, 1, probes, T)
        if mask is not None:
            may_see = may_see & visible(mask)[:, :, chosen]
        received = score_prompt(queries[:, :, chosen], keys, may_see, options)
        self.received += received[:, :, num_quantized:]
        offsets = columns[: self.seen.shape[0]]
        self.seen += (offsets <= probes[:, None]).sum(0, dtype=torch.int32).to(self.device)

    def _quantize(self) -> None:
        """Give the waiting tokens their precision, and round all tokens."""
        saliency = self.received / self.seen.clamp_min(1)
        num_tokens = saliency.shape[2]
        salient = saliency.topk(num_tokens - int(OTHER_SHARE * num_tokens), dim=2).indices
        marked = torch.zeros_like(saliency, dtype=torch.bool).scatter_(2, salient, True)
        self.salient = torch.cat((self.salient, marked), dim=2)
        self.received, self.seen = self.received[:, :, :0], self.seen[:0]
        self.keys = rounded_keys(self.keys, self.salient)
        self.values = rounded_values(self.values, self.salient)

    def stored_bytes(self) -> int:
        """Codes, scales and zero-points of each precision, c, waiting tokens in 16 bits, and what judges those."""
        if not self.is_initialized:
            return 0
        batch, heads, num_tokens, head_dim = self.keys.shape
        channels, num_quantized = batch * heads * head_dim, self.salient.shape[2]
        num_others = int((~self.salient).sum()) // (batch * heads)
        total = 2 * channels * (num_tokens - num_quantized) * FP16_BYTES + self.received.nbytes + self.seen.nbytes
        for count, bits in ((num_quantized - num_others, SALIENT_BITS), (num_others, OTHER_BITS)):
            scales = 2 * (channels + batch * count) if count else 0  # of keys per channel, of values per token
            total += 2 * code_bytes(channels * count, bits) + scales * FP16_BYTES
        return total + (channels * FP16_BYTES if num_quantized else 0)


def probe_offsets(num_tokens: int, first: int) -> Tensor:
    """Which queries of a segment of `num_tokens` that begins at column `first` are probes, ascending."""
    num_recent = max(1, int(PROBE_SHARE * num_tokens))
    older = num_tokens - num_recent
    generator = torch.Generator().manual_seed(_SEED + first)
    random = torch.randperm(older, generator=generator)[: int(PROBE_SHARE * num_tokens)]
    return torch.cat((random.sort().values, torch.arange(older, num_tokens)))


def rounded_keys(keys: Tensor, salient: Tensor) -> Tensor:
    """Keys (B, G, T, D) after a round trip, per channel of each precision."""
    output = torch.empty_like(keys)
    for chosen, bits in ((salient, SALIENT_BITS), (~salient, OTHER_BITS)):
        tokens = _tokens(keys, chosen)  # (B, G, n, D)
        output[chosen] = _round_trip(tokens.mT, bits).mT.flatten(0, 2)
    return output


def rounded_values(values: Tensor, salient: Tensor) -> Tensor:
    """Values (B, G, T, D) after a round trip: channels scaled, then per token over all heads."""
    channel_scale = values.abs().amax(2, keepdim=True).sqrt().half().float()
    channel_scale = torch.where(channel_scale == 0, 1.0, channel_scale)
    output = torch.empty_like(values)
    for chosen, bits in ((salient, SALIENT_BITS), (~salient, OTHER_BITS)):
        tokens = _tokens(values / channel_scale, chosen).transpose(1, 2)  # (B, n, G, D)
        back = _round_trip(tokens.flatten(2), bits).view_as(tokens)
        output[chosen] = back.transpose(1, 2).flatten(0, 2)
    return output * channel_scale


def _tokens(x: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens (B, G, n, D) of x (B, G, T, D), as many in every head."""
    return x[chosen].view(*x.shape[:2], -1, x.shape[3])


def _round_trip(x: Tensor, bits: int) -> Tensor:
    """x (..., n) after asymmetric round-to-nearest over its last axis, scale and zero-point in 16 bits."""
    size = x.shape[-1]
    if not x.numel():
        return x
    form = quantized_format(f"int{bits}", "group", size, size, "channels")
    return form.dequantize(form.quantize(x))
