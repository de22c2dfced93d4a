"""A GGUF file as a folder that transformers loads in a second: converted once, then kept in the user's cache.

<cache>/models/<file stem>-<digest>/    config, weights (safetensors), tokenizer, and complete.json: written last, it
                                        lists every file with its size; a folder that differs from it is never used
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mikv.errors import CheckpointError, MiKVError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

CONVERSION_VERSION = 2  # part of the digest: raise it when a conversion would give other files
_MARKER = "complete.json"
_UNFINISHED = ".partial"
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_HEADER_BYTES = 2**26  # more than any: names of tensors, tokens and merges; Gemma's 262,144 tokens take 15 MB
_NUM_SAMPLES, _SAMPLE_BYTES = 256, 16 * 1024


def cache_dir() -> Path:
    """The user's cache: $MIKV_CACHE_DIR, else $XDG_CACHE_HOME/mikv, else ~/.cache/mikv."""
    if own := os.environ.get("MIKV_CACHE_DIR"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "mikv"


def converted_folder(gguf: Path, dtype: "torch.dtype | None" = None) -> Path:
    """Where the conversion of `gguf` to `dtype` (default float32) is kept, whether or not it is there yet.

    The digest is of the file's identity (size, inode, time of its last change), of its header, and of 4 MB spread
    evenly over the rest: edits in place are seen, and a file of gigabytes is recognised in a tenth of a second.
    """
    status = gguf.stat()
    identity = (CONVERSION_VERSION, status.st_size, status.st_ino, status.st_dev, status.st_mtime_ns)
    digest = hashlib.sha256(f"{identity} {_dtype_name(dtype)}".encode())
    with gguf.open("rb") as file:
        digest.update(file.read(_HEADER_BYTES))
        for sample in range(_NUM_SAMPLES):
            file.seek(sample * max(0, status.st_size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return cache_dir() / "models" / f"{gguf.stem}-{digest.hexdigest()[:16]}"


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a whole conversion: every file that was written, in full length."""
    try:
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def convert_once(gguf: Path, dtype: "torch.dtype | None", report: Callable[[str], None]) -> Path:
    """The folder with the conversion of `gguf`, made if it is not there or damaged.

    Processes that convert the same file at the same time do not disturb each other. Raises CheckpointError if the file
    cannot be read as a model or the cache cannot be written.
    """
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{gguf} is not a GGUF file: it does not begin with the letters GGUF")
    folder = converted_folder(gguf, dtype)
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(folder)
        workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=_UNFINISHED, dir=folder.parent))
        try:
            model, tokenizer = _read(gguf, dtype, report)
            report(f"converting {gguf.name}, once: writing {folder.parent}")
            _write(model, tokenizer, workplace, gguf.name)
            _publish(workplace, folder)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot keep the converted model in {folder.parent}: {error}; "
            "set MIKV_CACHE_DIR to a folder on a disk with room"
        ) from error
    return folder


def _read(gguf: Path, dtype: "torch.dtype | None", report: Callable[[str], None]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mikv.model_folder import require_whole

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "trust_remote_code": False}
    try:
        _require_one_file(gguf)
        report(f"converting {gguf.name}, once: tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        report(f"converting {gguf.name}, once: weights")
        model, info = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_unpacked(),
        )
    except MiKVError:
        raise
    except Exception as error:  # readers meet damaged files with whatever their parsing runs into
        reason = str(error) or type(error).__name__
        if "architecture" in reason and "not supported" in reason:
            raise UnsupportedModelError(f"transformers cannot read {gguf}: {reason}") from error
        raise CheckpointError(f"cannot read the model in {gguf}: {reason}; is the file complete?") from error
    require_whole(str(gguf), info)
    # transformers 5.23 calls the model quantized although its weights are unpacked, and would refuse to save it
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    return model, tokenizer


def _require_one_file(gguf: Path) -> None:
    """Raise UnsupportedModelError for a part of a split model, naming the other parts."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    count = int(fields["split.count"].contents()) if "split.count" in fields else 1
    if count < 2:
        return
    names = [f"{_PART.sub('', gguf.stem)}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]
    missing = [name for name in names if not (gguf.parent / name).is_file()]
    way_out = f"get {', '.join(missing)}, then join" if missing else "join"
    raise UnsupportedModelError(
        f"{gguf} is one of {count} parts of a model; {way_out} them: llama-gguf-split --merge {names[0]} WHOLE.gguf"
    )


def _write(model: Any, tokenizer: Any, folder: Path, source: str) -> None:
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _require_same_tokenizer(source, tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / _MARKER).write_text(json.dumps({"source": source, "files": sizes}), encoding="utf-8")


def _unpacked() -> dict[str, Any]:
    """Arguments that make transformers unpack the weights; versions without GgufConfig always do."""
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def _require_same_tokenizer(source: str, tokenizer: Any, saved: Any) -> None:
    """A chat needs the template, and each of its special tokens as one id."""
    if saved.chat_template != tokenizer.chat_template:
        raise CheckpointError(f"the chat template of {source} was lost in its conversion")
    for token in tokenizer.all_special_tokens:
        ids = saved.encode(token, add_special_tokens=False)
        if tokenizer.convert_tokens_to_ids(token) not in ids or saved.decode(ids).strip() != token:
            raise CheckpointError(f"the special token {token!r} of {source} became {ids} in its conversion")


def _publish(workplace: Path, folder: Path) -> None:
    """Rename `workplace` to `folder` in one step. A complete folder that another process put there first stays."""
    while not is_complete(folder):
        try:
            workplace.rename(folder)  # fails if `folder` exists and is not empty
        except OSError:
            if not folder.exists():
                raise
            if not is_complete(folder):
                _discard(folder)


def _delete_abandoned(folder: Path) -> None:
    """Conversions to `folder` that were killed more than a day ago take disk space for nothing."""
    for path in folder.parent.glob(f".{folder.name}.*{_UNFINISHED}"):
        if time.time() - path.stat().st_mtime > 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Rename a damaged folder away before deleting it, so that no reader sees it half deleted."""
    grave = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".damaged", dir=folder.parent))
    try:
        folder.rename(grave / folder.name)
    except FileNotFoundError:
        pass  # another process was faster
    finally:
        shutil.rmtree(grave, ignore_errors=True)


def _dtype_name(dtype: "torch.dtype | None") -> str:
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")
