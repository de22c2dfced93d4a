"""A GGUF file as a ModelShape with the types and bits of its own tensors. Reads its header; converts nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mikv.errors import CheckpointError, MiKVError, UnsupportedModelError
from mikv.plan.hub_config import shape_of_config
from mikv.plan.shapes import ModelShape

METHOD = "gguf"
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
_FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
_EMBEDDINGS = ("token_embd.weight", "output.weight")


def gguf_shape(path: Path) -> ModelShape:
    """The shape of the model in a GGUF file. Raises CheckpointError if it cannot be read, UnsupportedModelError."""
    reader = _reader(path)
    try:
        config = _config(path, {name: field.contents() for name, field in reader.fields.items() if _is_asked(name)})
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config |= {"tie_word_embeddings": "output.weight" not in tensors}
        config["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
        config["quantization_config"] = _stored(tensors)
    except MiKVError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is not a complete GGUF model: {error!r}") from error
    return shape_of_config(path.stem, config)


def _reader(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # a reader meets damaged files with whatever its parsing runs into
        raise CheckpointError(f"cannot read {path}: {error or type(error).__name__}; is the file complete?") from error


def _is_asked(name: str) -> bool:
    return name == "general.architecture" or name.partition(".")[2] in _FIELDS.values()


def _config(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says, from the file's own fields."""
    architecture = fields["general.architecture"]
    if architecture not in _FAMILIES:
        raise UnsupportedModelError(
            f"{path.name} has the architecture {architecture!r}, which is not one of {', '.join(_FAMILIES)}; "
            "plan for a named shape of the same size instead"
        )
    found = {name: fields.get(f"{architecture}.{key}") for name, key in _FIELDS.items()}
    config = {name: value for name, value in found.items() if value is not None}
    family = _FAMILIES[architecture]
    if family == "llama" and config.get("num_experts"):
        family = "mixtral"
    if not config.get("num_experts"):
        config = {name: value for name, value in config.items() if "expert" not in name}
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", config["hidden_size"] // heads)
    return config | {"model_type": family}


def _stored(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The type that most bytes have, and bits per weight of the layers' matrices, and of embedding and head."""
    matrices = [one for name, one in tensors.items() if name.startswith("blk.") and _is_matrix(one)]
    if not matrices:
        raise ValueError("there are no matrices of layers")
    sizes: Counter[str] = Counter()
    for one in matrices:
        sizes[one.tensor_type.name] += int(one.n_bytes)
    embeddings = [tensors[name] for name in _EMBEDDINGS if name in tensors]
    return {
        "quant_method": METHOD,
        "type": sizes.most_common(1)[0][0].lower(),
        "bits": _bits(matrices),
        "head_bits": _bits(embeddings),
    }


def _is_matrix(tensor: Any) -> bool:
    return len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name  # routers count with the norms


def _bits(tensors: Iterable[Any]) -> float:
    tensors = list(tensors)
    return 8 * sum(int(one.n_bytes) for one in tensors) / sum(int(one.n_elements) for one in tensors)
