"""The 4-bit codes of a GGUF file as a model's binary codings, without rounding weights a second time.

transformers unpacks GGUF to float32 and, for some architectures, puts rows in another order. A row of a layer is
therefore found in the file by its values: rows that are equal bit for bit have the same blocks, or blocks that stand
for the same numbers.
"""

import logging
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mikv.errors import CheckpointError, ConfigError
from mikv.integrations.quantizer import modules
from mikv.integrations.quantizer.config import IMPORT, BCQConfig
from mikv.integrations.quantizer.quantization import (
    LayerReport,
    QuantizationReport,
    mark_quantized,
    require_plain,
)
from mikv.weights.imported import from_q4_0, from_q4_1
from mikv.weights.linear import BCQLinear
from mikv.weights.solve import output_error
from mikv.weights.weight import BCQWeight

logger = logging.getLogger("mikv")

_READERS: dict[str, Callable[[Tensor, int], BCQWeight]] = {"Q4_0": from_q4_0, "Q4_1": from_q4_1}

Rows = dict[bytes, Any]  # the blocks of a row, uint8 (bytes,), by a digest of its float32 values


def import_gguf(
    model: PreTrainedModel, file: Path, *, on_progress: Callable[[LayerReport, int, int], None] | None = None
) -> QuantizationReport:
    """Exchange, in place, the linear layers of `model` that `file` holds as Q4_0 or Q4_1 for their own codes.

    `model` is what transformers made of the file in float32. Layers of other types, embeddings among them, stay as they
    are and are named in the log. Raises ConfigError if there is no layer to import, CheckpointError for a file that
    cannot be read.
    """
    start = time.perf_counter()
    require_plain(model)
    model.eval()
    config = BCQConfig(bits=4, group_size=32, method=IMPORT)
    config.uniform = config.offset = True
    modules.fix_skipped(model, config)
    by_kind = _rows(file)
    names = modules.linear_names(model, config)
    codings = {name: _coding(modules.matrix(model.get_submodule(name)), by_kind) for name in names}
    config.modules_to_not_convert = _kept(file, config, [name for name, own in codings.items() if own is None])
    imported = {name: own for name, own in codings.items() if own is not None}
    if not imported:
        raise ConfigError(
            f"no linear layer of the model is Q4_0 or Q4_1 in {file.name}; load the file in float32, or quantize it "
            "with another method"
        )
    reports: list[LayerReport] = []
    for name, coding in imported.items():
        reports.append(_exchange(model, name, coding))
        if on_progress is not None:
            on_progress(reports[-1], len(reports), len(imported))
    mark_quantized(model, config)
    return QuantizationReport(tuple(reports), IMPORT, time.perf_counter() - start)


def _rows(file: Path) -> dict[str, Rows]:
    """All rows of 4-bit matrices, by type."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    rows: dict[str, Rows] = {kind: {} for kind in _READERS}
    try:
        for tensor in GGUFReader(file).tensors:
            kind = tensor.tensor_type.name
            if kind in rows and tensor.data.ndim == 2:
                values = dequantize(tensor.data, tensor.tensor_type)
                rows[kind] |= {_digest(row): blocks for row, blocks in zip(values, tensor.data, strict=True)}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; is the file complete?") from error
    return rows


def _coding(weight: Tensor, by_kind: dict[str, Rows]) -> BCQWeight | None:
    """The coding of float32 (M, K) from the file's blocks, or None unless one type has all its rows."""
    digests = [_digest(row) for row in weight.cpu().numpy()]
    for kind, rows in by_kind.items():
        if all(digest in rows for digest in digests):
            blocks = torch.from_numpy(np.stack([rows[digest] for digest in digests]))
            return _READERS[kind](blocks, weight.shape[1])
    return None


def _digest(row: Any) -> bytes:
    return blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest()


def _exchange(model: PreTrainedModel, name: str, coding: BCQWeight) -> LayerReport:
    start = time.perf_counter()
    old = model.get_submodule(name)
    weight = modules.matrix(old)
    error = output_error(weight, coding)
    new = BCQLinear.from_weights({coding.bits: coding}, bias=modules.bias_of(old))
    modules.exchange(model, name, new)
    new.arrange()
    seconds = time.perf_counter() - start
    return LayerReport(name, coding.bits, coding.group_size, coding.bits_per_weight, weight.numel(), error, seconds)


def _kept(file: Path, config: BCQConfig, others: list[str]) -> list[str]:
    """The layers that stay as they are; those that are in the file in another type are logged."""
    if others:
        logger.warning(
            "%d linear layers are not Q4_0 or Q4_1 in %s and stay as they are: %s", len(others), file.name, others
        )
    return sorted({*(config.modules_to_not_convert or []), *others})
