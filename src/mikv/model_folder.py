"""A folder or hub id as a model of transformers with its tokenizer: whole, or an error that names what is wrong.

transformers makes random weights of what files lack, and unpacks codes that it does not know as if they were weights.
Here what was missing is asked for, and what the headers say is looked at first.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mikv.errors import CheckpointError, MiKVError, ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

_MOST_NAMED = 3
_CODES = ("I8", "U8", "I16", "U16", "I32", "U32", "F8", "F4", "F6")  # beginnings of safetensors' names of dtypes
_OTHER_HEADS = ("Classification", "QuestionAnswering", "RewardModel")


def load_folder(name: str, source: Path | str, dtype: "torch.dtype | None", trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer. Raises what `mikv.models.load_model` says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _errors_of_transformers(name, source):
        _require_readable(name, source, trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    require_whole(name, info)
    _require_vocabulary(name, model, tokenizer)
    return model, tokenizer


def require_whole(name: str, info: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming them, for tensors that transformers did not find, or found in another shape."""
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{name} lacks {_listed(missing)}; its files are incomplete")
    if mismatched := sorted(info["mismatched_keys"]):
        tensor, found, wanted = mismatched[0]
        raise CheckpointError(
            f"{name}: {tensor} is {tuple(found)}, but {tuple(wanted)} by config.json; one of them is damaged"
        )


def _require_readable(name: str, source: Path | str, trust_remote_code: bool) -> None:
    """Refuse by configuration and headers what would come out wrong, before memory is taken."""
    from transformers import AutoConfig, PreTrainedConfig

    from mikv.integrations.discovery import QUANT_METHOD
    from mikv.integrations.quantizer.foreign import method_of, require_readable
    from mikv.integrations.quantizer.tensor_files import read_json

    folder = source if isinstance(source, Path) else None
    raw = read_json(folder / "config.json") if folder else PreTrainedConfig.get_config_dict(source)[0]
    require_readable(name, raw, folder)
    _require_text_model(name, raw)
    method = method_of(raw, folder)
    if folder is not None and method == QUANT_METHOD:
        _require_own_config(folder, raw)
    elif folder is not None and method is None:
        _require_no_codes(name, folder)
    AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def _require_own_config(folder: Path, raw: Mapping[str, Any]) -> None:
    from mikv.integrations.quantizer.checksums import require_config
    from mikv.integrations.quantizer.completeness import require_layers
    from mikv.integrations.quantizer.config import BCQConfig
    from mikv.integrations.quantizer.tensor_files import weight_files

    config = BCQConfig.from_dict(raw["quantization_config"])
    if not (files := weight_files(folder)):
        raise CheckpointError(f"{folder} has no .safetensors file; the folder is incomplete")
    if config.has_checksums:
        require_config(folder, files)
    require_layers(raw.get("num_hidden_layers"), files)


def _require_no_codes(name: str, folder: Path) -> None:
    from mikv.integrations.quantizer.tensor_files import INDEX, WEIGHTS, headers, weight_files

    if not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        return
    for tensor, header in headers(weight_files(folder)).items():
        if tensor.endswith("weight") and header.dtype.startswith(_CODES):
            raise UnsupportedModelError(
                f"{name}: {tensor} is {header.dtype}, codes of a quantized model whose config.json does not say by "
                "which method; use the model that it was made from"
            )


def _require_text_model(name: str, raw: Mapping[str, Any]) -> None:
    for architecture in raw.get("architectures") or ():
        if str(architecture).endswith(_OTHER_HEADS):
            raise UnsupportedModelError(f"{name} is a {architecture}, which does not generate text")


def _require_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    last = max(tokenizer.get_vocab().values(), default=-1)
    if rows is not None and last >= rows:
        token = tokenizer.convert_ids_to_tokens(last)
        raise CheckpointError(
            f"the tokenizer of {name} has tokens up to {last} ({token!r}), but the model's embedding has {rows} rows; "
            "they are not of one model, or resize_token_embeddings was forgotten"
        )


@contextmanager
def _errors_of_transformers(name: str, source: Path | str) -> Iterator[None]:
    """What is raised for a model that cannot be loaded, as one line of ours."""
    from safetensors import SafetensorError

    is_folder = isinstance(source, Path)
    try:
        yield
    except MiKVError:
        raise  # what our own quantizer says of a checkpoint
    except SafetensorError as error:
        raise CheckpointError(f"the weights of {name!r} are damaged: {error}") from error
    except OSError as error:
        place = "in this folder" if is_folder else "on the Hugging Face hub or in its local cache"
        raise ModelNotFoundError(f"cannot find the model {name!r} {place}: {_first_line(error)}") from error
    except (ValueError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{name} comes with Python code of its own, which is not run unless you ask for it: read it, then pass "
                "trust_remote_code=True to load_model, or --trust-remote-code to a command that has it"
            ) from error
        raise UnsupportedModelError(f"transformers cannot load {name!r}: {_first_line(error)}") from error
    except Exception as error:  # readers meet damaged files with whatever their parsing runs into
        raise CheckpointError(
            f"cannot read the model {name!r}: {_first_line(error)}; its files are damaged or contradict each other"
        ) from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more tensors" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
