"""No call of the native module ends the process, and what cannot be right is refused: see fuzz_native_calls."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from changed_arguments import Temporaries
from coded_weights import random_coded
from fuzz_native_calls import BINDINGS, ENDINGS, Calls, run
from mikv import ops
from mikv.ops import AttentionOptions, cpu, native
from numerics import gaussian
from tier_views import BATCH, NUM_KV_HEADS, fitted, formats, of_row, tiers, with_counts

if native.module is None:
    pytest.skip(native.reason, allow_module_level=True)
_native = native.module
HEAD_DIM = 32


def test_changed_calls_end_in_a_result_or_an_exception() -> None:
    outcomes = run(seed=20, count=500)
    assert sum(outcomes.values()) == 500
    assert not [outcome for outcome in outcomes if not outcome.endswith(ENDINGS)], outcomes
    # and most of them do get as far as that
    assert all(outcomes[f"{binding} done"] and outcomes[f"{binding} refused"] for binding in BINDINGS[:-2]), outcomes


def arguments(binding: str, seed: int = 0) -> list[Any]:
    calls = Calls(random.Random(seed))
    calls.some = lambda x: x  # type: ignore[method-assign, assignment]
    return getattr(calls, binding)()


def changed(binding: str, place: int, new: Any) -> None:
    given = arguments(binding)
    given[place] = new(given[place], given) if callable(new) else new
    getattr(_native, binding)(*given)


def with_format(index: int, value: int) -> Callable[[Any, Any], Any]:
    def change(tier: Any, _: Any) -> Any:
        parts, pages, counts, form = tier
        return parts, pages, counts, [*form[:index], value, *form[index + 1 :]]

    return change


def in_memory_of(other: int) -> Callable[[Tensor, Any], Tensor]:
    return lambda x, given: given[other].view(-1)[: x.numel()].view(x.shape)


CASES: dict[str, tuple[str, int, Any, str]] = {
    "basis": ("attend", 4, with_format(6, 2), "whether the tier is transformed=2 is not in 0..1"),
    "slot near 2**63": ("pack", 2, 2**63 - 1, "do not fit"),
    "scale": ("attend", 7, float("nan"), "scale is nan; it must be finite"),
    "softcap": ("score_prompt", 4, float("inf"), "softcap is inf"),
    "negative softcap": ("attend", 8, -1.0, "softcap is negative; 0 is none"),
    "position": ("append", 6, [2**31] * BATCH, "first position=2147483648 is not in"),
    "threads": ("stream", 1, 100_000, "threads=100000 is not in 1..1024"),
    "result over queries": ("attend", 13, in_memory_of(0), "a result shares memory with another argument"),
    "result over inputs": ("score_prompt", 10, in_memory_of(1), "received shares memory"),
    "keys over values": ("unpack", 3, in_memory_of(4), "keys shares memory"),
    "expanded blocks": (
        "pack",
        0,
        lambda tier, _: ([part[:1].expand(part.shape) for part in tier[0]], *tier[1:]),
        "has blocks that share memory",
    ),
    "part twice": ("unpack", 0, lambda tier, _: ([tier[0][0]] * len(tier[0]), *tier[1:]), "parts|dtype|shape"),
    "no memory": ("stream", 0, lambda x, _: FakeTensorMode().from_tensor(x), "data has no memory"),
    "between numbers": (
        "stream",
        0,
        torch.frombuffer(bytearray(401), dtype=torch.float32, count=100, offset=1),
        "does not begin at a whole number in memory",
    ),
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_right_is_refused(case: str) -> None:
    binding, place, new, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        changed(binding, place, new)


def test_demotion_does_not_go_back_from_a_transformed_tier() -> None:
    both = formats("int4", "uniform", HEAD_DIM)
    high, low = tiers("growing", both, formats("int2", "uniform", HEAD_DIM))
    high, low = with_counts(high, 64, 64), replace(low, transformed=False)
    pair = fitted(gaussian((BATCH, 4, 9, HEAD_DIM), 1), *(gaussian((BATCH, 2, 9, HEAD_DIM), i) for i in (2, 3)))
    with pytest.raises(ValueError, match="high tier is transformed and low tier is not"):
        cpu.demote(high, low, 0, torch.arange(32).expand(NUM_KV_HEADS, -1), of_row(pair, 0))


def test_tensors_that_only_a_sequence_knows_live_until_the_call_ends() -> None:
    for seed in range(20):
        given = arguments("unpack", seed)
        parts, *rest = given[0]
        expected, found = [torch.empty_like(given[3]) for _ in range(2)], [torch.empty_like(given[3]) for _ in range(2)]
        _native.unpack((parts, *rest), *given[1:3], *expected, given[5])
        _native.unpack((Temporaries(parts), *rest), *given[1:3], *found, given[5])
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))


def test_fake_tensors_get_the_shape_of_a_product() -> None:
    coded, x = random_coded(), gaussian((3, 576), 1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = ops.lut_matmul(x, coded.codes, coded.scales, None, coded.shape)
        assert output.fake_mode is mode
    assert output.shape == (3, 65)
    with pytest.raises(ValueError, match="codes has no memory"):
        ops.lut_matmul(x, mode.from_tensor(coded.codes), coded.scales, None, coded.shape)


def test_products_can_be_mapped() -> None:
    coded, x = random_coded(), gaussian((2, 3, 576), 1)
    product = torch.vmap(lambda rows: ops.lut_matmul(rows, coded.codes, coded.scales, None, coded.shape))(x)
    expected = torch.stack([ops.lut_matmul(rows, coded.codes, coded.scales, None, coded.shape) for rows in x])
    assert torch.equal(product, expected)


def test_no_queries_are_no_crash() -> None:
    raw = formats("exact", "raw", HEAD_DIM)
    high, _ = tiers("growing", raw, raw)
    queries, new = gaussian((BATCH, 4, 0, HEAD_DIM), 1), gaussian((BATCH, 2, 0, HEAD_DIM), 2)
    pair = fitted(*(gaussian((BATCH, heads, 9, HEAD_DIM), 1) for heads in (4, 2, 2)))
    output, received_high, received_new = cpu.attend(
        queries, (new, new), None, (high, None), pair, AttentionOptions(1.0), None, True
    )
    assert output.shape == queries.shape
    assert received_high is not None
    assert not received_high.any(), "what nobody gave was not written"
    assert received_new is not None
