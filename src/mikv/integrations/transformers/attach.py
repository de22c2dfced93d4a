"""`attach`: make plain `model.generate()` and pipelines use a MiKVCache; `detach` undoes it."""

import logging
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from mikv.cache.config import MiKVConfig
from mikv.errors import CacheStateError, ConfigError, UnsupportedModelError
from mikv.integrations.transformers.cache import MiKVCache, as_config
from mikv.integrations.transformers.support import require_attachable
from mikv.integrations.transformers.versions import CACHE_ARGUMENT

logger = logging.getLogger("mikv")

_MARK = "_mikv_attachment"
_PREPARE = "_prepare_cache_for_generation"  # where `generate` makes its cache
_UPDATE = "_update_model_kwargs_for_generation"  # where it looks at what a step has returned


class Attachment:
    """The handle that `attach` returns; leaving it as a context manager detaches. `cache` is the newest cache used.

    Everything of it hangs on the model as plain attributes, so a copy of the model has an attachment of its own.
    """

    def __init__(self, model: PreTrainedModel, config: MiKVConfig) -> None:
        self.model, self.config = model, config
        self.cache: MiKVCache | None = None

    def start(self) -> Self:
        """Route the model's own cache creation to MiKVCache."""
        cache = MiKVCache(self.model.config, self.config)  # refuses what is unsupported
        if cache.why_idle:
            raise UnsupportedModelError(f"{cache.why_idle}; there is nothing to attach")
        setattr(self.model, _PREPARE, _Prepare(self))
        setattr(self.model, _UPDATE, _Update(self))
        setattr(self.model, _MARK, self)
        return self

    def stop(self) -> None:
        """Give the model back as it was. The caches that it has made go on working."""
        if getattr(self.model, _MARK, None) is self:
            for name in (_PREPARE, _UPDATE, _MARK):
                delattr(self.model, name)  # of the instance; the class's own methods show again

    def choose(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Put a MiKVCache into the arguments of a generation, or say why not."""
        given = model_kwargs.get(CACHE_ARGUMENT)
        asked, default = generation_config.cache_implementation, self.model.generation_config.cache_implementation
        reason = None
        if given is not None:  # a DynamicCache without layers yet is false, but the caller's choice
            reason = None if isinstance(given, MiKVCache) else f"it was given a {type(given).__name__}"
        elif generation_config.use_cache is False:
            reason = "use_cache is False"
        elif asked is not None and asked != default:
            reason = f"it was called with cache_implementation={asked!r}"
        else:
            if asked is not None:
                logger.info("generate uses a MiKVCache in place of the model's cache_implementation=%r", asked)
                generation_config.cache_implementation = None  # of this call only
            given = model_kwargs[CACHE_ARGUMENT] = MiKVCache(self.model.config, self.config)
            if generation_config.is_assistant:
                given.activate_past_recording()  # as transformers does with the caches that it makes for drafts
        if reason is not None:
            logger.warning("this generation does not use mikv, though the model is attached: %s", reason)
        elif not generation_config.is_assistant:
            self.cache = given

    def require_used(self, before: Any, after: Any) -> None:
        """Raise UnsupportedModelError if a step that was to use the MiKVCache `before` has used another."""
        if not isinstance(before, MiKVCache):
            return
        if after is not before:
            what = "none" if after is None else f"a {type(after).__name__}"
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has replaced the MiKVCache of this generation by {what}, as models do "
                "that change their position embeddings at a length; generate in one call from there on, or detach"
            )
        if not before.get_seq_length():
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has stored nothing in the cache it was given; mikv cannot serve it"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class _Hook:
    """In the place of a method of an attached model."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment


class _Prepare(_Hook):
    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.attachment.choose(generation_config, model_kwargs)
        prepare = getattr(type(self.attachment.model), _PREPARE)
        return prepare(self.attachment.model, generation_config, model_kwargs, *args, **kwargs)


class _Update(_Hook):
    def __call__(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.attachment.require_used(model_kwargs.get(CACHE_ARGUMENT), getattr(outputs, CACHE_ARGUMENT, None))
        update = getattr(type(self.attachment.model), _UPDATE)
        return update(self.attachment.model, outputs, model_kwargs, *args, **kwargs)


def attach(model: Any, config: MiKVConfig | str | None = None) -> Attachment:
    """Make `model.generate()` and pipelines use a fresh MiKVCache whenever the caller passes no cache.

    `model` may also be a pipeline, or a module that wraps a model, as PEFT's do; `config` may be the name of a preset.
    Returns a handle whose `cache` is the newest cache; used as a context manager it detaches at the end. Raises
    CacheStateError if the model is attached already, UnsupportedModelError for models that mikv cannot serve,
    ConfigError for anything that is no model.
    """
    generating = _generating(model)
    if getattr(generating, _MARK, None) is not None:
        raise CacheStateError("this model is attached already; call mikv.detach(model) first")
    require_attachable(generating)
    return Attachment(generating, as_config(config)).start()


def detach(model: Any) -> None:
    """Undo `attach`. Raises CacheStateError if the model is not attached."""
    attachment: Attachment | None = getattr(_generating(model), _MARK, None)
    if attachment is None:
        raise CacheStateError("this model is not attached; mikv.attach(model) does that")
    attachment.stop()


def _generating(model: Any) -> Any:
    """The model in a pipeline or a wrapper whose `generate` is called in the end."""
    if not isinstance(model, nn.Module):
        model = getattr(model, "model", model)  # of a pipeline
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach needs a model of transformers, got {type(model).__name__}")
    for module in model.modules():  # itself first
        if isinstance(module, GenerationMixin) and isinstance(module, PreTrainedModel):
            return module
    raise ConfigError(f"{type(model).__name__} holds no model of transformers that can generate text")
