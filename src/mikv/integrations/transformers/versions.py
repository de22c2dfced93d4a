"""What differs between the versions of transformers that mikv works with."""

import inspect
from typing import Any

from transformers import GenerationMixin

# 5.24 renamed `past_key_values`, and warns of the old name
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def as_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument with which models and `generate` of this version take a cache."""
    return {CACHE_ARGUMENT: cache}
