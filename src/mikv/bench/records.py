"""What `mikv bench` measured as records: from a result to its rows, and from a file to the rows of one bench."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mikv.errors import ConfigError
from mikv.records import Record, read_lines

BENCHES = ("attention", "generate", "matmul")


def records_of(bench: str, result: Mapping[str, Any]) -> list[Record]:
    """The rows of a result, each with the bench's name and everything else that the result says."""
    common = {key: value for key, value in result.items() if key != "rows"}
    # a row's own numbers win over the whole run's of the same name
    return [{"bench": bench} | common | row for row in result["rows"]]


def read_records(path: Path) -> list[Record]:
    """The records of one bench. Raises ConfigError if the file has others, or none."""
    records = read_lines(path)
    if not records or any(record.get("bench") not in BENCHES for record in records):
        raise ConfigError(f"{path} has no records of mikv bench; `mikv bench generate --out {path}` writes them")
    if len({record["bench"] for record in records}) > 1:
        raise ConfigError(f"{path} has records of several benches; plot them one by one")
    return records
