"""The caches of transformers and mikv in `mikv bench generate`: a model's own forward pass, one call per step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from mikv.bench.cell import Cell, Reader
from mikv.cache_names import NamedCache, parse_cache
from mikv.integrations.transformers.versions import as_argument
from mikv.models import load_model

_REHEARSAL_TOKENS, _REHEARSAL_STEPS = 128, 4


@dataclass(frozen=True)
class CacheReader:
    """A model and its cache."""

    model: PreTrainedModel
    named: NamedCache
    cache: Cache

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> None:
        """One forward pass, and the likeliest next token as greedy decoding takes it."""
        ids = torch.tensor([list(tokens)])
        self.model(ids, **as_argument(self.cache), logits_to_keep=1).logits.argmax(-1).item()

    def cache_bytes(self) -> int:
        """All that the cache holds."""
        return self.named.bytes(self.cache)


def prepare(cell: Cell, text: str) -> tuple[list[int], Callable[[], Reader]]:
    """The tokens of the text, and what makes an empty cache for the model, which has read a few already."""
    torch.set_num_threads(cell.threads)
    named = parse_cache(cell.cache)
    loaded = load_model(cell.model, dtype=None if cell.dtype is None else getattr(torch, cell.dtype))
    num_tokens = cell.context + cell.new_tokens
    tokens = loaded.tokenizer(text, verbose=False).input_ids[:num_tokens]

    def begin() -> Reader:
        return CacheReader(loaded.model, named, named.make(loaded.model, num_tokens))

    rehearsal = begin()
    rehearsal.read(tokens[:_REHEARSAL_TOKENS])
    for token in tokens[:_REHEARSAL_STEPS]:
        rehearsal.read([token])
    return tokens, begin
