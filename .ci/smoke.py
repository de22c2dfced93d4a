"""Whether an installed mikv works: PyTorch loads nothing of it, and a tiny model generates through its kernels."""

import sys
from pathlib import Path
from unittest import mock

import torch

assert not [name for name in sys.modules if name.startswith("mikv")], "`import torch` loads mikv"

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import mikv  # noqa: E402
from mikv.ops import native  # noqa: E402

assert Path(mikv.__file__).resolve().is_relative_to(Path(sys.prefix).resolve()), f"{mikv.__file__} is not installed"
assert native.module is not None, native.reason

STEPS, LAYERS = 40, 2
torch.manual_seed(0)
sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, num_key_value_heads=1, **sizes)).eval()
prompt = torch.randint(0, 97, (1, 200))
options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
plain = model.generate(prompt, **options)

with mikv.attach(model) as attached, mock.patch.object(native.module, "attend", wraps=native.module.attend) as attend:
    tokens = model.generate(prompt, **options)

assert tokens.shape == plain.shape == (1, 200 + STEPS)
assert attend.call_count >= LAYERS * (STEPS - 1), f"the kernel was called {attend.call_count} times"
assert torch.equal(model.generate(prompt, **options), plain), "attach has left the model changed"
print(attached.cache.memory())
print(f"mikv {mikv.__version__} works: {native.reason}")
