"""mikv in Hugging Face transformers: the cache, the attention function, attach and detach."""

from mikv.integrations.transformers.attach import Attachment, attach, detach
from mikv.integrations.transformers.cache import MiKVCache
from mikv.integrations.transformers.memory import LayerMemory, MemoryReport

__all__ = ["Attachment", "LayerMemory", "MemoryReport", "MiKVCache", "attach", "detach"]
