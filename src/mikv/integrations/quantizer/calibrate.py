"""The inputs that a model's layers see on calibration text, one stage after the other: layers with the same input.

    H      mean of x x^T over the inputs x (K,), as they are once everything before the stage is quantized
    drift  mean of (y - x) x^T, y being what the exact model has in the place of x

With drift every token counts alike: both are of inputs divided by |x|. A few tokens, the first one above all, have
inputs a hundred times as large as the others', and would be what the weights are fitted to.

The tokens go through the model once: what the blocks before hand on is kept, quantized and exact, and with drift the
exact inputs of one block's layers. Knows nothing about quantization. Hidden states are (1, T, C).
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from mikv.arithmetic import own_arithmetic
from mikv.cache.geometry import text_config
from mikv.errors import ConfigError, NumericsError
from mikv.integrations.quantizer.reading import read, require_reached

logger = logging.getLogger("mikv")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # by position, after the hidden states, and by name
_LAST_STAGE_SHARE = 4  # the layers after the blocks get every fourth chunk: it takes whole passes
_CHARACTERS = 8  # of a text that are tokenized for each token that is wanted, at first
_LAST_WORD = 64  # tokens at the end of a part of a text, which may be others in the whole


@dataclass(frozen=True)
class Blocks:
    """A model's decoder blocks: their common name and, of every block, the arguments besides the hidden states."""

    prefix: str
    modules: list[nn.Module]
    arguments: list["Arguments"]


@dataclass(frozen=True)
class Stage:
    """Layers with the same input, by name, and what is known of it; see the module. `drift` only where asked for.

    Of layers that are done nothing is known.
    """

    names: list[str]
    hessian: Tensor | None = None
    drift: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise NumericsError for inputs that are not finite, before any solver meets them."""
        known = [x for x in (self.hessian, self.drift) if x is not None]
        if not all(bool(x.isfinite().all()) for x in known):
            raise NumericsError(
                f"{self.names[0]}: its inputs on the calibration text are NaN or infinite; load the model in float32 "
                "(dtype=torch.float32, --dtype float32), or look for damaged weights before it"
            )


class _StopError(Exception):
    """Ends a forward pass when everything is known that was wanted."""


def token_chunks(texts: Iterable[str], tokenizer: Any, max_tokens: int, sequence_length: int) -> list[Tensor]:
    """Token ids (1, T) of the texts, one after the other and cut to equal length, which may leave the last out.

    No more is read of `texts`, which may be a generator, and tokenized than is needed. Raises ConfigError for texts
    without tokens.
    """
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise ConfigError(f"calibration must be a list of texts, or None; it is of type {type(texts).__name__}")
    ids: list[int] = []
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"calibration must be a list of texts, or None; it holds a {type(text).__name__}")
        ids += _first_ids(text, tokenizer, max_tokens - len(ids))
        if len(ids) >= max_tokens:
            break
    if not ids:
        raise ConfigError(
            "calibration holds no text (or is a generator that was used up); pass a few thousand words, or "
            "calibration=None for none"
        )
    tokens = torch.tensor(ids, dtype=torch.long, device="cpu")
    length = min(sequence_length, len(tokens))
    return [chunk[None] for chunk in tokens.split(length) if len(chunk) == length]


def _first_ids(text: str, tokenizer: Any, count: int) -> list[int]:
    """The first `count` tokens of a text, or all if it has fewer: of parts of it, until one is long enough."""
    length = _CHARACTERS * (count + _LAST_WORD)
    while True:
        ids: list[int] = tokenizer(text[:length], verbose=False)["input_ids"]
        if length >= len(text) or len(ids) >= count + _LAST_WORD:
            return ids[:count]
        length *= 2


def stages(
    model: PreTrainedModel,
    names: list[str],
    chunks: list[Tensor],
    *,
    with_drift: bool,
    done: Collection[str] = (),
) -> Iterator[Stage]:
    """The layers by name in the order of the model; they are exchanged as they come.

    Where all layers of a stage are among `done`, nothing is computed for it; they come all the same, since what follows
    depends on what they are exchanged for. With drift the layers of a block are calibrated one stage after the other,
    else all on one pass, as GPTQ published.
    """
    chunks = [chunk.to(model.device) for chunk in chunks]
    blocks = find_blocks(model, chunks)
    rest = names
    if blocks is None:
        logger.warning("%s is calibrated as a whole: its blocks take more than hidden states", type(model).__name__)
    else:
        rest = [name for name in names if not name.startswith(f"{blocks.prefix}.")]
        yield from _through_blocks(model, blocks, names, chunks, with_drift, done)
    layers = {name: model.get_submodule(name) for name in rest}
    yield from in_one_pass(layers, lambda x: read(model, x), chunks[:: _LAST_STAGE_SHARE if blocks else 1], done)


def find_blocks(model: PreTrainedModel, chunks: list[Tensor]) -> Blocks | None:
    """The decoder blocks, if each gets what the one before returns, and else nothing that depends on the tokens."""
    depth = getattr(text_config(model.config), "num_hidden_layers", None)
    for prefix, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and 0 < len(modules) == depth:
            records = [_record(model, list(modules), chunk) for chunk in chunks[:2]]
            if all(record is not None and _same(record, records[0]) for record in records):
                return Blocks(prefix, list(modules), records[0] or [])
    return None


def in_one_pass(
    layers: Mapping[str, nn.Module], run: Callable[[Tensor], Any], inputs: Sequence[Tensor], done: Collection[str] = ()
) -> list[Stage]:
    """The stages of layers while `run` is called on `inputs`, all at once; nothing is, if they are all `done`.

    Raises ConfigError for a layer that no token reached, NumericsError for inputs that are not finite.
    """
    if set(layers) <= set(done):
        return [Stage([name for name in done if name in layers])] if layers else []
    watch, moments = _Watch(layers), dict[str, _Mean]()
    with watch:
        for x in inputs:
            for leader, rows in watch.seen(run, x)[1]:
                moments.setdefault(leader, _Mean()).add(rows, rows)
    watch.require_all_seen()
    return [Stage(watch.following(leader), mean.value) for leader, mean in moments.items()]


class _Watch:
    """Sees the inputs of layers, by name, while a model runs. Of those with the same input the first leads."""

    def __init__(self, layers: Mapping[str, nn.Module], until: str | None = None) -> None:
        self.layers = layers
        self.until = until  # a layer after whose input the rest of a pass is not wanted
        self.leaders: dict[str, str] = {}
        self.present: list[tuple[Tensor, str]] = []  # of this call, kept so that no other tensor takes their place

    def __enter__(self) -> None:
        self.hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: self._observe(name, args[0]))
            for name, layer in self.layers.items()
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def seen(self, run: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, list[tuple[str, Tensor]]]:
        """What `run(x)` returns, if it comes so far, and the inputs (tokens, K), float32, of leaders."""
        self.present.clear()
        output = None
        with suppress(_StopError):
            output = run(x)
        return output, [(leader, y.detach().flatten(0, -2).float()) for y, leader in self.present]

    def following(self, leader: str) -> list[str]:
        """The layers with its input."""
        return [name for name in self.layers if self.leaders.get(name) == leader]

    def require_all_seen(self) -> None:
        """Raise ConfigError for a layer that no token reached."""
        require_reached([name for name in self.layers if name not in self.leaders], list(self.layers))

    def _observe(self, name: str, x: Tensor) -> None:
        leader = next((other for y, other in self.present if y is x), name)
        self.leaders.setdefault(name, leader)
        if leader == name:
            self.present.append((x, name))
        if name == self.until:
            raise _StopError


class _Mean:
    """The mean of y x^T over tokens."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    @own_arithmetic
    def add(self, y: Tensor, x: Tensor) -> None:
        """Tokens (n, K) each."""
        if self.total is None:
            self.total = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        self.total.addmm_(y.T, x)
        self.count += len(x)

    @property
    def value(self) -> Tensor:
        """Float32 (K, K)."""
        assert self.total is not None
        return self.total / self.count


def _through_blocks(
    model: PreTrainedModel,
    blocks: Blocks,
    names: list[str],
    chunks: list[Tensor],
    with_drift: bool,
    done: Collection[str],
) -> Iterator[Stage]:
    states = [_first_states(model, blocks.modules[0], chunk) for chunk in chunks]
    exact = list(states)
    for i, (block, arguments) in enumerate(zip(blocks.modules, blocks.arguments, strict=True)):
        layers = {name: model.get_submodule(name) for name in names if name.startswith(f"{blocks.prefix}.{i}.")}
        run = _Block(block, arguments)
        if with_drift:
            yield from _with_drift(layers, run, states, exact, done)
        else:
            yield from in_one_pass(layers, run, states, done)
        if i + 1 < len(blocks.modules):
            for j, state in enumerate(states):
                states[j] = run(state)


def _with_drift(
    layers: Mapping[str, nn.Module],
    run: "_Block",
    states: list[Tensor],
    exact: list[Tensor],
    done: Collection[str],
) -> Iterator[Stage]:
    """The stages of a block, each by passes up to its first layer. `exact` becomes what the block makes of it."""
    block, before = _Watch(layers), dict[str, list[Tensor]]()
    with block:
        for j, state in enumerate(exact):
            exact[j], seen = block.seen(run, state)
            for leader, rows in seen:
                before.setdefault(leader, []).append(rows)
    block.require_all_seen()
    for leader in list(before):
        names, inputs = block.following(leader), before.pop(leader)
        if set(names) <= set(done):
            yield Stage(names)
        else:
            yield Stage(names, *_moments(_Watch({leader: layers[leader]}, until=leader), run, states, inputs))


def _moments(
    watch: _Watch, run: "_Block", states: list[Tensor], exact_inputs: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """H and drift of the one layer that is watched. A function of its own, so that no sums outlive it.

    An expert may get other tokens than in the exact model: then there is no drift, and if it gets none any more, H is
    that of the exact inputs.
    """
    hessian, drift = _Mean(), _Mean()
    is_routed = [len(y) for y in exact_inputs] != [state.shape[1] for state in states]
    with watch:
        for j, state in enumerate(states):
            for _, x in watch.seen(run, state)[1]:
                size = _length(x)
                hessian.add(x / size, x / size)
                is_routed = is_routed or len(x) != state.shape[1]
                if not is_routed:
                    drift.add((exact_inputs[j] - x) / size, x / size)
    if hessian.count == 0:
        for y in exact_inputs:
            hessian.add(y / _length(y), y / _length(y))
    return hessian.value, None if is_routed else drift.value


def _length(x: Tensor) -> Tensor:
    """Of every token (n, K), at least the least number: (n, 1)."""
    return x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


@dataclass(frozen=True)
class _Block:
    """One block with all its arguments but the hidden states."""

    module: nn.Module
    arguments: Arguments

    @torch.no_grad()
    def __call__(self, state: Tensor) -> Tensor:
        args, kwargs = self.arguments
        return _hidden(self.module(state, *args, **kwargs))


def _first_states(model: PreTrainedModel, block: nn.Module, tokens: Tensor) -> Tensor:
    """The hidden states (1, T, C) that the first block gets."""
    states: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        raise _StopError

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        read(model, tokens)
    except _StopError:
        return states[0]
    finally:
        hook.remove()
    raise AssertionError("the first block was not called")


def _record(model: PreTrainedModel, blocks: list[nn.Module], tokens: Tensor) -> list[Arguments] | None:
    """The blocks' other arguments in one pass; None unless every block gets the output of the one before."""
    arguments: list[Arguments] = []
    handed_on: list[Tensor] = []
    plain = True

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal plain
        plain &= bool(args) and (not handed_on or torch.equal(args[0], handed_on[-1]))
        arguments.append((args[1:], kwargs))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        handed_on[:] = [_hidden(output)]

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(after) for block in blocks]
    try:
        read(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return arguments if plain and len(arguments) == len(blocks) else None


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _same(one: list[Arguments], other: list[Arguments] | None) -> bool:
    """Whether the tensors among two passes' arguments are the same: masks and positions, not activations."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
