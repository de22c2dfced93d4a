"""A model whose layers differ, as transformers builds it: its matrices are counted on a device without memory."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mikv.cache.geometry import CacheGeometry
from mikv.errors import CheckpointError, UnsupportedModelError
from mikv.plan.shapes import Counted, ModelShape

FAMILIES = ("gemma", "gemma2", "gemma3_text", "gemma4_text")


def built_shape(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape of a model of FAMILIES. Raises CheckpointError if it cannot be built, UnsupportedModelError."""
    real, model = _build(name, config)
    geometry = CacheGeometry.from_model_config(real)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    counted = _count(name, model, {id(head), id(embedding)})
    is_tied = head.weight is embedding.weight
    largest = max(geometry.layers, key=lambda layer: layer.num_kv_heads * layer.head_dim)
    total = sum(parameter.numel() for parameter in model.parameters())
    in_matrices = sum(number * rows * columns for (rows, columns), number in counted.matrices)
    in_embeddings = embedding.weight.numel() * (1 if is_tied else 2) + counted.embeddings
    return ModelShape(
        name=name,
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=largest.num_kv_heads,
        head_dim=largest.head_dim,
        vocab_size=config["vocab_size"],
        is_gated=True,
        is_tied=is_tied,
        small_parameters=total - in_matrices - in_embeddings,
        layers=geometry.layers,
        context_length=config.get("max_position_embeddings"),
        counted=counted,
    )


def _build(name: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        real = AutoConfig.for_model(**{**config, "quantization_config": None})
        with torch.device("meta"):
            return real, AutoModelForCausalLM.from_config(real, trust_remote_code=False)
    except Exception as error:  # a class refuses impossible fields with whatever it runs into
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"transformers cannot build {name} from its configuration: {reason[:300]}") from error


def _count(name: str, model: Any, embeddings: set[int]) -> Counted:
    from torch import nn

    matrices: Counter[tuple[int, int]] = Counter()
    others = 0
    for module in model.modules():
        if id(module) in embeddings:
            continue
        if isinstance(module, nn.Linear):
            matrices[module.out_features, module.in_features] += 1
        elif isinstance(module, nn.Embedding):
            others += module.weight.numel()
        elif any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
            raise UnsupportedModelError(f"{name} has a mixture of experts in layers that differ; not supported")
    return Counted(tuple(sorted(matrices.items())), others)
