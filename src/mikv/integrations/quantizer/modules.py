"""Which layers of a model are quantized, and how they are exchanged. Matrices are (M, K): outputs, inputs."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from mikv.errors import ConfigError, UnsupportedModelError
from mikv.integrations.quantizer.config import BCQConfig, ModuleSettings
from mikv.integrations.quantizer.tensor_files import headers
from mikv.ops import MatmulShape
from mikv.weights.embedding import BCQEmbedding, TiedHead
from mikv.weights.linear import BCQLinear
from mikv.weights.module import BCQModule
from mikv.weights.weight import require_group_size


def fix_skipped(model: PreTrainedModel, config: BCQConfig) -> None:
    """Write into `config` which layers stay as they are, those that transformers never quantizes among them.

    Raises ConfigError for an entry of modules_to_not_convert that no module answers to, UnsupportedModelError for a
    model with adapters, whose small matrices would be taken for layers.
    """
    if getattr(model, "peft_config", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} has adapters (LoRA or others); merge them first: model = model.merge_and_unload()"
        )
    correct_ties(model)
    names = [name for name, _ in model.named_modules() if name]
    for entry in config.modules_to_not_convert or ():
        if not any(_is_meant(name, entry) for name in names):
            near = get_close_matches(entry, {*names, *(name.rpartition(".")[2] for name in names)}, n=1)
            raise ConfigError(
                f"modules_to_not_convert names {entry!r}, which is no module of the model and no end of a module's name"
                + (f"; did you mean {near[0]!r}?" if near else f"; modules are {', '.join(names[:3])} ...")
            )
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, config.modules_to_not_convert or [], model._keep_in_fp32_modules, add_default_skips=True
    )
    wanted = set(embedding_names(model)) if config.quantize_embeddings else set()
    config.modules_to_not_convert = sorted(set(skipped) - wanted)


def linear_names(model: PreTrainedModel, config: BCQConfig) -> list[str]:
    """Names of the linear layers to quantize, in the order of the model, without an output head tied to the embedding.

    Raises UnsupportedModelError for experts that are one tensor and for weights that layers share, ConfigError for
    settings of layers that do not exist.
    """
    skipped = config.modules_to_not_convert or []
    chosen = {
        name: m for name, m in model.named_modules() if name and not any(_is_meant(name, entry) for entry in skipped)
    }
    _refuse_experts(chosen)
    head, embedding = embedding_names(model) if config.quantize_embeddings else (None, None)
    tied = {head} if head is not None and is_tied(model) else set()
    names = [name for name, module in chosen.items() if type(module) in (nn.Linear, Conv1D) and name not in tied]
    _refuse_shared(model, names)
    if unknown := sorted(set(config.module_settings) - {*names, embedding}):
        raise ConfigError(
            f"module_settings name {unknown[0]!r}, which is no quantized layer; those are {', '.join(names[:3])} ..."
        )
    if not names:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear layers to quantize")
    for name in names:
        require_group_size(
            sizes(model.get_submodule(name))[1], config.of_module(name).group_size, f"{name}: group_size"
        )
    return names


def _is_meant(name: str, entry: str) -> bool:
    """Whether an entry of modules_to_not_convert, which is text and no pattern, is a module or has it below it."""
    return name == entry or name.startswith(f"{entry}.") or name.endswith(entry)


def embedding_names(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """The output head and the token embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(head)), names.get(id(embedding))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head reads the token embedding's weights."""
    head, embedding = embedding_names(model)
    return model.all_tied_weights_keys.get(f"{head}.weight") == f"{embedding}.weight"


def correct_ties(model: PreTrainedModel, files: Sequence[Path] = ()) -> None:
    """Untie an output head that has weights of its own, whatever config.json says; `files` are to be loaded."""
    head, embedding = embedding_names(model)
    if head is None or embedding is None or not _has_own_weights(model, head, embedding, files):
        return
    model.all_tied_weights_keys.pop(f"{head}.weight", None)
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _has_own_weights(model: PreTrainedModel, head: str, embedding: str, files: Sequence[Path]) -> bool:
    own, rows = (model.get_submodule(name)._parameters.get("weight") for name in (head, embedding))
    if own is None or rows is None:
        return False
    if not own.is_meta:
        return own is not rows
    found = headers(files)
    if f"{head}.planes" in found:
        return True
    both = [found[name] for name in (f"{head}.weight", f"{embedding}.weight") if name in found]
    return len(both) == 2 and not torch.equal(both[0].read(), both[1].read())


def require_embeddings(model: PreTrainedModel) -> tuple[str, str]:
    """The names of head and embedding. Raises UnsupportedModelError unless they are what mikv can quantize."""
    head, embedding = embedding_names(model)
    for name, kind in ((head, nn.Linear), (embedding, nn.Embedding)):
        module = None if name is None else model.get_submodule(name)
        if type(module) is not kind:
            raise UnsupportedModelError(
                f"quantize_embeddings: {type(model).__name__} has a {type(module).__name__} where a plain "
                f"{kind.__name__} is expected; use quantize_embeddings=False"
            )
    assert head is not None
    assert embedding is not None
    return head, embedding


def sizes(module: nn.Module) -> tuple[int, int]:
    """(M, K) of a linear layer or an embedding."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def matrix(module: nn.Module) -> Tensor:
    """The weights, float32 (M, K)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().float()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """The bias of a layer that has one."""
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias


def empty_like(module: nn.Module, settings: ModuleSettings, precisions: tuple[int, ...]) -> BCQModule:
    """The layer that takes the place of `module`, its weights yet to be loaded."""
    rows, columns = sizes(module)
    shape = MatmulShape(
        out_features=rows,
        in_features=columns,
        group_size=require_group_size(columns, settings.group_size),
        planes=settings.bits,
        bits=settings.bits,
        uniform=settings.uniform and settings.bits > 1,
        has_offset=settings.offset,
    )
    kind = BCQEmbedding if isinstance(module, nn.Embedding) else BCQLinear
    return kind(shape, bias=bias_of(module), precisions=precisions)


def exchange(model: PreTrainedModel, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the layer `name`."""
    new.train(model.get_submodule(name).training)
    model.set_submodule(name, new)


def tie_head(model: PreTrainedModel, head: str, embedding: str) -> None:
    """Let the output head read the quantized embedding."""
    quantized = model.get_submodule(embedding)
    assert isinstance(quantized, BCQEmbedding)
    exchange(model, head, TiedHead(quantized, bias_of(model.get_submodule(head))))
    forget_ties(model)


def forget_ties(model: PreTrainedModel) -> None:
    """Tell transformers that no parameters are tied: what is, is one layer now."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._tied_weights_keys = None
    model.all_tied_weights_keys = {}


def remember_ties(model: PreTrainedModel) -> None:
    """The inverse of `forget_ties`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _refuse_experts(modules: dict[str, nn.Module]) -> None:
    stacked = [
        name
        for name, module in modules.items()
        if not isinstance(module, nn.modules.conv._ConvNd)
        and any(p.ndim == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))
    ]
    if stacked:
        last = stacked[0].rpartition(".")[2]
        raise UnsupportedModelError(
            f"{stacked[0]} and {len(stacked) - 1} more hold all experts in one tensor, which mikv does not quantize; "
            f"keep them as they are with modules_to_not_convert=[{last!r}]"
        )


def _refuse_shared(model: PreTrainedModel, names: list[str]) -> None:
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight: Any = module._parameters.get("weight")  # adapters show that of the layer inside them
        if isinstance(weight, Tensor) and weight.device != torch.device("meta"):
            other = owners.setdefault(id(weight), name)
            if other != name and {name, other} & set(names):
                raise UnsupportedModelError(
                    f"{name} and {other} share their weights, which mikv can do for token embeddings only; add both to "
                    "modules_to_not_convert"
                )
