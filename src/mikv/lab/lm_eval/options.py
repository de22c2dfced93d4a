"""What the model type of lm-evaluation-harness may be asked for: its arguments, and how a task may have it answer."""

from collections.abc import Mapping
from typing import Any

from mikv.cache_names import NamedCache, parse_cache
from mikv.errors import ConfigError
from mikv.models import DTYPES

PASSED_ON = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "max_length",
    "prefix_token_id",
    "think_end_token",
)
_DEFAULT_DEVICE = "cuda:0"  # what lm-eval passes if the user passes nothing
_ONLY_FOR_SAMPLING = {"temperature", "top_p", "top_k", "min_p"}
_OF_GREEDY = {"until", "do_sample", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}


def named_cache(preset: str | None, config: str | None, cache: str | None) -> NamedCache:
    """The cache that exactly one of the arguments, or none, asks for."""
    given = {name: value for name, value in (("preset", preset), ("config", config), ("cache", cache)) if value}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(f'{k}={v}' for k, v in given.items())} each name a cache; pass one of them")
    if config is not None and not str(config).endswith(".json"):
        raise ConfigError(f"config={config} is not the name of a .json file; a preset is passed as preset={config}")
    return parse_cache(str(cache) if cache else f"mikv:{config or preset or 'balanced'}")


def check_counts(chunk: int, probe: int) -> None:
    """Raise ConfigError for numbers of tokens that cannot work."""
    for option, value, least in (("chunk", chunk, 1), ("probe", probe, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{option}={value} must be a whole number, {least} or more")


def check_options(
    batch_size: int | str | None, device: str | None, dtype: str | None, options: Mapping[str, Any]
) -> None:
    """Refuse what HFLM would do and this model does not."""
    if str(batch_size or 1) != "1":
        raise ConfigError(f"batch_size={batch_size}: mikv reads one request at a time; leave --batch_size out")
    if device not in (None, "cpu", _DEFAULT_DEVICE):
        raise ConfigError(f"device={device}: mikv computes on the CPU; leave --device out")
    if dtype not in (None, "auto", *DTYPES):
        raise ConfigError(f"dtype={dtype} is not one of auto, {', '.join(DTYPES)}")
    if unknown := sorted(set(options) - set(PASSED_ON)):
        own = ("pretrained", "preset", "config", "cache", "chunk", "probe", "dtype")
        raise ConfigError(
            f"mikv does not know the model argument {', '.join(unknown)}; it takes {', '.join((*own, *PASSED_ON))}"
        )


def check_is_greedy(task: str | None, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the generation settings of a request ask for more than its likeliest tokens."""
    way_out = "answers are generated greedily; pass --gen_kwargs do_sample=False"
    if settings.get("do_sample") or (settings.get("do_sample") is None and float(settings.get("temperature") or 0) > 0):
        raise ConfigError(f"task {task} samples its answers ({dict(settings)}): {way_out}")
    if unknown := sorted(set(settings) - _OF_GREEDY - _ONLY_FOR_SAMPLING):
        raise ConfigError(f"task {task} sets {', '.join(unknown)} for generation, which mikv does not know: {way_out}")
