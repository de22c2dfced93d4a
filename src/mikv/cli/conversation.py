"""A conversation over one cache that lives through all turns. Knows messages and token ids; prints nothing.

`token_ids` is all that was said. The cache holds a beginning of it; whatever it lacks is fed with the next turn.
"""

import logging
from dataclasses import replace
from pathlib import Path

from mikv.atomic_file import write_file
from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import context_length
from mikv.chat_template import Message, next_turn_ids, require_chat_template
from mikv.cli import conversation_file
from mikv.cli.answer import Answer, AnswerOptions, answer
from mikv.cli.model_fingerprint import fingerprint
from mikv.cli.progress import Stopped
from mikv.errors import CacheStateError, CheckpointError, ConfigError
from mikv.integrations.transformers import MiKVCache
from mikv.models import LoadedModel

logger = logging.getLogger("mikv")


class Conversation:
    """Messages, their token ids, and the cache. Raises ConfigError if the model has no chat template."""

    def __init__(self, loaded: LoadedModel, config: MiKVConfig, system: str | None = None) -> None:
        require_chat_template(loaded.tokenizer, loaded.name)
        self.loaded, self.config = loaded, config
        self.restart(system)

    def restart(self, system: str | None) -> None:
        """Forget everything that was said."""
        self.messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self.token_ids: list[int] = []
        self._cache: MiKVCache | None = None

    @property
    def cache(self) -> MiKVCache:
        """An empty one if the former broke: the next turn then feeds everything anew."""
        if self._cache is None:
            self._cache = MiKVCache(self.loaded.model.config, self.config)
        return self._cache

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    def next_token_ids(self, text: str) -> list[int]:
        """All token ids that the answer to `text` continues."""
        messages = [*self.messages, {"role": "user", "content": text}]
        return [*self.token_ids, *next_turn_ids(self.loaded.tokenizer, messages, self.token_ids)]

    def say(self, text: str, options: AnswerOptions) -> Answer:
        """The answer to `text`. If it fails or is broken off by an exception, it is as if nothing had been said.

        Raises ConfigError if the model's context has no room for one more token.
        """
        token_ids = self.next_token_ids(text)
        options = self._within_context(options, len(token_ids))
        cache, num_cached = self.cache, self.cache.get_seq_length()
        self._cache = None  # until it is known to be whole, whatever interrupts this and wherever
        try:
            result = answer(self.loaded, token_ids, cache, options)
        except Stopped:
            self._cache = _taken_back(cache, num_cached)
            raise
        except CacheStateError:  # left broken by a step before: read everything anew, once
            cache = MiKVCache(self.loaded.model.config, self.config)
            result = answer(self.loaded, token_ids, cache, options)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": result.text}]
        self._cache, self.messages, self.token_ids = cache, self.messages + messages, [*token_ids, *result.token_ids]
        return result

    def _within_context(self, options: AnswerOptions, num_tokens: int) -> AnswerOptions:
        longest = context_length(self.loaded.model.config)
        if longest is None:
            return options
        if num_tokens >= longest:
            raise ConfigError(
                f"this turn would take the conversation to {num_tokens:,} tokens, {self.loaded.name} was trained for "
                f"{longest:,}; shorten it or begin anew with /reset"
            )
        return replace(options, max_new_tokens=min(options.max_new_tokens, longest - num_tokens))

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write words and cache to one file that only its owner can read, all or nothing.

        Raises CheckpointError if it exists and `overwrite` is False, or cannot be written.
        """
        record = {
            "model": self.loaded.name,
            "fingerprint": fingerprint(self.loaded.model),
            "messages": self.messages,
            "token_ids": self.token_ids,
            "cached_tokens": self.cache.get_seq_length(),
        }

        def write(temporary: Path) -> None:
            cache = temporary.with_name("cache")
            self.cache.save(cache)
            conversation_file.add_words(cache, temporary, record)

        write_file(path, write, overwrite=overwrite)

    def load(self, path: Path) -> None:
        """Continue what `save` wrote; of a conversation in two files, as older versions wrote, only the words.

        Raises CheckpointError, changing nothing, if it is damaged or was saved with other weights.
        """
        words = conversation_file.read_words(path, self.loaded.model.get_input_embeddings().num_embeddings)
        if words.token_ids is None:
            self.messages, self.token_ids, self._cache = words.messages, [], None
            return
        if words.fingerprint != fingerprint(self.loaded.model):
            raise CheckpointError(
                f"{path} was saved from the model {words.model!r}, this is {self.loaded.name!r} with other weights"
            )
        cache = MiKVCache.load(path, self.loaded.model.config)
        if cache.get_seq_length() != words.cached_tokens:
            raise CheckpointError(f"the words and the cache in {path} do not belong together")
        self.messages, self.token_ids, self._cache, self.config = words.messages, words.token_ids, cache, cache.config


def _taken_back(cache: MiKVCache, num_tokens: int) -> MiKVCache | None:
    """The cache as it was when it held its first `num_tokens`; None, to read them anew, if anything is in doubt."""
    if num_tokens == 0:
        return None
    try:
        cache.crop(num_tokens - max(layer.get_seq_length() for layer in cache.layers))
    except Exception as error:  # tokens were demoted, or slid out of a window, or a layer knows no lengths
        logger.debug("reading the conversation anew: %s", error)
        return None
    return cache if {layer.get_seq_length() for layer in cache.layers} == {num_tokens} else None
