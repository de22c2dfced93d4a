"""The oracle: attention over dequantized tokens in plain float32 PyTorch, everything at once, no tricks.

B batch, H query heads, G KV heads, Tq queries, T tokens, D head dim. Tests compare every faster path with this file;
it materialises the attention matrix, so it is for small inputs.
"""

import torch
from torch import Tensor

from mikv.arithmetic import own_arithmetic


@own_arithmetic
def attention_probabilities(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax probabilities (B, H, Tq, T) of queries (B, H, Tq, D) on keys (B, G, T, D).

    `mask` (B, 1, Tq, T) is True where a query may look; `sinks` (H,) are logits that take probability and give nothing.
    A query that may look nowhere gets zeros.
    """
    group = queries.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(group, dim=1)  # (B, H, T, D)
    logits = queries.float() @ keys.mT * scale  # (B, H, Tq, T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink_logits = sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat((logits, sink_logits), -1), -1)[..., :-1]
    return torch.softmax(logits, -1).nan_to_num(0.0)


@own_arithmetic
def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output (B, H, Tq, D), float32; arguments as for `attention_probabilities`, values (B, G, T, D)."""
    probabilities = attention_probabilities(queries, keys, mask, scale, softcap, sinks)
    group = queries.shape[1] // values.shape[1]
    return probabilities @ values.float().repeat_interleave(group, dim=1)


def attention_received(probabilities: Tensor, num_kv_heads: int) -> Tensor:
    """What each token received, summed over queries and the heads of its group: (B, H, Tq, T) -> (B, G, T)."""
    return probabilities.unflatten(1, (num_kv_heads, -1)).sum((2, 3))


def causal_mask(num_queries: int, num_tokens: int, device: torch.device) -> Tensor:
    """(1, 1, Tq, T) bool: the last `num_queries` of `num_tokens` tokens look at themselves and at all before them."""
    return torch.ones(num_queries, num_tokens, dtype=torch.bool, device=device).tril(num_tokens - num_queries)[
        None, None
    ]
