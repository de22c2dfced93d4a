"""Whether a model can read the calibration text at all, and whether the text reaches all its layers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mikv.errors import ConfigError


def require_readable(model: PreTrainedModel, names: Sequence[str], chunks: Sequence[Tensor]) -> None:
    """Let the model read until all layers have had inputs, before anything is changed.

    Raises ConfigError for tokens that the model has not, for chunks that are too long for it, and for layers that no
    token reaches.
    """
    embedding = model.get_input_embeddings()
    rows, largest = getattr(embedding, "num_embeddings", None), max(int(chunk.max()) for chunk in chunks)
    if rows is not None and largest >= rows:
        raise ConfigError(
            f"the tokenizer gives token {largest}, but the model's embedding has {rows} rows; pass the tokenizer of "
            "this model"
        )
    unseen = dict.fromkeys(names)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: unseen.pop(name, None))
        for name in names
    ]
    try:
        for chunk in chunks:
            read(model, chunk.to(model.device))
            if not all(_in_decoder(model, name) for name in unseen) or not unseen:
                break
    except (IndexError, RuntimeError) as error:
        if "out of" not in str(error) or "memory" in str(error):  # of range, of bounds
            raise
        raise ConfigError(
            f"{type(model).__name__} cannot read {chunks[0].shape[1]} tokens at once ({error}); use a smaller "
            "sequence_length, or no calibration"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    require_reached(list(unseen), names)


def _in_decoder(model: PreTrainedModel, name: str) -> bool:
    """Whether a layer is of the part that reads text; other parts no text reaches, however long."""
    decoder = model.get_decoder()
    layer = model.get_submodule(name)
    return decoder is model or any(module is layer for module in decoder.modules())


@torch.no_grad()
def read(model: PreTrainedModel, tokens: Tensor) -> None:
    """Let the model read tokens (1, T)."""
    model(tokens, use_cache=False)


def require_reached(unseen: Sequence[str], layers: Sequence[str]) -> None:
    """Raise ConfigError if any of the `layers` is `unseen`: no token reached it."""
    if unseen:
        names = _common_names(unseen, layers)
        others = f" and {len(unseen) - 1} more layers" if unseen[1:] else ""
        raise ConfigError(
            f"no calibration token reached {unseen[0]}{others}; keep them as they are with "
            f"modules_to_not_convert={names} (--modules-to-not-convert {','.join(names)}), calibrate with more text "
            "or without"
        )


def _common_names(chosen: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The fewest modules above the `chosen` of all `layers` that have none of the others below them."""
    others, names = set(layers) - set(chosen), dict[str, None]()
    for name in chosen:
        parts = name.split(".")
        above = [".".join(parts[:count]) for count in range(1, len(parts))]
        free = [prefix for prefix in above if not any(other.startswith(f"{prefix}.") for other in others)]
        names[(free or [name])[0]] = None
    return list(names)
