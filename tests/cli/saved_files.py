"""What a file of a saved model says, to compare two of them."""

import json
from pathlib import Path


def content(file: Path) -> object:
    """All bytes; of tensors the header by its names, whose order safetensors leaves to chance."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return data
    stop = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:stop]), data[stop:]
