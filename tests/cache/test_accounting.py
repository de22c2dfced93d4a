"""Predicted bytes are the bytes that the storage takes, and the sizes the paper prints come out of the formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from layers import feed, filled, random_tokens
from mikv.cache.accounting import CacheBytes, cache_bytes, layer_bytes, nominal_bits
from mikv.cache.config import HIGH_FORMATS, HIGH_GRIDS, KEY_ROUNDINGS, LOW_GRIDS, PRESETS, MiKVConfig
from mikv.cache.geometry import CacheGeometry, LayerGeometry
from mikv.cache.layer import TwoTierLayer
from mikv.errors import ConfigError

HEAD_DIMS = (64, 80, 96, 128, 256)
LENGTHS = (1, 31, 32, 63, 64, 65, 100, 333)


def geometry(head_dim: int, num_kv_heads: int = 2, dtype_bytes: int = 4, num_layers: int = 1) -> CacheGeometry:
    return CacheGeometry((full_attention(head_dim, num_kv_heads),) * num_layers, dtype_bytes)


def full_attention(head_dim: int, num_kv_heads: int = 2) -> LayerGeometry:
    return LayerGeometry("full_attention", None, num_kv_heads, head_dim)


def allocated(layer: TwoTierLayer) -> int:
    """Bytes of all storages that a layer holds, slack included, found without its own bookkeeping."""
    storages = [tensor.untyped_storage() for tensor in layer.state()[0].values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def expect_bytes(config: MiKVConfig, num_tokens: int, head_dim: int, dtype: torch.dtype, batch: int = 1) -> None:
    layer = filled(config, random_tokens(num_tokens, head_dim, batch).to(dtype))
    predicted = cache_bytes(config, geometry(head_dim, dtype_bytes=dtype.itemsize), num_tokens, batch).bytes
    assert allocated(layer) == predicted
    assert sum(layer.bytes_by_part().values()) == predicted


# --- the storage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "num_tokens"), [(80, length) for length in LENGTHS] + [(head_dim, 100) for head_dim in HEAD_DIMS]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_take_the_bytes_predicted(preset: str, head_dim: int, num_tokens: int) -> None:
    expect_bytes(MiKVConfig.preset(preset), num_tokens, head_dim, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [40, 333])
@pytest.mark.parametrize(
    "config",
    [
        MiKVConfig(importance_ratio=1.0, high="exact"),
        MiKVConfig(importance_ratio=1.0, high="int8"),
        MiKVConfig(importance_ratio=0.0, min_recent=0, sinks=0),
        MiKVConfig(low="drop", high="exact"),
        MiKVConfig(low_grid="channel"),
        MiKVConfig(key_rounding="nearest"),
        MiKVConfig(key_rounding="feedback"),
        MiKVConfig(protected=((0, 100), (50, 150))),
        MiKVConfig(protected=((300, 9999),)),
        MiKVConfig(center_keys=False, balance_keys=False, center_values=False),
    ],
    ids=lambda config: json_differences(config),
)
def test_other_configurations_take_the_bytes_predicted(config: MiKVConfig, num_tokens: int, dtype: torch.dtype) -> None:
    expect_bytes(config, num_tokens, 64, dtype)


def json_differences(config: MiKVConfig) -> str:
    """The settings that are not the default's."""
    default = MiKVConfig().to_dict()
    return ",".join(f"{name}={value}" for name, value in config.to_dict().items() if value != default[name])


@st.composite
def storage_configurations(draw: DrawFn) -> MiKVConfig:
    """Every setting that decides bytes."""
    spans = st.tuples(st.integers(0, 200), st.integers(1, 200)).map(lambda span: (span[0], span[0] + span[1]))
    low = draw(st.sampled_from(["int8", "int4", "int3", "int2", "drop"]))
    return MiKVConfig(
        importance_ratio=draw(st.sampled_from([0.0, 0.1, 0.37, 0.5, 1.0])),
        high=draw(st.sampled_from(HIGH_FORMATS)),
        low_k=low,
        low_v=low if low == "drop" else draw(st.sampled_from(["int8", "int4", "int3", "int2"])),
        high_grid=draw(st.sampled_from(HIGH_GRIDS)),
        low_grid=draw(st.sampled_from(LOW_GRIDS)),
        group_size=draw(st.sampled_from([None, 8, 16])),
        center_keys=draw(st.booleans()),
        balance_keys=draw(st.booleans()),
        center_values=draw(st.booleans()),
        key_rounding=draw(st.sampled_from(KEY_ROUNDINGS)),
        recent_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        min_recent=draw(st.integers(0, 50)),
        sinks=draw(st.integers(0, 10)),
        protected=tuple(draw(st.lists(spans, max_size=2))),
        warmup_tokens=draw(st.integers(0, 120)),
    )


@given(storage_configurations(), st.integers(1, 300), st.sampled_from([16, 48, 80]), st.integers(1, 2))
def test_any_configuration_takes_the_bytes_predicted(
    config: MiKVConfig, num_tokens: int, head_dim: int, batch: int
) -> None:
    expect_bytes(config, num_tokens, head_dim, torch.float32, batch)


def test_steps_add_no_more_than_their_slack() -> None:
    """After 500 steps: at most a block of slots and 1/64 of the low tier more than the same tokens as one prompt."""
    config, tokens = MiKVConfig(), random_tokens(900, 64)
    layer = filled(config, tokens[:400])
    for position in range(400, 900):
        feed(layer, tokens[position : position + 1])
    predicted = layer_bytes(config, full_attention(64), 900, 4)
    assert allocated(layer) == sum(layer.bytes_by_part().values())
    assert predicted <= allocated(layer) <= 1.05 * predicted


# --- models -----------------------------------------------------------------------------------------------------------


def test_layers_and_rows_add_up() -> None:
    config = MiKVConfig()
    one = cache_bytes(config, geometry(64), 333)
    assert cache_bytes(config, geometry(64, num_layers=5), 333, batch=3) == CacheBytes(
        15 * one.bytes, 15 * one.fp16_bytes
    )
    assert one.fp16_bytes == 333 * 2 * 64 * 2 * 2
    assert one.ratio == one.bytes / one.fp16_bytes


def test_layers_that_stay_uncompressed_count_in_the_models_dtype() -> None:
    layers = (full_attention(64), LayerGeometry("sliding_attention", 100, 2, 64), full_attention(64))
    mixed = CacheGeometry(layers, model_dtype_bytes=4)
    total = cache_bytes(MiKVConfig(skip_layers=(2,)), mixed, 333)
    token = 2 * 64 * 2  # numbers per token: 2 heads, keys and values
    window = 8  # transformers keeps the window's length as a tensor
    compressed = layer_bytes(MiKVConfig(), full_attention(64), 333, 4)
    assert total.bytes == compressed + 99 * token * 4 + window + 333 * token * 4
    assert total.fp16_bytes == (333 + 99 + 333) * token * 2


def test_a_window_longer_than_the_text_counts_the_text() -> None:
    sliding = CacheGeometry((LayerGeometry("sliding_attention", 4096, 2, 64),), 2)
    assert cache_bytes(MiKVConfig(), sliding, 333).ratio == pytest.approx(1.0, abs=1e-4)


def test_impossible_head_dims_are_refused() -> None:
    with pytest.raises(ConfigError, match="head_dim=84 is not a multiple of 8"):
        cache_bytes(MiKVConfig(), geometry(84), 333)
    with pytest.raises(ConfigError, match=r"head_dim=80 is not a multiple of group_size=32; use one of \[16, 8\]"):
        cache_bytes(MiKVConfig(low_grid="group", group_size=32), geometry(80), 333)


# --- the paper --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high", "low", "percent", "printed"),
    [
        ("fp16", "int2", 32.5, 33),
        ("int8", "int2", 23.125, 23),
        ("int4", "int2", 18.125, 18),
        ("int2", "int2", 15.625, 16),
        ("fp16", "int3", 37.5, 38),
    ],
)
def test_sizes_of_the_papers_tables(high: str, low: str, percent: float, printed: int) -> None:
    """Tables 2 and 3: importance ratio 20 %, head dim 128, groups of 64, rounded half up."""
    config = MiKVConfig(**PRESETS["paper-int2"] | {"high": high, "low": low})
    share = 100 * nominal_bits(config, 128) / 16
    assert share == pytest.approx(percent, abs=1e-9)
    assert int(share + 0.5) == printed


def test_uniform_int4_is_smaller_than_the_papers_headline() -> None:
    uniform = MiKVConfig(**PRESETS["paper-int4"] | {"importance_ratio": 0.0})
    assert 100 * nominal_bits(uniform, 128) / 16 == 28.125
    assert nominal_bits(uniform, 128) < nominal_bits(MiKVConfig.preset("paper-int2"), 128)


def test_small_heads_pay_more_for_the_papers_groups() -> None:
    """Groups of D / 2 = 32 channels: INT2 is 3 bits at a head dim of 64, 2.5 bits at 128."""
    uniform = MiKVConfig(**PRESETS["paper-int2"] | {"importance_ratio": 0.0})
    assert [nominal_bits(uniform, head_dim) for head_dim in (64, 128, 256)] == [3.0, 2.5, 2.25]


@pytest.mark.parametrize(
    ("grid", "bits"), [("lloyd-max", 4.125), ("uniform", 4.125), ("group", 4.5), ("channel", 4.75)]
)
def test_nominal_bits_count_scales_and_zeros(grid: str, bits: float) -> None:
    """One 16-bit scale per 128 numbers; scale and zero per 64; keys with scale and zero per 32 and values per 64."""
    assert nominal_bits(MiKVConfig(importance_ratio=0.0, low="int4", low_grid=grid), 128) == bits


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_approach_the_nominal_bits_as_contexts_grow(preset: str) -> None:
    """What remains are scores and positions (8 bytes per slot) and slack: less than 40 slots and blocks."""
    config, num_tokens, head_dim = MiKVConfig.preset(preset), 1_000_000, 128
    real = layer_bytes(config, full_attention(head_dim, num_kv_heads=1), num_tokens, 2) / num_tokens
    nominal = nominal_bits(config, head_dim) * 2 * head_dim / 8
    slack = real - nominal - 8 * config.importance_ratio
    assert 0 <= slack * num_tokens < 40 * (2 * head_dim * 2 + 8) + 3 * head_dim * 2
