"""The words of a conversation in the file of its cache: one safetensors file, so that they cannot come apart.

metadata  mikv                      what MiKVCache.save writes
          mikv.conversation         the words as JSON
          mikv.conversation.sha256  of that JSON
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mikv.chat_template import Message
from mikv.errors import CheckpointError

FORMAT_VERSION = 2  # of 1, the words were a JSON file beside the cache
_KEY = "mikv.conversation"
_CHECKSUM = f"{_KEY}.sha256"
_MOST_BYTES = 64 << 20  # of words in a file of their own


@dataclass(frozen=True)
class Words:
    """What was said. Without token ids, which older versions wrote for other fingerprints, the cache is of no use."""

    messages: list[Message]
    model: str = ""
    fingerprint: str = ""
    token_ids: list[int] | None = None
    cached_tokens: int = 0


def add_words(cache: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Write `target`: the safetensors file `cache` with `record` in its metadata."""
    words = json.dumps({"version": FORMAT_VERSION, **record})
    with cache.open("rb") as source, target.open("wb") as out:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header["__metadata__"] |= {_KEY: words, _CHECKSUM: _checksum(words)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, out, 1 << 20)


def read_words(path: Path, vocabulary: int) -> Words:
    """The words in `path`, or in `path`.json of an older version. Raises CheckpointError if they cannot be right."""
    beside = path.with_name(f"{path.name}.json") if path.name else path
    try:
        if path.is_file() and (metadata := _metadata(path)) is not None and _KEY in metadata:
            return _require(path, metadata[_KEY], metadata.get(_CHECKSUM), vocabulary)
        if beside.is_file():
            return _read_old(beside)
        path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    raise _not_one(path, "mikv chat wrote no words into it" if path.is_file() else "it is not a regular file")


def _metadata(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return None


def _require(path: Path, text: str, checksum: str | None, vocabulary: int) -> Words:
    record = _parsed(path, text)
    version = record.get("version")
    if type(version) is not int:
        raise _not_one(path, "it has no version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this mikv reads up to {FORMAT_VERSION}; update mikv"
        )
    if checksum != _checksum(text):
        raise CheckpointError(f"{path} is damaged: its words have another checksum than those that were saved")
    model, mark = record.get("model"), record.get("fingerprint")
    if not isinstance(model, str) or not isinstance(mark, str):
        raise _not_one(path, "it does not name its model")
    ids, cached = record.get("token_ids"), record.get("cached_tokens")
    if not isinstance(ids, list) or not all(type(number) is int and 0 <= number < vocabulary for number in ids):
        raise _not_one(path, f"its token ids are not all from 0 to {vocabulary - 1:,}")
    if type(cached) is not int or not 0 <= cached <= len(ids):
        raise _not_one(path, f"its cache is said to hold {cached!r} of {len(ids):,} tokens")
    return Words(_messages(path, record.get("messages")), model, mark, ids, cached)


def _read_old(path: Path) -> Words:
    if path.stat().st_size > _MOST_BYTES:
        raise _not_one(path, f"it has {path.stat().st_size:,} bytes")
    return Words(_messages(path, _parsed(path, path.read_text(encoding="utf-8")).get("messages")))


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_one(path, f"{error}") from error
    if not isinstance(record, dict):
        raise _not_one(path, "it holds no JSON object")
    return record


def _messages(path: Path, messages: Any) -> list[Message]:
    """A system message or none, then questions and answers by turns, all of them text."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise _not_one(path, "it holds no messages")
    roles = [one.get("role") for one in messages]
    said = roles[1:] if roles[:1] == ["system"] else roles
    if said != ["user", "assistant"] * (len(said) // 2):
        raise _not_one(path, "its questions and answers do not take turns")
    if not all(_is_text(one.get("content")) for one in messages):
        raise _not_one(path, "a message is no text")
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode("utf-8")


def _checksum(words: str) -> str:
    return sha256(words.encode()).hexdigest()


def _not_one(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a saved conversation: {reason}")
