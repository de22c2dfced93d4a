"""What quantizing a model would meet and write, known from its configuration before any weights are read."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mikv.integrations.quantizer import modules
from mikv.integrations.quantizer.budget import num_bytes
from mikv.integrations.quantizer.config import BCQConfig


def skeleton(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel | None:
    """The model of a folder without weights; None where it cannot be built, which loading it explains."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            return None
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype or config.dtype, trust_remote_code=False
            )
    except Exception:  # a hostile config.json fails in many ways, which are the loader's to name
        return None
    return model


def bytes_to_write(model: PreTrainedModel, config: BCQConfig, budget_bits: float | None, *, calibrated: bool) -> int:
    """All that `mikv quantize` writes: every layer as it is finished, then the model. Weights are not looked at.

    Raises what `mikv.quantize` raises for layers that cannot be quantized.
    """
    config = config.resolved(calibrated=calibrated)
    modules.fix_skipped(model, config)
    names = modules.linear_names(model, config)
    if config.quantize_embeddings:
        names.append(modules.require_embeddings(model)[1])
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    quantized = 0
    for name in names:
        module = model.get_submodule(name)
        weight, settings = module.weight, config.of_module(name)
        assert isinstance(weight, torch.Tensor)
        rows, columns = modules.sizes(module)
        total -= weight.nbytes
        if budget_bits is None:
            quantized += sum(num_bytes((rows, columns), settings, bits) for bits in config.precisions)
            quantized -= rows * -(-columns // 8) * sum(config.nested_bits)  # which read planes of the largest
        else:
            quantized += int(weight.numel() * budget_bits / 8)
    return total + 2 * quantized
