"""The file of finished cells, and the journal beside it from which a killed run continues in the middle of a cell.

    OUT.jsonl           one record per finished cell (task, model, cache, …); only ever appended to
    OUT.partial.jsonl   one line per finished sample of an unfinished cell; gone when there is none

A last line without its end was being written when the run was killed; it is cut off. Nothing else is ever overwritten.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from mikv.errors import ConfigError
from mikv.lab.cells import from_json, to_json
from mikv.lab.examination import SampleResult
from mikv.records import Record, append_line, parse_lines, write_lines

KIND = "eval"
# what identifies a cell: two records that agree on all of these hold the same measurement
IDENTITY = ("task", "model", "cache", "samples", "seed", "dtype", "chunk", "config", "reference")

Key = str


def key_of(record: Mapping[str, Any]) -> Key:
    """What identifies the cell that a record is of."""
    return json.dumps([record.get(name) for name in IDENTITY], sort_keys=True)


class Ledger:
    """What is finished, in memory and, if there is a file, on disk. A context manager: the file is locked meanwhile."""

    def __init__(self, out: Path | None) -> None:
        """Read what earlier runs have left. Raises ConfigError if a file holds anything else or is in use."""
        self._out = out
        self._journal = None if out is None else out.with_suffix(".partial.jsonl")
        self._lock: TextIO | None = None
        self._records: dict[Key, Record] = {}
        self._samples: dict[Key, dict[int, Record]] = {}

    def __enter__(self) -> Self:
        if self._out is not None and self._journal is not None:
            self._lock = _locked(self._out)
            try:
                self._read(self._out, self._journal)
            except BaseException:
                self._lock.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None and self._out is not None:
            if not self._out.stat().st_size:
                self._out.unlink()
            self._lock.close()

    def record(self, cell: Mapping[str, Any]) -> Record | None:
        """The record of a cell, or None if it is not finished; of several the last."""
        return self._records.get(key_of(cell))

    def is_finished(self, cell: Mapping[str, Any]) -> bool:
        """Whether the cell was measured; one that was skipped is worth another try."""
        record = self.record(cell)
        return record is not None and record["skipped"] is None

    def samples(self, cell: Mapping[str, Any]) -> dict[int, SampleResult]:
        """The finished samples of an unfinished cell, by index."""
        return {index: from_json(result) for index, result in self._samples.get(key_of(cell), {}).items()}

    def add_sample(self, cell: Mapping[str, Any], index: int, result: SampleResult) -> None:
        """One more sample of a cell is finished."""
        stored = to_json(result)
        self._samples.setdefault(key_of(cell), {})[index] = stored
        if self._journal is not None:
            append_line(self._journal, {"cell": key_of(cell), "sample": index, "result": stored})

    def finish(self, cell: Mapping[str, Any], record: Record) -> None:
        """A cell is finished: its record is written and its samples leave the journal."""
        former = self.record(cell)
        self._records[key_of(cell)] = record
        if self._out is not None and (former is None or former["skipped"] != record["skipped"]):
            append_line(self._out, record)
        if self._samples.pop(key_of(cell), None) is not None:
            self._rewrite_journal()

    def _rewrite_journal(self) -> None:
        if self._journal is None:
            return
        lines = [
            {"cell": key, "sample": index, "result": result}
            for key, samples in self._samples.items()
            for index, result in samples.items()
        ]
        if lines:
            write_lines(self._journal, lines)
        else:
            self._journal.unlink(missing_ok=True)

    def _read(self, out: Path, journal: Path) -> None:
        for record in _read_mended(out, f'{{"kind": "{KIND}"', lambda record: record.get("kind") == KIND):
            self._records[key_of(record)] = record
        if not journal.exists():
            return
        for line in _read_mended(journal, '{"cell": ', lambda line: set(line) == {"cell", "sample", "result"}):
            finished = self._records.get(line["cell"])
            if finished is None or finished["skipped"] is not None:
                self._samples.setdefault(line["cell"], {})[line["sample"]] = line["result"]
        self._rewrite_journal()


def _read_mended(path: Path, beginning: str, is_ours: Callable[[Record], bool]) -> list[Record]:
    """The lines of a file, whose last one is completed, or cut off if it was being written when the run was killed.

    Raises ConfigError, changing nothing, if there are lines that are not ours; ours have this `beginning`.
    """
    content = path.read_text(encoding="utf-8", errors="replace")
    complete, end, last = content.rpartition("\n")
    is_torn = bool(last) and not _is_json(last)
    if is_torn and not (last.startswith(beginning) or beginning.startswith(last)):
        raise ConfigError(f"{path} does not end as mikv eval writes; choose another file or move it away")
    lines = parse_lines(complete if is_torn else content, path)
    if not all(map(is_ours, lines)):
        raise ConfigError(
            f"{path} holds something else than mikv eval writes there; choose another file or move it away"
        )
    if last:
        path.write_text(complete + end if is_torn else content + "\n", encoding="utf-8")
    return lines


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _locked(path: Path) -> TextIO:
    """The file, created if need be, for this process alone. Raises ConfigError."""
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}") from error
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"--out {path} is being written by another run; wait for it or choose another file"
        ) from error
    return file
