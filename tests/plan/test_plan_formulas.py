"""What holds for all plans: more work never takes less, parts add up, bytes are those of the real storage."""

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mikv.cache.accounting import cache_bytes as accounted
from mikv.cache.config import MiKVConfig
from mikv.errors import ConfigError
from mikv.plan.cache_formats import parse_cache_format
from mikv.plan.constants import CPU, GPU
from mikv.plan.deployment import Deployment
from mikv.plan.energy import joules_per_token, watts
from mikv.plan.hardware import GPUS, Hardware, named_hardware
from mikv.plan.memory import cache_bytes, devices_needed, matrix_bytes, memory, usable_bytes
from mikv.plan.models import NAMED, model_shape
from mikv.plan.plan import plan
from mikv.plan.time import break_even_batch, decode_time, lut_time, matrix_time, prefill_time
from mikv.plan.weight_formats import parse_weights
from mikv.weights.weight import BCQWeight, num_groups

LAPTOP = Hardware("this", "a laptop", 24 << 30, 30e9, 0.24e12, 0, None, most=1, is_cpu=True)
DEVICES = [GPUS["a100-80"], GPUS["l4"], LAPTOP]
MODELS = st.sampled_from(["smollm2-135m", "llama-2-7b", "llama-3-70b", "opt-175b", "qwen2.5-0.5b"])
WEIGHTS = st.sampled_from(["fp32", "fp16", "int8", "int4", "int3", "bcq1", "bcq2", "bcq4", "3.375"])
CACHES = st.sampled_from(["full", "fp8", "4.5", "balanced", "small"])


def deployment(model="llama-2-7b", weights="bcq3", cache="full", hardware=GPUS["a100-80"], **load):
    formats = parse_weights(weights, 128), parse_cache_format(cache)
    return Deployment(model_shape(model), hardware, *formats, hardware.constants, **({"context": 1024} | load))


deployments = st.builds(
    deployment,
    MODELS,
    WEIGHTS,
    CACHES,
    st.sampled_from(DEVICES),
    batch=st.integers(1, 300),
    context=st.sampled_from([1, 63, 512, 2048]),
)


@settings(deadline=None, max_examples=60)
@given(deployments, st.integers(1, 64))
def test_more_sequences_never_take_less_time_or_memory(one, more):
    larger = replace(one, batch=one.batch + more)
    devices = one.degrees[-1]
    assert memory(larger, devices).total > memory(one, devices).total
    assert decode_time(larger, devices).total > decode_time(one, devices).total
    assert prefill_time(larger, devices) >= prefill_time(one, devices)


@settings(deadline=None, max_examples=60)
@given(deployments, st.integers(1, 12))
def test_longer_contexts_never_take_less_time_or_memory(one, blocks):
    short = replace(one, context=512)
    long = replace(one, context=512 + 128 * blocks)
    assert memory(long, 1).total > memory(short, 1).total
    assert decode_time(long, 1).total > decode_time(short, 1).total
    assert prefill_time(long, 1) > prefill_time(short, 1)


@settings(deadline=None, max_examples=40)
@given(MODELS, st.sampled_from(DEVICES), st.integers(1, 7), st.integers(1, 64))
def test_more_bits_never_take_less_time_or_memory_or_fewer_devices(model, hardware, bits, batch):
    fewer, more = (deployment(model, f"bcq{n}", "full", hardware, batch=batch) for n in (bits, bits + 1))
    assert memory(more, 1).total > memory(fewer, 1).total
    assert decode_time(more, 1).total > decode_time(fewer, 1).total
    needed = [devices_needed(one) or 10**6 for one in (fewer, more)]
    assert needed == sorted(needed)


@settings(deadline=None, max_examples=60)
@given(deployments)
def test_parts_add_up(one):
    estimate = plan(one)
    record = estimate.to_dict()
    assert record["total_bytes"] == pytest.approx(sum(record["memory_bytes"].values()))
    assert record["total_bytes"] == pytest.approx(estimate.devices * sum(asdict(estimate.memory).values()))
    assert estimate.fits == (estimate.memory.total <= usable_bytes(one))
    assert estimate.fits == (estimate.needed is not None)
    if estimate.fits:
        assert record["ms_per_token"] == pytest.approx(sum(record["ms_by_part"].values()))
        assert record["tokens_per_second"] == pytest.approx(one.batch * record["tokens_per_second_per_sequence"])
        assert record["bound"] in ("bandwidth", "compute", "communication", "overhead")


@settings(deadline=None, max_examples=60)
@given(deployments)
def test_fewer_devices_than_needed_have_no_room(one):
    needed = devices_needed(one)
    for devices in one.degrees:
        if needed is None or devices < needed:
            assert memory(one, devices).total > usable_bytes(one)
    if needed is not None:
        assert memory(one, needed).total <= usable_bytes(one)


@settings(deadline=None, max_examples=60)
@given(deployments)
def test_joules_are_watts_times_seconds_and_watts_stay_within_the_design(one):
    devices = one.degrees[-1]
    if one.hardware.watts is None:
        assert watts(one, devices) is None
        return
    power = watts(one, devices)
    assert 0.4 * one.hardware.watts < power <= one.hardware.watts
    assert joules_per_token(one, devices, 2.0) == pytest.approx(devices * power * 2.0 / one.batch)


@pytest.mark.parametrize("hardware", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("bits", [3, 4])
def test_tables_are_used_below_the_break_even_batch_and_not_above(hardware, bits):
    one = deployment("llama-2-7b", f"bcq{bits}", hardware=hardware)
    threshold = break_even_batch(one, 1)
    assert 2 <= threshold <= 64
    for rows in (threshold - 1, threshold):
        seconds, _ = matrix_time(one, 1, rows)
        assert (seconds == lut_time(one, 1, rows)) == (rows < threshold)


def test_only_lookup_tables_have_a_break_even_batch():
    assert break_even_batch(deployment(weights="int4"), 1) is None


def test_large_batches_are_bound_by_compute_and_many_gpus_by_communication():
    assert decode_time(deployment(weights="fp16", batch=2048, context=1), 1).bound == "compute"
    assert decode_time(deployment("opt-175b", "fp16", batch=1, context=1), 1).bound == "bandwidth"
    assert decode_time(deployment("opt-175b", "bcq1", context=1), 32).bound == "communication"
    assert decode_time(deployment("smollm2-135m", "bcq3", hardware=LAPTOP, context=64), 1).bound == "overhead"


@pytest.mark.parametrize("name", ["lossless", "balanced", "small", "paper-int2"])
@pytest.mark.parametrize("devices", [1, 8])
def test_bytes_of_presets_are_those_of_the_caches_own_accounting(name, devices):
    one = deployment("llama-3-70b", "fp16", name, batch=3, context=3000)
    geometry = one.shape.geometry(devices, 2)
    assert {layer.num_kv_heads for layer in geometry.layers} == {8 // devices}
    assert cache_bytes(one, devices) == accounted(MiKVConfig.preset(name), geometry, 3000, batch=3).bytes


def test_kv_heads_are_replicated_where_there_are_fewer_than_gpus():
    one = deployment("llama-3-70b", "fp16")
    assert cache_bytes(one, 16) == cache_bytes(one, 8) == cache_bytes(one, 1) / 8


@pytest.mark.parametrize("size", [(64, 128), (96, 1000), (17, 33)])
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_bytes_of_binary_codes_are_those_of_the_storage(size, group_size, bits):
    rows, columns = size
    groups = num_groups(columns, min(group_size or columns, columns))
    stored = BCQWeight(
        torch.empty(bits, rows, -(-columns // 8), dtype=torch.uint8, device="meta"),
        torch.empty(bits, rows, groups, dtype=torch.float16, device="meta"),
        torch.empty(1, rows, groups, dtype=torch.float16, device="meta"),
        columns,
        min(group_size or columns, columns),
    )
    planned = parse_weights(f"bcq{bits}", group_size).matrix_bytes(rows, columns)
    assert stored.num_bytes - bits * rows < planned <= stored.num_bytes  # rows end in whole bytes
    assert planned == stored.num_bytes or columns % 8


def test_a_number_of_bits_is_all_that_a_weight_takes():
    one = deployment(weights="3.375")
    assert matrix_bytes(one) == pytest.approx(one.shape.matrix_parameters * 3.375 / 8)


@pytest.mark.parametrize("name", NAMED)
def test_every_named_model_can_be_planned_and_is_as_large_as_it_is_called(name):
    shape = model_shape(name)
    assert plan(deployment(name, hardware=GPUS["h100"])).fits
    size = {"llama-3.2-1b": "1.24b", "mixtral-8x7b": "46.7b", "mixtral-8x22b": "141b"}.get(name, name.split("-")[-1])
    if shape.num_experts and size[0] == "a":
        size, active = name.split("-")[-2:]
        assert shape.active_parameters + 2 * shape.head_parameters == pytest.approx(float(active[1:-1]) * 1e9, rel=0.12)
    if size.endswith(("b", "m")):
        called = float(size[:-1]) * (1e9 if size.endswith("b") else 1e6)
        assert shape.num_parameters == pytest.approx(called, rel=0.1)


def test_constants_can_be_overridden_and_say_so():
    faster = GPU.overridden("lut=1, layer_us=0")
    one = deployment()
    assert decode_time(replace(one, constants=faster), 1).total < decode_time(one, 1).total
    assert dict(faster.items())["lut"].source == "--efficiency"
    assert all(constant.source and constant.unit for constants in (GPU, CPU) for _, constant in constants.items())
    assert [name for name, _ in GPU.items()] == [name for name, _ in CPU.items()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=1", "'speed' is not one of dense32"),
        ("lut=2", "more than 0 and at most 1"),
        ("lut", "must be a number"),
        ("hop_us=nan", "0 or more"),
        ("prefill_tokens=0", "1 or more"),
        ("layer_us=-1", "0 or more"),
    ],
)
def test_constants_that_cannot_be_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        GPU.overridden(text)


def test_unknown_hardware_is_named_with_what_is_near():
    with pytest.raises(ConfigError, match=r"did you mean .*a100-80"):
        named_hardware("a100-8")


@pytest.mark.parametrize(("name", "matrices"), [("smollm2-135m", 1), ("llama-2-7b", 2)])
def test_tied_embeddings_are_held_once(name, matrices):
    one = deployment(name, "bcq3")
    assert memory(one, 1).embeddings == matrices * one.shape.vocab_size * one.shape.hidden_size * 2


def test_a_cache_that_grows_by_copying_is_read_and_copied():
    full, packed = (deployment("smollm2-135m", "fp32", cache, LAPTOP) for cache in ("full", "balanced"))
    reading = 1 / CPU["attention"] + CPU["append_passes"]
    assert decode_time(full, 1).attention == pytest.approx(cache_bytes(full, 1) / LAPTOP.bandwidth * reading)
    reading = 1 / CPU["packed_attention"]
    assert decode_time(packed, 1).attention == pytest.approx(cache_bytes(packed, 1) / LAPTOP.bandwidth * reading)
