"""Where `mikv quantize` writes: which folders it may replace, and how a model comes to stand there whole or not at all.

    OUT                                  the model: the old one until the new one takes its place
    .OUT.<fingerprint>.unfinished/       beside it, while there is work: what is finished, then the new model
        command.json  lock  layers/  costs/  partial/  new/  old/

Paths are compared as the file system does, so that neither links nor the case of letters hide that two are the same.
Knows nothing about models but which files of them mikv writes.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mikv.errors import CheckpointError, ConfigError
from mikv.integrations.discovery import QUANT_METHOD

_CONFIG, _INDEX, _WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
_OURS = re.compile(  # besides the weights: what transformers writes for a causal model and its tokenizer
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|chat_template\.(jinja|json)|merges\.txt|vocab\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model"
)
_TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
NEW, PARTIAL, _OLD = "new", "partial", "old"
_LONGEST_NAME = 150  # bytes of OUT's name that the name of the folder beside it has, which file systems limit to 255


@dataclass(frozen=True)
class Place:
    """OUT, as it was asked for and as it really is. See the module."""

    name: Path
    out: Path

    @classmethod
    def open(cls, name: Path, model: Path | None, *, overwrite: bool) -> "Place":
        """The place for what is made of `model`, a folder or file. Raises ConfigError unless it can be put there."""
        place = cls(name, _real(name.expanduser()))
        if model is not None:
            place._require_apart(model)
        place.require_free(overwrite=overwrite)
        return place

    def require_free(self, *, overwrite: bool) -> None:
        """Raise ConfigError unless there is nothing, or a model of ours that is to be replaced."""
        if not os.path.lexists(self.out):
            return
        if self.out.is_symlink() or not self.out.is_dir():
            raise ConfigError(f"{self.name} is {'a link' if self.out.is_symlink() else 'a file'}; name another folder")
        if self.out.is_mount() or _is_within(Path.cwd(), self.out):
            what = "a mount point" if self.out.is_mount() else "the folder in which this command runs, or holds it"
            raise ConfigError(f"{self.name} is {what}, which cannot be replaced; name a folder that does not exist yet")
        if not overwrite:
            raise ConfigError(f"{self.name} exists; pass --overwrite to replace it, or name another folder")
        if not (self.out / _CONFIG).is_file():
            raise ConfigError(f"{self.name} is not the folder of a model, so --overwrite does not replace it")
        if _quant_method(self.out / _CONFIG) != QUANT_METHOD:
            raise ConfigError(f"mikv did not write the model in {self.name}, so --overwrite does not replace it")
        if others := _not_ours(self.out):
            more = f" and {len(others) - 1} more" if others[1:] else ""
            raise ConfigError(
                f"{self.name} holds {others[0]}{more}, which mikv did not write, so --overwrite does not replace it; "
                "move that away, or name another folder"
            )

    def _require_apart(self, model: Path) -> None:
        """Raise ConfigError if one of OUT and the model is, or is within, the other."""
        files = [model, *model.iterdir()] if model.is_dir() else [model]
        if self.out.exists() and self.out.samefile(model):
            raise ConfigError(
                f"{self.name} is the model itself, which --overwrite does not replace; name another folder"
            )
        if model.is_dir() and _is_within(self.out, model.resolve()):
            raise ConfigError(f"{self.name} lies in the model's own folder {model}; name a folder outside of it")
        if any(_is_within(file.resolve(), self.out) for file in files):
            raise ConfigError(f"{self.name} holds the model {model} that is to be quantized; name another folder")

    def require_room(self, num_bytes: int, work: Path) -> None:
        """Raise ConfigError if the disk has less, what is in `work` already not counted."""
        done = sum(file.stat().st_size for file in work.glob("layers/*.safetensors"))
        free = shutil.disk_usage(self.out.parent).free
        if free < num_bytes - done:
            sizes = [f"{number / 2**20:,.0f} MiB" for number in (free, num_bytes - done)]
            raise ConfigError(
                f"{self.out.parent} has {sizes[0]} free, and quantizing into {self.name} takes about {sizes[1]} "
                "while it is written; make room, or name a folder on another disk"
            )

    def work(self, fingerprint: Mapping[str, Any]) -> Path:
        """The folder for work on what `fingerprint` says, and on nothing else."""
        text = json.dumps(fingerprint, sort_keys=True)
        short = os.fsdecode(os.fsencode(self.out.name)[:_LONGEST_NAME])
        return self.out.parent / f".{short}.{sha256(text.encode()).hexdigest()[:12]}.unfinished"

    def others(self, work: Path) -> list[Path]:
        """Folders with work on the same OUT under other settings."""
        stem, _, suffix = work.name.rsplit(".", 2)
        alike = re.compile(rf"{re.escape(stem)}\.[0-9a-f]{{12}}\.{suffix}")
        return [path for path in self.out.parent.iterdir() if path != work and alike.fullmatch(path.name)]

    def publish(self, work: Path, *, overwrite: bool) -> None:
        """Let the model in work/new take its place. Raises MiKVError saying where everything is."""
        new, old = work / NEW, work / _OLD
        self.require_free(overwrite=overwrite)  # things may have come since
        if os.path.lexists(self.out):
            _move(self.out, old, f"{self.name} is as it was, and the new model is whole in {new}")
        try:
            _move(new, self.out, f"the new model is whole in {new}")
        except BaseException as error:
            if not old.exists():
                raise
            _move(old, self.out, f"the old model is whole in {old}, and the new one in {new}")
            if isinstance(error, CheckpointError):
                raise CheckpointError(f"{error}; {self.name} has the old one again") from error
            raise


@contextmanager
def workplace(place: Place, fingerprint: Mapping[str, Any]) -> Iterator[Path]:
    """The folder for work on this, made or found again, and locked. Gone after success, and where it holds no work.

    Raises ConfigError if it cannot be made or another process works in it.
    """
    work = place.work(fingerprint)
    try:
        work.mkdir(exist_ok=True)
        lock = FileLock(work / "lock", blocking=False)
        lock.acquire()
        (work / "command.json").write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")
    except Timeout as error:
        raise ConfigError(f"another mikv quantize with these settings is at work on {place.name}") from error
    except OSError as error:
        _forget(work)
        raise ConfigError(
            f"{place.name}: cannot write into {place.out.parent}: {error.strerror or error}; name a folder elsewhere"
        ) from error
    try:
        _take_back(place, work)
        yield work
        shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()
        _forget(work)


def kept_in(work: Path) -> str:
    """What a folder for work holds, for people; nothing if it holds none."""
    count = {name: len(list((work / name).glob("*.safetensors"))) for name in ("layers", "costs")}
    kept = [f"{count['layers']} layers"] if count["layers"] else []
    kept += [f"what rounding does to {count['costs']} layers"] if count["costs"] else []
    kept += [what for name, what in ((NEW, "the whole new model"), (_OLD, "the old model")) if (work / name).exists()]
    return " and ".join(kept)


def _forget(work: Path) -> None:
    """Remove what is half done, and the folder if it holds nothing else."""
    shutil.rmtree(work / PARTIAL, ignore_errors=True)
    if not kept_in(work):
        shutil.rmtree(work, ignore_errors=True)


def _take_back(place: Place, work: Path) -> None:
    """Tidy up after a process that was killed while models changed places."""
    if (work / _OLD).exists():
        if os.path.lexists(place.out):
            shutil.rmtree(work / _OLD)  # the new one stands
        else:
            _move(work / _OLD, place.out, f"the old model is whole in {work / _OLD}")
    for name in (NEW, PARTIAL):
        shutil.rmtree(work / name, ignore_errors=True)


def _move(source: Path, target: Path, otherwise: str) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        raise CheckpointError(f"cannot move {source} to {target}: {error.strerror or error}; {otherwise}") from error


def sync(folder: Path) -> None:
    """Wait until the disk has all files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _real(name: Path) -> Path:
    """The absolute path without links. Raises ConfigError for a link, and for what cannot be a path."""
    try:
        if name.is_symlink():
            target = name.readlink()
            raise ConfigError(f"{name} is a link to {target}; name the folder itself, or one that does not exist yet")
        with suppress(FileNotFoundError):
            os.lstat(name)
        if not name.parent.is_dir():
            raise ConfigError(f"{name}: there is no folder {name.parent}")
        return name.resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{name} cannot be a folder: {getattr(error, 'strerror', None) or error}") from error


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path, there or not, is the folder or below it."""
    return folder.exists() and any(above.exists() and above.samefile(folder) for above in (path, *path.parents))


def _quant_method(config: Path) -> object:
    return _json(config).get("quantization_config", {}).get("quant_method")


def _json(file: Path) -> Any:
    """An object of objects, empty if it is not."""
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if isinstance(value, dict)}
    return {}


def _not_ours(folder: Path) -> list[str]:
    """Names of what mikv did not write."""
    weights = {_WEIGHTS}
    if (folder / _INDEX).is_file():
        weights = {_INDEX, *map(str, _json(folder / _INDEX).get("weight_map", {}).values())}
    return [
        path.name
        for path in sorted(folder.iterdir())
        if not (_is_file(path) and (path.name in weights or _OURS.fullmatch(path.name)))
        and not (path.name == _TEMPLATES and path.is_dir() and _are_templates(path))
    ]


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _are_templates(folder: Path) -> bool:
    return not folder.is_symlink() and all(_is_file(path) and path.suffix == ".jinja" for path in folder.iterdir())
