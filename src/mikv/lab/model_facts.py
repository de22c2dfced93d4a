"""What is known of a model before its weights are loaded: configuration, tokenizer, bytes. Refuses what cannot work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mikv.cache.geometry import CacheGeometry, context_length, text_config
from mikv.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from mikv.lab.tasks.base import Sample
from mikv.lab.transcript import Transcript, longest
from mikv.models import dtype_name, readable_source

_LIBRARY_BYTES = 400 << 20  # Python with PyTorch and transformers
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ModelFacts:
    """A model's configuration and tokenizer, and the name it was asked for by."""

    name: str
    config: Any
    tokenizer: Any

    @classmethod
    def of_model(cls, name: str) -> Self:
        """Read them. Raises ModelNotFoundError, UnsupportedModelError."""
        from transformers import AutoConfig, AutoTokenizer

        source = readable_source(name)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            CacheGeometry.from_model_config(config)
            return cls(name, config, AutoTokenizer.from_pretrained(source, trust_remote_code=False))
        except OSError as error:
            raise ModelNotFoundError(f"cannot find the model {name!r}: {error}") from error
        except UnsupportedModelError:
            raise
        except ValueError as error:
            raise UnsupportedModelError(f"cannot read the configuration of {name!r}: {error}") from error

    def dtype(self, wanted: str | None) -> str:
        """The name of the dtype in which it computes: `wanted`, or its checkpoint's own."""
        return dtype_name(self.config, wanted)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def require_room(self, task: str, sample: Sample) -> None:
        """Raise ConfigError if the model cannot spell a sample, or was trained for fewer tokens than it may have."""
        if sample.chat and self.tokenizer.chat_template is None:
            raise ConfigError(
                f"task {task!r} is a conversation and {self.name} has no chat template; "
                "use a model that was made to chat, or the task text"
            )
        most = context_length(self.config)
        tokens = longest(self.tokenizer, sample)
        if most is not None and tokens > most:
            raise ConfigError(
                f"task {task!r} has a sample of {tokens:,} tokens with its answers, {self.name} was trained for "
                f"{most:,}; choose a shorter one by the task's options"
            )

    def require_same_tokens(self, other: "ModelFacts") -> None:
        """Raise ConfigError if another model, whose predictions are compared with, has other tokens."""
        if self.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise ConfigError(
                f"--reference {other.name} has other tokens than {self.name}, so their predictions cannot be compared; "
                "use the model that it was made from"
            )

    def bytes_needed(self, samples: Sequence[Sample], dtype: str) -> int:
        """About the most that a process takes: weights, and what the largest sample leaves in memory."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
            weights = sum(parameter.numel() for parameter in model.parameters())
        item = getattr(torch, dtype).itemsize
        return _LIBRARY_BYTES + weights * item + max(self._sample_bytes(sample, item) for sample in samples)

    def _sample_bytes(self, sample: Sample, item: int) -> int:
        geometry, config = CacheGeometry.from_model_config(self.config), text_config(self.config)
        tokens = longest(self.tokenizer, sample)
        # queries, keys and values as recorded; those of the full cache and of one under test
        heads = config.num_attention_heads
        numbers = tokens * sum((heads + 6 * layer.num_kv_heads) * layer.head_dim for layer in geometry.layers)
        read_on = tokens - Transcript(self.tokenizer, sample).num_context
        return numbers * item + read_on * config.vocab_size * _FLOAT32_BYTES


def require_memory(processes: int, bytes_each: int) -> None:
    """Raise ConfigError if this machine has no room for so many processes."""
    available = available_bytes()
    if processes * bytes_each > available:
        raise ConfigError(
            f"--processes {processes} would take about {processes * bytes_each / 1e9:.1f} GB, {bytes_each / 1e9:.1f} "
            f"each, and {available / 1e9:.1f} GB are available; use --processes {max(1, available // bytes_each)}"
        )


def available_bytes() -> int:
    """Memory that programs can have now, as Linux estimates it; elsewhere all that there is."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    [kilobytes] = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes * 1024
