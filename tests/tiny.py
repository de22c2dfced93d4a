"""Tiny random models of the families mikv supports, built from configurations: float32, in eval mode.

Every parameter that transformers starts at a constant (biases, norm weights) is moved, and the weights are large enough
for attention to decide what the model says: with the usual 0.02 a model repeats its last token whatever it holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 96
PAD, BOS = 0, 1
FIRST_WORD = 3  # tokens below are special
WINDOW = 16  # of sliding layers, short enough to be exceeded

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,  # generation goes on for as long as it is asked to
    "tie_word_embeddings": False,
    "use_cache": True,
}
_HYBRID: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """A configuration class of transformers, by name, and how this family differs from the common shape."""

    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def configuration(self, **settings: Any) -> PreTrainedConfig:
        """The family's configuration, `settings` last."""
        return getattr(transformers, self.config)(**{**_SHAPE, **self.settings, **settings})


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig"),
    "mistral-sliding": Family("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config"),
    "gemma2": Family(
        "Gemma2Config",
        # transformers' sdpa ignores the softcap in 5.16 and refuses it in 5.23
        {**_HYBRID, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"},
    ),
    "gemma3": Family("Gemma3TextConfig", {**_HYBRID, "query_pre_attn_scalar": 64}),
    "phi3": Family("Phi3Config", {"hidden_size": 128}),
    "gpt-oss": Family(
        "GptOssConfig",
        {
            **_HYBRID,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "granite": Family(
        "GraniteConfig", {"attention_multiplier": 0.1, "residual_multiplier": 0.8, "logits_scaling": 2.0}
    ),
    "cohere": Family("CohereConfig", {"logit_scale": 1.0}),
    "gpt-neox": Family("GPTNeoXConfig", {"hidden_size": 128, "num_key_value_heads": None, "head_dim": None}),
    "qwen3-moe": Family("Qwen3MoeConfig", _EXPERTS),
    "mixtral": Family("MixtralConfig", {"num_local_experts": 4}),
    "qwen2-half-sliding": Family(
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "gemma3n": Family(
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 4,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,  # the last layer reads the keys of the third
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
    ),
    "qwen3-next": Family(
        "Qwen3NextConfig",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "llama-mha": Family("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-mqa": Family("LlamaConfig", {"num_key_value_heads": 1}),
    "llama-head-80": Family("LlamaConfig", {"head_dim": 80}),
    "llama-head-96": Family("LlamaConfig", {"head_dim": 96}),
    "llama-head-128": Family("LlamaConfig", {"head_dim": 128}),
    "llama-head-256": Family("LlamaConfig", {"head_dim": 256}),
}

# Multi-head latent attention: no keys and values per head, so there is nothing that mikv could compress.
LATENT = Family(
    "DeepseekV3Config",
    {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    },
)


def tiny_model(family: str = "llama", **settings: Any) -> PreTrainedModel:
    """A model of `family`; `settings` override its configuration."""
    return model_of(FAMILIES[family].configuration(**settings))


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config`, seeded, with its constant parameters moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            if name.endswith("sinks"):
                parameter += 4  # as much attention as fifty tokens get
    return model.requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word per token: `w3 w4 ...`, padding on the left."""
    words = {"<pad>": PAD, "<s>": BOS, "<unk>": 2} | {f"w{i}": i for i in range(FIRST_WORD, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left"
    )
