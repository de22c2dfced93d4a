"""A tiny random model that chats, as a folder or as a GGUF file: one token per byte and ChatML around the messages.

Merges let a model spell an answer otherwise than the tokenizer would: `a b` instead of `ab`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny import tiny_model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("a", "b"), ("q", "z"))  # two, because transformers 5.16 cannot read a list of one from a GGUF file
NUM_TOKENS = 3 + 256 + len(MERGES)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def all_tokens() -> list[str]:
    """The special tokens, the 256 bytes as byte-level tokenizers spell them, and the merged ones."""
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, and one for each merge; the special tokens are one token each."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(all_tokens())}, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    end, start, stop = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=stop,
        pad_token=stop,
        unk_token=end,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def chat_model(**settings: Any) -> PreTrainedModel:
    """A Llama for `chat_tokenizer`; it never ends an answer by itself."""
    return tiny_model(
        "llama", **{"vocab_size": NUM_TOKENS, "pad_token_id": 2, "max_position_embeddings": 4096, **settings}
    )


def save_chat_model(folder: Path, template: str | None = TEMPLATE, **settings: Any) -> Path:
    """Model and tokenizer as `from_pretrained` reads them."""
    chat_model(**settings).save_pretrained(folder)
    chat_tokenizer(template).save_pretrained(folder)
    return folder


_WIDTH, _INNER = 32, 48
_GGUF_SHAPES = {
    "token_embd": (NUM_TOKENS, _WIDTH),
    "output": (NUM_TOKENS, _WIDTH),
    "output_norm": (_WIDTH,),
    "blk.0.attn_norm": (_WIDTH,),
    "blk.0.ffn_norm": (_WIDTH,),
    **{f"blk.0.attn_{name}": (_WIDTH, _WIDTH) for name in ("q", "k", "v", "output")},
    "blk.0.ffn_gate": (_INNER, _WIDTH),
    "blk.0.ffn_up": (_INNER, _WIDTH),
    "blk.0.ffn_down": (_WIDTH, _INNER),
}
GGUF_TENSORS = tuple(name for name in _GGUF_SHAPES if name != "output")  # a file without that has a tied head


def write_gguf(
    path: Path, seed: int = 0, *, without: Sequence[str] = (), parts: int = 1, architecture: str = "llama"
) -> Path:
    """A Llama of one layer with random weights in float32; all of them, although it may say it is one of some parts."""
    width, heads, inner = _WIDTH, 2, _INNER
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(NUM_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(all_tokens())
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (NUM_TOKENS - 3))
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(seed)
    for name, shape in _GGUF_SHAPES.items():
        weights = random.standard_normal(shape, dtype=np.float32)
        if name not in without:
            writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
