"""`attach`: make plain `model.generate()` and pipelines use a MiKVCache; `detach` undoes it."""

import functools
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedModel

from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import text_config
from mikv.errors import CacheStateError
from mikv.integrations.transformers import attention
from mikv.integrations.transformers.cache import MiKVCache

_MARK = "_mikv_attachment"
_HOOK = "_prepare_cache_for_generation"


class Attachment:
    """The handle that `attach` returns; leaving it as a context manager detaches. `cache` is the newest cache made."""

    def __init__(self, model: PreTrainedModel, config: MiKVConfig) -> None:
        self.model, self.config = model, config
        self.cache: MiKVCache | None = None
        self._text_config = text_config(model.config)
        self._former_attention = self._text_config._attn_implementation

    def start(self) -> Self:
        """Route the model's own cache creation to MiKVCache."""
        attention.register()
        MiKVCache(self.model.config, self.config)  # refuses what is unsupported now, and switches the attention
        prepare = getattr(self.model, _HOOK)

        @functools.wraps(prepare)
        def prepare_mikv_cache(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            # a DynamicCache without layers yet is false, but the caller's choice
            chosen = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation
            if not chosen and generation_config.use_cache is not False:
                cache = MiKVCache(self.model.config, self.config)
                model_kwargs["past_key_values"] = cache
                if generation_config.is_assistant:
                    cache.activate_past_recording()  # as transformers does with the caches that it makes for drafts
                else:
                    self.cache = cache
            prepare(generation_config, model_kwargs, *args, **kwargs)

        setattr(self.model, _HOOK, prepare_mikv_cache)
        setattr(self.model, _MARK, self)
        return self

    def stop(self) -> None:
        """Give the model back as it was."""
        if getattr(self.model, _MARK, None) is not self:
            return
        delattr(self.model, _HOOK)  # the instance attribute; the class's own method shows again
        delattr(self.model, _MARK)
        self._text_config._attn_implementation = self._former_attention

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def attach(model: PreTrainedModel, config: MiKVConfig | None = None) -> Attachment:
    """Make `model.generate()` and pipelines use a fresh MiKVCache whenever the caller passes no cache.

    Returns a handle whose `cache` is the newest cache; used as a context manager it detaches at the end. Raises
    CacheStateError if the model is attached already, UnsupportedModelError for models MiKVCache refuses.
    """
    if getattr(model, _MARK, None) is not None:
        raise CacheStateError("this model is attached already; call mikv.detach(model) first")
    return Attachment(model, config or MiKVConfig()).start()


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`. Raises CacheStateError if the model is not attached."""
    attachment: Attachment | None = getattr(model, _MARK, None)
    if attachment is None:
        raise CacheStateError("this model is not attached; mikv.attach(model) does that")
    attachment.stop()
