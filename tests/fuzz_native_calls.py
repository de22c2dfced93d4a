"""Calls of the native module with arguments that nobody should pass: each ends in a result or a Python exception.

    python tests/fuzz_native_calls.py --seed 1 --count 9000

A call starts as a valid one of some binding, then one to three of its arguments are changed. Calls run in a process of
their own, so that a signal, the thing that is looked for, is counted and the next call goes on. What is written lies
between guards, so that a write beside it is found where it does no visible harm.
"""

import argparse
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from changed_arguments import at, changed, places, put
from mikv import _native, ops
from mikv.ops.matmul import MatmulShape
from mikv.ops.schema import flat_transforms
from mikv.ops.views import TierView
from tier_views import BATCH, CHANNEL, NUM_KV_HEADS, QUANTIZED, RAW, fitted, formats, tiers

ENDINGS = (" done", " refused")  # that calls may have
REFUSALS = (TypeError, ValueError, OverflowError, MemoryError)
GROUP, HEAD_DIM, CAPACITY = 2, 32, 192
GUARD_BYTES = 4096
SECONDS = 120  # many times what so many calls take
AT_ONCE = 1000  # calls in one process


@dataclass
class Calls:
    """Valid calls, and the memory around what they write."""

    random: random.Random
    guards: list[Tensor] = field(default_factory=list)

    def guarded(self, like: Tensor) -> Tensor:
        """A copy between guards."""
        memory = torch.full((like.nbytes + 2 * GUARD_BYTES,), 0xA5, dtype=torch.uint8)
        self.guards += [memory[:GUARD_BYTES], memory[GUARD_BYTES + like.nbytes :]]
        inner = memory[GUARD_BYTES : GUARD_BYTES + like.nbytes].view(like.dtype).view(like.shape)
        return inner.copy_(like)

    def are_intact(self) -> bool:
        return all(bool((guard == 0xA5).all()) for guard in self.guards)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self.random.randrange(1 << 30))
        return torch.randn(shape, generator=generator).to(dtype)

    def result(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.guarded(torch.zeros(shape, dtype=dtype))

    def some(self, x: Tensor) -> Tensor | None:
        return x if self.random.random() < 0.5 else None

    def tier(self, tier: TierView, count: int) -> tuple[list[Tensor], Tensor, Tensor, list[int]]:
        parts, pages, counts, form = tier.flat
        return [self.guarded(part) for part in parts], pages.clone(), torch.full_like(counts, count), list(form)

    def both(self) -> tuple[TierView, TierView]:
        kind = self.random.choice((RAW, QUANTIZED))
        high = formats(*self.random.choice(kind), HEAD_DIM)
        return tiers("growing", high, formats(*self.random.choice(QUANTIZED + CHANNEL), HEAD_DIM), CAPACITY)

    def transforms(self, row: int | None) -> tuple[Any, ...]:
        heads = self.numbers(BATCH, NUM_KV_HEADS * GROUP, 9, HEAD_DIM)
        keys, values = (self.numbers(BATCH, NUM_KV_HEADS, 9, HEAD_DIM) for _ in range(2))
        pair = fitted(heads, keys, values)
        return flat_transforms(pair if row is None else (pair[0].of_row(row), pair[1].of_row(row)))

    def attend(self) -> list[Any]:
        high, low = self.both()
        n, dtype = self.random.choice((1, 3, 9)), self.random.choice((torch.float32, torch.float16, torch.bfloat16))
        queries = self.numbers(BATCH, NUM_KV_HEADS * GROUP, n, HEAD_DIM, dtype=dtype)
        keys, values = (self.numbers(BATCH, NUM_KV_HEADS, n, HEAD_DIM, dtype=dtype) for _ in range(2))
        mask = torch.ones(BATCH, 1, n, n, dtype=torch.bool).tril()
        return [
            *(queries, keys, values, self.some(mask)),
            self.tier(high, self.random.choice((0, 5, 64))),
            self.tier(low, self.random.choice((0, 32, 160))) if self.random.random() < 0.7 else None,
            self.transforms(None),
            *(HEAD_DIM**-0.5, self.random.choice((0.0, 30.0))),
            *(self.some(self.numbers(NUM_KV_HEADS * GROUP)), self.some(self.numbers(BATCH, n).abs())),
            *(self.random.random() < 0.5, self.random.choice((1, 2))),
            self.guarded(queries),
            self.some(self.result(BATCH, NUM_KV_HEADS, CAPACITY)),
            self.some(self.result(BATCH, NUM_KV_HEADS, n)),
        ]

    def pack(self) -> list[Any]:
        tier = self.random.choice(self.both())
        n = self.random.choice((32, 64))
        keys, values = (self.numbers(NUM_KV_HEADS, n, HEAD_DIM) for _ in range(2))
        symmetric = tier.formats[0].grid in ("lloyd-max", "uniform") and tier.formats[0].bits != 8
        feedback = self.some(self.numbers(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM).triu(1)) if symmetric else None
        row, first = self.random.randrange(BATCH), self.random.choice((0, 32, 96))
        return [self.tier(tier, first), row, first, keys, values, self.transforms(row), feedback, 1]

    def append(self) -> list[Any]:
        high, _ = self.both()
        n = self.random.choice((1, 33))
        keys, values = (self.numbers(BATCH, NUM_KV_HEADS, n, HEAD_DIM) for _ in range(2))
        tier = self.tier(high, self.random.choice((0, 5, 100)))
        scores = self.numbers(BATCH, NUM_KV_HEADS, n)
        return [tier, *self.book(high), keys, values, scores, [7] * BATCH, self.transforms(None), 1]

    def unpack(self) -> list[Any]:
        tier, n = self.random.choice(self.both()), self.random.choice((1, 40))
        slots = torch.arange(n).expand(NUM_KV_HEADS, -1).contiguous()
        results = [self.result(NUM_KV_HEADS, n, HEAD_DIM) for _ in range(2)]
        return [self.tier(tier, 64), self.random.randrange(BATCH), slots, *results, 1]

    def demote(self) -> list[Any]:
        high, low = self.both()
        slots = (torch.arange(32) * 2).expand(NUM_KV_HEADS, -1).contiguous()
        row = self.random.randrange(BATCH)
        to = self.tier(low, self.random.choice((0, 64))) if self.random.random() < 0.7 else None
        return [self.tier(high, 80), to, *self.book(high), row, slots, HEAD_DIM, self.transforms(row), None, 1]

    def score_prompt(self) -> list[Any]:
        tokens, n = self.random.choice((1, 40, 130)), 1
        queries, keys = (
            self.numbers(BATCH, NUM_KV_HEADS * GROUP, n, HEAD_DIM),
            self.numbers(BATCH, NUM_KV_HEADS, tokens, HEAD_DIM),
        )
        return [
            *(queries, keys, self.some(torch.ones(BATCH, 1, n, tokens, dtype=torch.bool))),
            *(HEAD_DIM**-0.5, self.random.choice((0.0, 30.0))),
            *(self.some(self.numbers(NUM_KV_HEADS * GROUP)), self.some(self.numbers(BATCH, n).abs())),
            *(self.random.choice((1, 4)), self.random.choice((0, 32)), self.random.choice((1, 2))),
            self.result(BATCH, NUM_KV_HEADS, tokens),
        ]

    def matmul(self) -> list[Any]:
        rows, inputs, bits = self.random.choice((1, 5, 70)), 96, self.random.choice((1, 3, 4))
        shape = MatmulShape(80, inputs, 32, bits, bits, uniform=False, has_offset=True)
        planes = (self.numbers(bits, 80, inputs // 8) * 100).int().to(torch.uint8)
        scales, offset = (self.numbers(k, 80, inputs // 32).half() for k in (bits, 1))
        codes, numbers = ops.arrange(planes, scales, offset, inputs, 32)
        x = self.numbers(rows, inputs)
        bias, path = self.some(self.numbers(80)), self.random.choice((0, 1, 2))
        return [x, codes, numbers, bias, list(shape.flat), path, self.random.choice((1, 2)), self.result(rows, 80)]

    def stream(self) -> list[Any]:
        return [self.numbers(1000), 1]

    def use_isa(self) -> list[Any]:
        return [self.random.choice(_native.isas_available())]

    def book(self, high: TierView) -> tuple[Tensor, Tensor]:
        return self.guarded(high.parts["score"].zero_()), self.guarded(high.parts["position"].zero_())


BINDINGS = ("attend", "pack", "append", "unpack", "demote", "score_prompt", "matmul", "stream", "use_isa")


# --- running ---------------------------------------------------------------------------------------------------------


def call(seed: int, index: int) -> str:
    """One call; returns its binding and how it ended."""
    choose = random.Random(f"{seed}:{index}")
    calls = Calls(choose)
    binding = choose.choice(BINDINGS[:-2] if choose.random() < 0.95 else BINDINGS)
    arguments: Any = getattr(calls, binding)()
    for _ in range(choose.choice((0, 1, 1, 1, 1, 2, 3))):
        path = choose.choice(list(places(arguments)))
        try:
            arguments = put(arguments, path, changed(at(arguments, path), arguments, choose))
        except Exception:
            continue  # PyTorch itself knows no such tensor
    try:
        getattr(_native, binding)(*arguments)
    except REFUSALS:
        return f"{binding} refused"
    except Exception as error:
        return f"{binding} RAISED {type(error).__name__}"
    return f"{binding} done" if calls.are_intact() else f"{binding} WROTE BESIDE"


def run_here(seed: int, first: int, stop: int) -> None:
    torch.set_num_threads(1)
    for index in range(first, stop):
        print(index, end=" ", flush=True)
        print(call(seed, index), flush=True)


def run(seed: int, count: int) -> Counter[str]:
    """Calls 0 to `count` in other processes: how many ended how."""
    outcomes: Counter[str] = Counter()
    first = 0
    while first < count:
        stop = min(first + AT_ONCE, count)
        options = {"seed": seed, "first": first, "count": stop}
        command = [sys.executable, "-W", "ignore", __file__, *(f"--{name}={value}" for name, value in options.items())]
        try:
            result = subprocess.run(
                [*command, "--here"], capture_output=True, text=True, timeout=SECONDS, env=_ENVIRONMENT
            )
            ending, printed, said = f"exit code {result.returncode}", result.stdout, result.stderr
        except subprocess.TimeoutExpired as expired:
            ending, printed, said = "hang", (expired.stdout or b"").decode(), ""
        lines = printed.splitlines()
        done = [line.split(" ", 1) for line in lines if len(line.split()) > 1]
        outcomes.update(outcome for _, outcome in done)
        first += len(done)
        for index, outcome in done:
            if not outcome.endswith(ENDINGS):
                print(f"call {index} of seed {seed}: {outcome}")
        if first < stop:
            outcomes[ending] += 1
            print(f"call {first} of seed {seed}: {ending} {said[-2000:]}")
            first += 1
    return outcomes


_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help="in this process, for a debugger")
    options = parser.parse_args()
    if options.here:
        run_here(options.seed, options.first, options.count)
        return 0
    outcomes = run(options.seed, options.count)
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:6} {outcome}")
    return int(any(not outcome.endswith(ENDINGS) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
