"""What a saved layer must be: checked when it is written, and before anything is made of what was read.

A saved layer is tensors by name and the rest as JSON types, as `TwoTierLayer.state` gives them. A file may hold
anything under these names, with checksums that fit: every check raises ValueError naming the part, and allocates
nothing of a size that only the JSON part claims. B rows, G KV heads, T columns, D head dim.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mikv.cache.config import MiKVConfig
from mikv.cache.formats import layer_formats
from mikv.cache.tiers import Tier
from mikv.formats import BLOCK_TOKENS, Format, QuantizedFormat

Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]

MODEL_DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_FIELDS = {
    "empty": {"kind"},
    "warm_up": {"kind", "dtype", "columns", "shape"},
    "packed": {"kind", "dtype", "columns", "shape", "counts"},
}
_LARGEST = 2**31 - 1  # positions are int32
_MOST_EMPTY_COLUMNS = 2**20  # padding in every row; no tensor bounds them
_LARGEST_HALF = 65504.0
_BALANCER = (5e-5, 2e4)  # those that are fitted lie well within
_ROUNDING = 1e-4  # of a correlation; what the fit adds to the diagonal is far more
_FLOAT8_NAN = 0x7F  # of float8_e4m3fn, whatever the sign


@dataclass(frozen=True)
class Extent:
    """What the layers of a cache have in common. `padding` is None if the layer does not know."""

    rows: int
    columns: int
    padding: list[list[tuple[int, int]]] | None = None


def require_layer(config: MiKVConfig, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Extent | None:
    """Raise ValueError unless this is the state of a `TwoTierLayer`. None if it is empty."""
    kind = meta.get("kind")
    if kind not in tuple(_FIELDS):
        raise ValueError(f"its kind is {kind!r}, not one of {', '.join(_FIELDS)}")
    require_fields(meta, _FIELDS[kind], "the layer")
    if kind == "empty":
        _require_tensors(tensors, {})
        return None
    shape = whole_numbers(meta["shape"], "shape", 3, at_least=1)
    if meta["dtype"] not in tuple(MODEL_DTYPES):
        raise ValueError(f"its dtype is {meta['dtype']!r}, not one of {', '.join(MODEL_DTYPES)}")
    dtype = MODEL_DTYPES[meta["dtype"]]
    columns = meta["columns"]
    extent = _require_columns(columns, rows=shape[0])
    if kind == "warm_up":
        _require_tensors(tensors, _expected_warm_up(config, shape, extent.columns, dtype))
        _require_finite(tensors, tensors)
        _require_statistics(tensors)
        return extent
    tiers = _tiers(config, shape, dtype)
    _require_tensors(tensors, _expected_packed(config, tensors, shape, tiers))
    _require_transforms(tensors, shape[2])
    counts = _require_counts(meta["counts"], tensors, shape, columns["num_tokens"], tiers)
    for name, tier in tiers.items():
        _require_numbers(tensors, name, tier)
    _require_slots(tensors, counts["high"], columns["num_tokens"])
    return extent


def require_plain_layer(tensors: Mapping[str, Tensor], num_columns: int, window: int | None) -> Extent | None:
    """Raise ValueError unless these are the keys and values of a layer that is not compressed. None if it is empty."""
    if not tensors and num_columns == 0:
        return None
    if set(tensors) != {"keys", "values"}:
        raise ValueError(f"it has the tensors {sorted(tensors)}, not keys and values")
    keys, values = tensors["keys"], tensors["values"]
    held = num_columns if window is None else min(num_columns, max(0, window - 1))
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != held:
        raise ValueError(
            f"keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)} are not those of the last "
            f"{held} of {num_columns} columns"
        )
    if keys.dtype != values.dtype or keys.dtype not in MODEL_DTYPES.values():
        raise ValueError(f"keys are {keys.dtype} and values {values.dtype}, not floats of one kind")
    _require_finite(tensors, tensors)
    return Extent(keys.shape[0], num_columns)


def require_alike(extents: Mapping[int, Extent | None]) -> None:
    """Raise ValueError unless all layers, by number, are empty or have the same rows, columns and padding."""
    found = {i: extent for i, extent in extents.items() if extent is not None}
    if not found:
        return
    first = min(found)
    known = next((extent.padding for extent in found.values() if extent.padding is not None), None)
    for i, extent in extents.items():
        if extent is None:
            raise ValueError(f"layer {i} is empty, but layer {first} has {found[first].columns} columns")
        if (extent.rows, extent.columns) != (found[first].rows, found[first].columns):
            raise ValueError(
                f"layer {i} has {extent.columns} columns in {extent.rows} rows, but layer {first} has "
                f"{found[first].columns} in {found[first].rows}"
            )
        if extent.padding is not None and extent.padding != known:
            raise ValueError(f"layer {i} has its padding elsewhere than other layers")


def require_fields(state: object, names: Iterable[str], what: str) -> None:
    """Raise ValueError unless `state` is a mapping with exactly these names."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{what} is not a mapping of names to values")
    if missing := sorted(set(names) - set(state)):
        raise ValueError(f"{what} has no {missing[0]!r}")
    if unknown := sorted(set(state) - set(names)):
        raise ValueError(f"{what} has an unknown {unknown[0]!r}")


def whole_number(value: object, what: str, at_least: int = 0, at_most: int = _LARGEST) -> int:
    """`value`, which must be a whole number in that range."""
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
        raise ValueError(f"{what} is {value!r:.80}, not a whole number from {at_least} to {at_most}")
    return value


def whole_numbers(value: object, what: str, length: int, at_least: int = 0) -> list[int]:
    """`value`, which must be a list of that many whole numbers."""
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise ValueError(f"{what} is not a list of {length} whole numbers")
    return [whole_number(number, what, at_least) for number in value]


def _require_columns(columns: Mapping[str, Any], rows: int) -> Extent:
    require_fields(columns, ("num_columns", "num_tokens", "holes"), "columns")
    num_columns = whole_number(columns["num_columns"], "num_columns")
    num_tokens = whole_numbers(columns["num_tokens"], "num_tokens", rows)
    if not isinstance(columns["holes"], list) or len(columns["holes"]) != rows:
        raise ValueError(f"holes is not a list of {rows} rows")
    padding = [_intervals(row, num_columns) for row in columns["holes"]]
    for row, (count, holes) in enumerate(zip(num_tokens, padding, strict=True)):
        if count != num_columns - sum(stop - start for start, stop in holes):
            raise ValueError(f"row {row} has {count} tokens, which its {num_columns} columns and its padding are not")
    if num_columns > sum(num_tokens) + _MOST_EMPTY_COLUMNS:
        raise ValueError(f"of its {num_columns} columns more than {_MOST_EMPTY_COLUMNS} are padding in every row")
    return Extent(rows, num_columns, padding)


def _intervals(row: object, num_columns: int) -> list[tuple[int, int]]:
    if not isinstance(row, list):
        raise ValueError("holes of a row are not a list")
    intervals, last = [], 0
    for hole in row:
        start, stop = whole_numbers(hole, "a hole", 2)
        if not last <= start < stop <= num_columns:
            raise ValueError(
                f"a hole from {start} to {stop} is not after the one before or within {num_columns} columns"
            )
        intervals.append((start, stop))
        last = stop
    return intervals


def _expected_warm_up(config: MiKVConfig, shape: list[int], num_columns: int, dtype: torch.dtype) -> Expected:
    batch, num_heads, head_dim = shape
    tokens = (batch, num_heads, num_columns, head_dim), dtype
    observed = 0 if config.keeps_everything_exact else num_columns
    expected: Expected = {
        "keys": tokens,
        "values": tokens,
        "attention": ((batch, num_heads, observed), torch.float32),
        "query_max": ((batch, num_heads, head_dim), torch.float32),
    }
    if config.has_feedback:
        expected["query_moment"] = (batch, num_heads, head_dim, head_dim), torch.float32
    return expected


def _tiers(config: MiKVConfig, shape: list[int], dtype: torch.dtype) -> dict[str, Tier]:
    """Tiers without rows: what their parts are."""
    formats, none, cpu = layer_formats(config, shape[2], dtype), (0, 0), torch.device("cpu")
    tiers = {"high": Tier(formats.high, none, cpu, formats.high_is_quantized, with_scores=True)}
    if formats.low is not None:
        tiers["low"] = Tier(formats.low, none, cpu, transformed=True, with_scores=False)
    return tiers


def _expected_packed(
    config: MiKVConfig, tensors: Mapping[str, Tensor], shape: list[int], tiers: Mapping[str, Tier]
) -> Expected:
    batch, num_heads, head_dim = shape
    vector = (batch, num_heads, 1, head_dim), torch.float16
    feedback = (batch, num_heads, head_dim * (head_dim - 1) // 2), torch.uint8
    expected: Expected = {}
    for transform, wanted, part in (
        ("key_transform.center", config.center_keys, vector),
        ("key_transform.balancer", config.balance_keys, vector),
        ("key_transform.feedback", config.has_feedback, feedback),
        ("value_transform.center", config.center_values, vector),
    ):
        if wanted:
            expected[transform] = part
    for name, tier in tiers.items():
        blocks = _num_blocks(tensors, name)
        for part_name, own in tier.tensors.items():
            expected[f"{name}.{part_name}"] = (batch, num_heads, blocks, *own.shape[3:]), own.dtype
    return expected


def _num_blocks(tensors: Mapping[str, Tensor], tier: str) -> int:
    """The blocks that one of the tier's parts has; the others must have as many."""
    first = next((x for name, x in sorted(tensors.items()) if name.startswith(f"{tier}.")), None)
    return first.shape[2] if first is not None and first.dim() > 2 else 0


def _require_tensors(tensors: Mapping[str, Tensor], expected: Expected) -> None:
    require_fields(tensors, expected, "the layer")
    for name, (shape, dtype) in expected.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise ValueError(f"{name} is {tuple(found.shape)} {found.dtype}, not {shape} {dtype}")


def _require_counts(
    counts: object,
    tensors: Mapping[str, Tensor],
    shape: list[int],
    num_tokens: list[int],
    tiers: Mapping[str, Tier],
) -> dict[str, list[int]]:
    """The counts of each tier, which must fit its blocks and add up to the tokens."""
    require_fields(counts, tiers, "counts")
    assert isinstance(counts, Mapping)
    checked = {name: whole_numbers(counts[name], f"counts of {name}", shape[0]) for name in tiers}
    for name in tiers:
        capacity = _num_blocks(tensors, name) * BLOCK_TOKENS
        if max(checked[name]) > capacity or (name == "high" and not capacity):
            raise ValueError(f"{max(checked[name])} tokens do not fit the {capacity} slots of the {name} tier")
    if any(count % BLOCK_TOKENS for count in checked.get("low", [])):
        raise ValueError(f"the low tier has {checked['low']} tokens, not whole blocks of {BLOCK_TOKENS}")
    for row, (total, *held) in enumerate(zip(num_tokens, *checked.values(), strict=True)):
        if sum(held) > total or ("low" in checked and sum(held) < total):
            raise ValueError(f"row {row} has {total} tokens, but {sum(held)} in its tiers")
    return checked


def _require_numbers(tensors: Mapping[str, Tensor], tier: str, empty: Tier) -> None:
    for side, form in zip("kv", empty.formats, strict=True):
        parts = [f"{tier}.{side}.{part}" for part in ("data", "scale", "zero")]
        _require_finite(tensors, parts)
        scale = tensors.get(f"{tier}.{side}.scale")
        if scale is not None and scale.numel() and not 0 <= float(scale.min()) <= float(scale.max()) <= _limit(form):
            raise ValueError(f"{tier}.{side}.scale is not between 0 and {_limit(form):g}")


def _limit(form: Format) -> float:
    """The scale with which codes span more than 16-bit floats do."""
    return 2 * _LARGEST_HALF / max(map(abs, form.levels)) if isinstance(form, QuantizedFormat) else torch.inf


def _require_transforms(tensors: Mapping[str, Tensor], head_dim: int) -> None:
    """In ranges in which tokens to come can be encoded."""
    largest = _LARGEST_HALF / head_dim**0.5  # a rotation adds up all channels
    for name in ("key_transform.center", "value_transform.center"):
        if name in tensors and not bool((tensors[name].float().abs() <= largest).all()):
            raise ValueError(f"{name} has numbers that are not between -{largest:g} and {largest:g}")
    balancer, feedback = tensors.get("key_transform.balancer"), tensors.get("key_transform.feedback")
    if balancer is not None and not bool(((balancer >= _BALANCER[0]) & (balancer <= _BALANCER[1])).all()):
        raise ValueError(
            f"key_transform.balancer has numbers that are not between {_BALANCER[0]:g} and {_BALANCER[1]:g}"
        )
    if feedback is not None and bool(((feedback & _FLOAT8_NAN) == _FLOAT8_NAN).any()):
        raise ValueError("key_transform.feedback has numbers that are NaN")


def _require_statistics(tensors: Mapping[str, Tensor]) -> None:
    """The largest absolute query is not negative, and its moment is one: symmetric without negative eigenvalues."""
    if bool((tensors["query_max"] < 0).any()):
        raise ValueError("query_max has negative numbers")
    if "query_moment" not in tensors:
        return
    moment = tensors["query_moment"].double()
    scale = moment.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    correlation = moment / scale[..., None] / scale[..., None, :]
    identity = torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
    failed = torch.linalg.cholesky_ex(correlation + _ROUNDING * identity)[1]
    if bool(failed.any()) or not bool(((correlation - correlation.mT).abs() <= _ROUNDING).all()):
        raise ValueError("query_moment is not a sum of products of queries with themselves")


def _require_slots(tensors: Mapping[str, Tensor], counts: list[int], num_tokens: list[int]) -> None:
    """Of the high slots in use: scores are finite, positions are those of different tokens of the row."""
    positions, scores = tensors["high.position"].flatten(2), tensors["high.score"].flatten(2)
    for row, (count, total) in enumerate(zip(counts, num_tokens, strict=True)):
        used = positions[row, :, :count].sort(dim=1).values
        if not count:
            continue
        if int(used.min()) < 0 or int(used.max()) >= total or bool((used.diff(dim=1) == 0).any()):
            raise ValueError(f"high.position of row {row} are not different places of its {total} tokens")
        if not bool(torch.isfinite(scores[row, :, :count]).all()):
            raise ValueError(f"high.score of row {row} has NaN or Inf")


def _require_finite(tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    for name in names:
        if name in tensors and not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{name} has NaN or Inf")
