"""The inputs that a model's layers see on calibration text, block by block: H = mean of x x^T for every linear layer.

The tokens go through the model once: what the blocks before hand on, quantized by then, is kept, and one block's
matrices at a time. Knows nothing about quantization. Hidden states are (1, T, C), inputs of a layer (..., K).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from mikv.cache.geometry import text_config
from mikv.errors import ConfigError

logger = logging.getLogger("mikv")

Hessians = dict[str, Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # by position, after the hidden states, and by name
_LAST_STAGE_SHARE = 4  # the layers after the blocks get every fourth chunk: it takes whole passes


@dataclass(frozen=True)
class Blocks:
    """A model's decoder blocks: their common name and, of every block, the arguments besides the hidden states."""

    prefix: str
    modules: list[nn.Module]
    arguments: list["Arguments"]


class _StopError(Exception):
    """Ends a forward pass when everything is known that was wanted."""


def token_chunks(texts: Sequence[str], tokenizer: Any, max_tokens: int, sequence_length: int) -> list[Tensor]:
    """Token ids (1, T) of the texts, one after the other and cut to equal length, which may leave the last out.

    Raises ConfigError for texts without tokens.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError("calibration must be a list of texts, or None")
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= max_tokens:
            break
    if not ids:
        raise ConfigError("calibration holds no text; pass a few thousand words, or calibration=None for none")
    tokens = torch.tensor(ids[:max_tokens])
    length = min(sequence_length, len(tokens))
    return [chunk[None] for chunk in tokens.split(length) if len(chunk) == length]


def stages(model: PreTrainedModel, names: list[str], chunks: list[Tensor]) -> Iterator[tuple[list[str], Hessians]]:
    """Layers by name with their matrices H (K, K), in the order of the model; they are exchanged as they come."""
    chunks = [chunk.to(model.device) for chunk in chunks]
    blocks = find_blocks(model, chunks)
    inside: set[str] = set()
    if blocks is None:
        logger.warning("%s is calibrated as a whole: its blocks take more than hidden states", type(model).__name__)
    else:
        for stage in _through_blocks(model, blocks, names, chunks):
            inside.update(stage[0])
            yield stage
    rest = [name for name in names if name not in inside]
    if rest:
        yield (
            rest,
            hessians(_modules(model, rest), lambda x: _run(model, x), chunks[:: _LAST_STAGE_SHARE if blocks else 1]),
        )


def find_blocks(model: PreTrainedModel, chunks: list[Tensor]) -> Blocks | None:
    """The decoder blocks, if each gets what the one before returns, and else nothing that depends on the tokens."""
    depth = getattr(text_config(model.config), "num_hidden_layers", None)
    for prefix, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == depth:
            records = [_record(model, list(modules), chunk) for chunk in chunks[:2]]
            if all(record is not None and _same(record, records[0]) for record in records):
                return Blocks(prefix, list(modules), records[0] or [])
    return None


def hessians(modules: Mapping[str, nn.Module], run: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> Hessians:
    """The matrix H of each layer's inputs while `run` is called on `inputs`. Layers with the same input share one.

    Raises ConfigError for a layer that no token reached.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    leaders: dict[str, str] = {}
    present: list[tuple[Tensor, str]] = []  # inputs of this call, kept so that no other tensor takes their place

    def observe(name: str, x: Tensor) -> None:
        leader = next((other for y, other in present if y is x), name)
        leaders.setdefault(name, leader)
        if leader != name:
            return
        present.append((x, name))
        rows = x.detach().flatten(0, -2).float()  # (tokens, K)
        if name not in sums:
            sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        sums[name].addmm_(rows.T, rows)
        counts[name] = counts.get(name, 0) + len(rows)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        for x in inputs:
            present.clear()
            run(x)
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [name for name in modules if not counts.get(leaders.get(name, name))]:
        raise ConfigError(
            f"no calibration token reached {unseen[0]}; calibrate with more text, or keep that layer as it is with "
            "modules_to_not_convert"
        )
    means = {name: total / counts[name] for name, total in sums.items()}
    return {name: means[leaders[name]] for name in modules}


def _through_blocks(
    model: PreTrainedModel, blocks: Blocks, names: list[str], chunks: list[Tensor]
) -> Iterator[tuple[list[str], Hessians]]:
    states = [_first_states(model, blocks.modules[0], chunk) for chunk in chunks]
    for i, (block, arguments) in enumerate(zip(blocks.modules, blocks.arguments, strict=True)):
        inside = [name for name in names if name.startswith(f"{blocks.prefix}.{i}.")]
        run = _Block(block, arguments)
        if inside:
            yield inside, hessians(_modules(model, inside), run, states)
        if i + 1 < len(blocks.modules):
            for j, state in enumerate(states):
                states[j] = run(state)


@dataclass(frozen=True)
class _Block:
    """One block with all its arguments but the hidden states."""

    module: nn.Module
    arguments: Arguments

    @torch.no_grad()
    def __call__(self, state: Tensor) -> Tensor:
        args, kwargs = self.arguments
        return _hidden(self.module(state, *args, **kwargs))


def _modules(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in names}


@torch.no_grad()
def _run(model: PreTrainedModel, tokens: Tensor) -> None:
    model(tokens, use_cache=False)


def _first_states(model: PreTrainedModel, block: nn.Module, tokens: Tensor) -> Tensor:
    """The hidden states (1, T, C) that the first block gets."""
    states: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        raise _StopError

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        _run(model, tokens)
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
        _run(model, tokens)
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
