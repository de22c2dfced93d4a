"""Models by name: shapes that are published, configuration files, folders, GGUF files and ids of the hub."""

import json
from os.path import isfile
from pathlib import Path
from typing import Any

from mikv.choices import did_you_mean
from mikv.errors import CheckpointError, ModelNotFoundError
from mikv.plan.hub_config import shape_of_config
from mikv.plan.shapes import ModelShape


def _opt(layers: int, hidden: int, heads: int, vocab: int = 50272) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
    }


def _llama(layers: int, hidden: int, inner: int, heads: tuple[int, int], vocab: int, **more: Any) -> dict[str, Any]:
    """`heads` are those of queries and of keys."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
    } | more


def _qwen2(*shape: Any, tied: bool = False) -> dict[str, Any]:
    return _llama(*shape, model_type="qwen2", tie_word_embeddings=tied, max_position_embeddings=32768)


def _qwen3(layers: int, hidden: int, inner: int, heads: tuple[int, int], tied: bool = False) -> dict[str, Any]:
    more = {"tie_word_embeddings": tied, "head_dim": 128, "max_position_embeddings": 40960}
    return _llama(layers, hidden, inner, heads, 151936, model_type="qwen3", **more)


def _mixtral(*shape: Any, **more: Any) -> dict[str, Any]:
    return _llama(*shape, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, **more)


def _qwen3_moe(layers: int, hidden: int, inner: int, heads: tuple[int, int]) -> dict[str, Any]:
    experts = {"moe_intermediate_size": inner, "num_experts": 128, "num_experts_per_tok": 8}
    return _qwen3(layers, hidden, inner, heads) | experts | {"model_type": "qwen3_moe"}


_LLAMA_3_2: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 131072}
_MISTRAL: dict[str, Any] = {"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768}

# configurations of the hub, and of the papers where a model is not there: GPT-3 (arXiv 2005.14165, table 2.1)
NAMED: dict[str, dict[str, Any]] = {
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "gpt-3-175b": _opt(96, 12288, 96, vocab=50257),
    "llama-7b": _llama(32, 4096, 11008, (32, 32), 32000, max_position_embeddings=2048),
    "llama-13b": _llama(40, 5120, 13824, (40, 40), 32000, max_position_embeddings=2048),
    "llama-30b": _llama(60, 6656, 17920, (52, 52), 32000, max_position_embeddings=2048),
    "llama-65b": _llama(80, 8192, 22016, (64, 64), 32000, max_position_embeddings=2048),
    "llama-2-7b": _llama(32, 4096, 11008, (32, 32), 32000, max_position_embeddings=4096),
    "llama-2-13b": _llama(40, 5120, 13824, (40, 40), 32000, max_position_embeddings=4096),
    "llama-2-70b": _llama(80, 8192, 28672, (64, 8), 32000, max_position_embeddings=4096),
    "llama-3-8b": _llama(32, 4096, 14336, (32, 8), 128256, max_position_embeddings=8192),
    "llama-3-70b": _llama(80, 8192, 28672, (64, 8), 128256, max_position_embeddings=8192),
    "llama-3.1-8b": _llama(32, 4096, 14336, (32, 8), 128256, max_position_embeddings=131072),
    "llama-3.1-70b": _llama(80, 8192, 28672, (64, 8), 128256, max_position_embeddings=131072),
    "llama-3.1-405b": _llama(126, 16384, 53248, (128, 8), 128256, max_position_embeddings=131072),
    "llama-3.2-1b": _llama(16, 2048, 8192, (32, 8), 128256, head_dim=64, **_LLAMA_3_2),
    "llama-3.2-3b": _llama(28, 3072, 8192, (24, 8), 128256, head_dim=128, **_LLAMA_3_2),
    "llama-3.3-70b": _llama(80, 8192, 28672, (64, 8), 128256, max_position_embeddings=131072),
    "mistral-7b": _llama(32, 4096, 14336, (32, 8), 32000, **_MISTRAL),
    "mixtral-8x7b": _mixtral(32, 4096, 14336, (32, 8), 32000, max_position_embeddings=32768),
    "mixtral-8x22b": _mixtral(56, 6144, 16384, (48, 8), 32768, max_position_embeddings=65536),
    "qwen2.5-0.5b": _qwen2(24, 896, 4864, (14, 2), 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(28, 1536, 8960, (12, 2), 151936, tied=True),
    "qwen2.5-3b": _qwen2(36, 2048, 11008, (16, 2), 151936, tied=True),
    "qwen2.5-7b": _qwen2(28, 3584, 18944, (28, 4), 152064),
    "qwen2.5-14b": _qwen2(48, 5120, 13824, (40, 8), 152064),
    "qwen2.5-32b": _qwen2(64, 5120, 27648, (40, 8), 152064),
    "qwen2.5-72b": _qwen2(80, 8192, 29568, (64, 8), 152064),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, (16, 8), tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, (16, 8), tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, (32, 8), tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, (32, 8)),
    "qwen3-14b": _qwen3(40, 5120, 17408, (40, 8)),
    "qwen3-32b": _qwen3(64, 5120, 25600, (64, 8)),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 768, (32, 4)),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 1536, (64, 4)),
    "smollm2-135m": _llama(
        30, 576, 1536, (9, 3), 49152, tie_word_embeddings=True, dtype="float32", max_position_embeddings=8192
    ),
}
NAMED["smollm2"] = NAMED["smollm2-135m"]  # the bundled model, whose file need not be converted to know its shape


def model_shape(name: str) -> ModelShape:
    """The shape of a named model, of a .json configuration, a folder, a GGUF file or a hub id.

    Raises ModelNotFoundError, CheckpointError for files that are no configuration, UnsupportedModelError.
    """
    if (known := NAMED.get(name.lower())) is not None:
        return shape_of_config(name.lower(), known)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and isfile(path):
        from mikv.plan.gguf_shape import gguf_shape

        return gguf_shape(path)
    if path.suffix == ".json" and isfile(path):
        return shape_of_config(path.stem if path.stem != "config" else path.absolute().parent.name, _read(path))
    return shape_of_config(name.rstrip("/").split("/")[-1], _configuration(name))


def _configuration(name: str) -> dict[str, Any]:
    from mikv.models import find_model

    try:
        source = find_model(name)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{error}{_named(name)}") from error
    if isinstance(source, Path):
        return _read(source / "config.json")
    from transformers import PreTrainedConfig

    try:
        return dict(PreTrainedConfig.get_config_dict(source)[0])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"cannot find the model {name!r}: {reason}{_named(name)}") from error


def _named(name: str) -> str:
    """The end of a message: which shapes could have been meant."""
    near = did_you_mean(name.split("/")[-1], NAMED)
    return f"{near or ';'} the shapes known by name are {', '.join(NAMED)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a configuration: it holds no JSON object")
    return config
