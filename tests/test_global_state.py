"""What a process is set to changes nothing that mikv computes: every state against the default one, bit for bit."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cache.layers import Tokens, random_tokens
from mikv import MiKVCache, MiKVConfig, ops
from mikv.cache import norms, packed, warm_up
from mikv.cache.layer import TwoTierLayer
from mikv.integrations.transformers.versions import as_argument
from mikv.ops import AttentionOptions, attend_unpacked, cpu, fallback, matmul, native
from mikv.weights.embedding import BCQEmbedding
from mikv.weights.linear import BCQLinear
from mikv.weights.nested import nest
from mikv.weights.solve import METHODS, needs_hessian, output_error, solve
from tiny import FIRST_WORD, VOCAB_SIZE, tiny_model

State = Callable[[], AbstractContextManager[object]]
Results = list[Tensor]


@contextmanager
def dtype(default: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def device(default: str | torch.device) -> Iterator[None]:
    torch.set_default_device(default)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
        assert torch.get_float32_matmul_precision() == name, "what was borrowed was not given back"
    finally:
        torch.set_float32_matmul_precision("highest")


DTYPES: dict[str, State] = {
    "bfloat16": lambda: dtype(torch.bfloat16),
    "float16": lambda: dtype(torch.float16),
    "float64": lambda: dtype(torch.float64),
}
MODES: dict[str, State] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": deterministic,
}
DEVICES: dict[str, State] = {
    "default device meta": lambda: device("meta"),
    "default device cpu": lambda: device(torch.device("cpu")),
    "with device meta": lambda: torch.device("meta"),
}
ARITHMETIC: dict[str, State] = {
    "precision medium": lambda: precision("medium"),
    "precision high": lambda: precision("high"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
}
STATES = DTYPES | MODES | DEVICES | ARITHMETIC

CONFIGS = {
    "balanced": MiKVConfig.preset("balanced"),
    "small": MiKVConfig.preset("small"),
    "paper": MiKVConfig.preset("paper-int2"),
    "exact": MiKVConfig(high="exact", importance_ratio=1.0),
    "drop": MiKVConfig(high="fp16", low="drop", importance_ratio=0.3),
    "channel": MiKVConfig(low="int2", low_grid="channel"),
}
_IN_DEFAULT_STATE: dict[tuple[str, bool], Results] = {}  # the lives of layers
OPTIONS = {"plain": {}, "capped": {"softcap": 20.0}, "sinks": {"sinks": torch.linspace(-1, 1, 4)}}


def in_turn(states: dict[str, State]) -> Iterator[State]:
    while True:
        yield from states.values()


def life(config: MiKVConfig, tokens: Tokens, options: AttentionOptions, states: Iterator[State]) -> Results:
    """A prompt with padding, decoding, a chunk, beams, a crop: each step in the next state. Outputs and all bytes."""
    layer, results = TwoTierLayer(config, 0), []
    row_mask = torch.arange(180) >= torch.tensor([[0], [5]])  # the second row starts with padding
    visible = (row_mask[:, None, None] & torch.ones(180, 180, dtype=torch.bool).tril()).contiguous()

    def step(start: int, stop: int) -> None:
        part, mask = tokens[start:stop], visible[:, :, start:stop, :stop]

        def exact(keys: Tensor, values: Tensor) -> Tensor:
            return attend_unpacked(part.queries, keys, values, mask, options, causal=True)

        with next(states)():
            output = layer.attend(part.queries, part.keys, part.values, mask, options, exact)
        results.append(output.detach())

    step(0, 100)
    for position in range(100, 104):
        step(position, position + 1)
    step(104, 180)
    order = torch.tensor([1, 1, 0])
    with next(states)():
        layer.crop(1)
    with next(states)():
        layer.select_rows(order)
    with next(states)():
        tensors, meta = layer.state()
    again = TwoTierLayer(config, 0)
    with next(states)():
        again.restore({name: tensor.clone() for name, tensor in tensors.items()}, meta)
    restored, _ = again.state()
    return [*results, *(tensors[name] for name in sorted(tensors)), *(restored[name] for name in sorted(restored))]


def require_equal(found: Results, expected: Results) -> None:
    assert len(found) == len(expected)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device), i
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), i


@pytest.fixture(params=["native", "twin"])
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, and then PyTorch in their place."""
    if request.param == "native":
        if native.module is None:
            pytest.skip(native.reason)
        return
    monkeypatch.setattr(native, "module", None)
    for name in ("attend", "append", "demote", "pack"):
        monkeypatch.setattr(packed, name, ops._by_device(getattr(cpu, name), getattr(fallback, name)))
    monkeypatch.setattr(norms, "unpack", ops._by_device(cpu.unpack, fallback.unpack))
    monkeypatch.setattr(warm_up, "score_prompt", ops._by_device(cpu.score_prompt, fallback.score_prompt))


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_lives_as_in_the_default_state(name: str, state: str) -> None:
    tokens, options = random_tokens(180, 64, batch=2), AttentionOptions(64**-0.5)
    key = name, native.module is None
    if key not in _IN_DEFAULT_STATE:
        _IN_DEFAULT_STATE[key] = life(CONFIGS[name], tokens, options, in_turn({"default": nullcontext}))
    require_equal(life(CONFIGS[name], tokens, options, in_turn({state: STATES[state]})), _IN_DEFAULT_STATE[key])


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("extra", OPTIONS)
@pytest.mark.parametrize("name", ["balanced", "paper"])
def test_states_may_change_between_steps(name: str, extra: str) -> None:
    tokens = random_tokens(180, 64, batch=2)
    options = AttentionOptions(tokens.scale, **OPTIONS[extra])
    expected = life(CONFIGS[name], tokens, options, in_turn({"default": nullcontext}))
    require_equal(life(CONFIGS[name], tokens, options, in_turn(STATES)), expected)


@pytest.mark.parametrize("state", STATES)
def test_weights_are_found_and_multiplied_as_in_the_default_state(state: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(70, 128, generator=generator), torch.randn(3, 7, 128, generator=generator)
    inputs = torch.randn(512, 128, generator=generator)
    hessian, ids = inputs.T @ inputs / 512, torch.tensor([[1, 5, 69]])

    def work() -> Results:
        results = []
        for method in METHODS:
            coding = solve(weight, 3, 64, method, hessian if needs_hessian(method) else None)
            linear = BCQLinear.from_weights({3: coding}, bias=nn.Parameter(weight[:, 0].clone()))
            results += [coding.planes, coding.scales, coding.dequantize(), linear(x).detach()]
            results.append(torch.tensor(output_error(weight, coding, hessian), dtype=torch.float64, device="cpu"))
        # like a layer of PyTorch, it is of the default dtype until it is told another
        embedding = BCQEmbedding.from_weights({3: coding}).to(torch.float32)
        codes, scales = linear.codes, linear.arranged_scales
        twin = ops._by_device(cpu.lut_matmul, matmul.lut_matmul, has_gradients=True)
        results.append(twin(x, codes, scales, None, linear.shape))
        nested = nest(weight, 64, hessian)
        return [*results, embedding(ids).detach(), nested.planes, nested.scales, nested.offsets]

    expected = work()
    with STATES[state]():
        found = work()
    require_equal(found, expected)


@pytest.mark.parametrize("state", DTYPES | MODES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_generation_and_files_are_as_in_the_default_state(family: str, state: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    ids = torch.randint(FIRST_WORD, VOCAB_SIZE, (2, 90), generator=torch.Generator().manual_seed(0))

    def work(file: Path) -> Results:
        cache = MiKVCache(model.config)
        first = model.generate(ids, **as_argument(cache), max_new_tokens=8, do_sample=False)
        cache.save(file)
        loaded = MiKVCache.load(file, model.config)
        rest = model.generate(first, **as_argument(loaded), max_new_tokens=40, do_sample=False)
        tensors = [layer.tokens.state()[0] for layer in loaded.layers if hasattr(layer, "tokens")]
        return [first, rest, *(table[name].detach() for table in tensors for name in sorted(table))]

    expected = work(tmp_path / "default")
    with STATES[state]():
        found = work(tmp_path / "other")
    require_equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_generation_under_autocast_is_that_of_the_full_cache(family: str) -> None:
    """The model itself computes with 16 bits there, and may hand over keys and values of different dtypes."""
    model = tiny_model(family)
    ids = torch.randint(FIRST_WORD, VOCAB_SIZE, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        full = copy.deepcopy(model).generate(
            ids, **as_argument(DynamicCache(config=model.config)), max_new_tokens=20, do_sample=False
        )
        exact = MiKVCache(model.config, MiKVConfig(high="exact", importance_ratio=1.0))
        assert torch.equal(model.generate(ids, **as_argument(exact), max_new_tokens=20, do_sample=False), full)
        packed_cache = MiKVCache(model.config)
        assert model.generate(ids, **as_argument(packed_cache), max_new_tokens=40, do_sample=False).shape == (1, 130)


def test_tables_that_were_first_needed_in_inference_mode_serve_training() -> None:
    code = """
import torch
from mikv.transforms import hadamard
with torch.inference_mode():
    hadamard(torch.ones(2, 64), 64)
x = torch.ones(2, 64, requires_grad=True)
hadamard(x, 64).square().sum().backward()
assert torch.allclose(x.grad, 2 * x, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
