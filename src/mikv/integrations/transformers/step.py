"""A step of all layers of a cache that is under way: which have made it, and how to take it back.

Knows layers by number and what they hold; does not compute.
"""

from typing import Any

from transformers.cache_utils import DynamicLayer

from mikv.errors import CacheStateError
from mikv.formats import BLOCK_TOKENS
from mikv.integrations.transformers.layer import MiKVLayer

# Of a longer step the layers bring their tiers to the budget one by one, else all would hold its tokens in high
# precision at once; it can be taken back only if nothing was there before it.
MOST_REVOCABLE = BLOCK_TOKENS


class Step:
    """From the first layer's update to the last layer's attention.

    length      tokens that all layers held before it
    expected    layers that have to make it
    """

    def __init__(self, layers: list[Any], expected: frozenset[int]) -> None:
        self.expected = expected
        lengths = {layers[index].get_seq_length() for index in expected}
        if len(lengths) > 1:
            raise CacheStateError(
                f"the layers hold {min(lengths)} to {max(lengths)} tokens, so a step has reached some of them only; "
                "call cache.reset()"
            )
        self.length = max(lengths, default=0)
        self.begun: set[int] = set()
        self.made: set[int] = set()
        # states of linear attention are written over, and nobody has the old ones
        self.is_revocable = not any(hasattr(layer, "conv_states") for layer in layers)
        self._former: dict[int, Any] = {}

    @property
    def is_whole(self) -> bool:
        """Whether all layers have made it."""
        return len(self.made) == len(self.expected)

    @property
    def missing(self) -> list[int]:
        """The layers that have not made it."""
        return sorted(self.expected - self.made)

    def remember(self, index: int, layer: Any) -> None:
        """Keep what it takes to bring a layer of transformers' own back to before its update."""
        length = layer.get_seq_length() if type(layer) is DynamicLayer else 0
        # their tensors are replaced by longer ones, never written; those of a full cache need not be kept to be cut
        self._former[index] = length or dict(vars(layer))

    def take_back(self, layers: list[Any]) -> None:
        """Bring all layers back to before the step."""
        for index, former in self._former.items():
            layer = layers[index]
            if isinstance(former, int):
                layer.keys, layer.values = layer.keys[:, :, :former], layer.values[:, :, :former]
            else:
                vars(layer).clear()
                vars(layer).update(former)
        for layer in layers:
            if not isinstance(layer, MiKVLayer):
                continue
            layer.discard()
