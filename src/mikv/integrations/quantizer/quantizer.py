"""transformers' view of mikv's weights: what happens while `from_pretrained` and `save_pretrained` run.

Where mikv is not imported, transformers passes over weights that it does not know and makes random ones. So a file has
two tensors more, of one byte: one by the name of a weight that transformers looks for, whose shape makes it refuse the
file, and one whose name says why (`_NOTICE`).
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer

from mikv.errors import CacheStateError, CheckpointError, ConfigError, MiKVError
from mikv.integrations.quantizer import checksums, modules
from mikv.integrations.quantizer.completeness import missing_tensor, require_complete, require_layers
from mikv.integrations.quantizer.config import FORMAT_VERSION, BCQConfig
from mikv.integrations.quantizer.quantization import quantize_layer
from mikv.integrations.quantizer.tensor_files import weight_files
from mikv.weights.embedding import BCQEmbedding, TiedHead
from mikv.weights.linear import BCQLinear
from mikv.weights.module import BCQModule

logger = logging.getLogger("mikv")

_NOTICE = "mikv_bcq weights: write `import mikv` before from_pretrained"


class BCQQuantizer(HfQuantizer):
    """Loads quantized models, and quantizes others as they are loaded, a layer at a time."""

    quantization_config: BCQConfig
    pre_quantized: bool
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: BCQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pending: set[str] = set()  # layers that are quantized when their weights are read
        self.tied: tuple[str, str] | None = None  # output head and embedding, if those are among them
        self.failure: MiKVError | None = None
        if not self.pre_quantized:
            self.quantization_config = quantization_config.resolved(calibrated=False)

    def is_serializable(self) -> bool:
        """Whether save_pretrained works."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ConfigError for weights that are to stay on the disk."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError("device_map puts layers on the disk, where quantized weights cannot stay; use memory")

    def update_attn_implementation(self, config: Any) -> Any:
        """Changes nothing: it is where config.json can be compared before a model is built by it."""
        self._require_own_config(config)
        return config

    update_tp_plan = update_attn_implementation  # the same place in transformers 5.16

    def _require_own_config(self, config: Any) -> None:
        folder = Path(config.name_or_path or "")
        if self.pre_quantized and (folder / checksums.CONFIG).is_file() and (files := weight_files(folder)):
            if self.quantization_config.has_checksums:
                checksums.require_config(folder, files)
            else:
                require_layers(getattr(config.get_text_config(), "num_hidden_layers", None), files)

    def _require_sound_files(self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files:
            return
        if any(file.suffix != ".safetensors" for file in files):
            raise CheckpointError(
                f"{files[0]} is no safetensors file, and mikv writes no others; the folder is damaged"
            )
        if self.quantization_config.has_checksums:
            if (files[0].parent / checksums.CONFIG).is_file():
                checksums.require_config(files[0].parent, files)
            checksums.require_tensors(files)
        else:
            logger.warning(
                "%s was quantized by a mikv that wrote no checksums: damage that leaves shapes and ranges alone would "
                "not be seen; load it and save_pretrained it to have them",
                files[0].parent,
            )
        passed_over = [_NOTICE, *(f"{name}.weight" for name, m in model.named_modules() if isinstance(m, BCQModule))]
        require_complete(model, files, passed_over)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *(f"^{re.escape(name)}$" for name in passed_over)}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put empty quantized layers in place, or note which layers to quantize."""
        config = self.quantization_config
        is_split = getattr(model.config, "distributed_config", None) is not None
        if is_split and (config.quantize_embeddings or not self.pre_quantized):
            raise ConfigError(
                "a model that is split over processes must have been quantized and saved before, with "
                "quantize_embeddings=False"
            )
        modules.correct_ties(model, [Path(file) for file in kwargs.get("checkpoint_files") or ()])
        if self.pre_quantized:
            _name_from_here(model, config)
        if not self.pre_quantized or config.modules_to_not_convert is None:
            modules.fix_skipped(model, config)
        names = modules.linear_names(model, config)
        head, embedding = self._embeddings(model) if config.quantize_embeddings else ("", "")
        if embedding:
            names.append(embedding)
        _leave_alone(model, names)
        if not self.pre_quantized:
            self.pending = set(names)
            self.tied = (head, embedding) if embedding and modules.is_tied(model) else None
            if self.tied:
                modules.forget_ties(model)
            return
        is_tied = bool(embedding) and modules.is_tied(model)
        for name in names:
            new = modules.empty_like(model.get_submodule(name), config.of_module(name), self._precisions(name))
            modules.exchange(model, name, new)
        if is_tied:
            modules.tie_head(model, head, embedding)
        self._require_sound_files(model, kwargs.get("checkpoint_files"))

    def _embeddings(self, model: PreTrainedModel) -> tuple[str, str]:
        """Output head and embedding; the head is "" for the body of a model that was saved with one."""
        if self.pre_quantized and model.get_output_embeddings() is None:
            return "", modules.embedding_names(model)[1] or ""
        return modules.require_embeddings(model)

    def _precisions(self, name: str) -> tuple[int, ...]:
        config = self.quantization_config
        return config.precisions if config.nested_bits else (config.of_module(name).bits,)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a weight is to be quantized; of quantized ones that their shapes are mikv's to check."""
        name, _, part = param_name.rpartition(".")
        if not self.pre_quantized:
            return part == "weight" and name in self.pending
        return part != "bias" and isinstance(model.get_submodule(name), BCQModule)

    def get_quantize_ops(self) -> ConversionOps:
        """What turns a weight into a quantized layer."""
        return _QuantizeOnLoad(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for parts of a coding: transformers would cast a damaged file's into shape."""
        part = converter.target_patterns[0].rpartition(".")[2]
        is_coding = part.startswith(("planes", "scales", "offset"))
        return None if is_coding else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check what was read and bring it into the form that kernels read."""
        if self.failure is not None:
            raise self.failure
        if self.pending:
            raise CheckpointError(f"the checkpoint has no weights for {sorted(self.pending)[0]}")
        for name, module in model.named_modules():
            if isinstance(module, BCQModule) and not module.is_arranged:
                if self.pre_quantized:
                    _require_loaded(model, name, module)
                module.arrange()
        self.pre_quantized = True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What save_pretrained writes. Raises CacheStateError for one process's part of a model."""
        if any(isinstance(module, BCQModule) and module.is_shard for module in model.modules()):
            raise CacheStateError("the model is split over processes; save it where it was quantized, in one")
        state = model.state_dict()
        first = next((name for name, module in model.named_modules() if isinstance(module, BCQLinear)), None)
        if first is not None:
            byte = torch.zeros(1, dtype=torch.uint8, device="cpu")
            state |= {f"{first}.weight": byte, _NOTICE: byte.clone()}
        self.quantization_config.format = FORMAT_VERSION
        return checksums.describe(model, state)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Plain layers with the weights that the codings stand for."""
        # a name is what save_pretrained leaves in the configuration
        of_weights: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        was_tied = any(isinstance(module, TiedHead) for module in model.modules())
        for name, module in list(model.named_modules()):
            if isinstance(module, (BCQModule, TiedHead)):
                modules.exchange(model, name, _plain(module, of_weights))
        if was_tied:
            modules.remember_ties(model)
            model.tie_weights()
        return model


class _QuantizeOnLoad(ConversionOps):
    """Quantizes a weight when transformers has read it, and puts the layer in place."""

    def __init__(self, quantizer: BCQQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing is left to be set. Errors are kept: transformers would turn them into log lines."""
        quantizer, model = self.quantizer, kwargs["model"]
        missing = kwargs.get("missing_keys") or set()
        for key, value in input_dict.items():
            name = key.rpartition(".")[0]
            weight = value[0] if isinstance(value, list) else value
            model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
            missing.discard(key)
            quantizer.pending.discard(name)
            try:
                quantize_layer(model, name, quantizer.quantization_config, None)
            except MiKVError as error:
                quantizer.failure = quantizer.failure or type(error)(f"{name}: {error}")
            if quantizer.tied and name == quantizer.tied[1] and quantizer.failure is None:
                modules.tie_head(model, *quantizer.tied)
                missing.discard(f"{quantizer.tied[0]}.weight")
        return {}


def _name_from_here(model: PreTrainedModel, config: BCQConfig) -> None:
    """Names as the body of a model has them, if the model is one: without the prefix that they have under a head."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:
        config.module_settings = {name.removeprefix(prefix): s for name, s in config.module_settings.items()}
        if config.modules_to_not_convert is not None:
            config.modules_to_not_convert = [name.removeprefix(prefix) for name in config.modules_to_not_convert]


def _leave_alone(model: PreTrainedModel, names: list[str]) -> None:
    """Keep transformers from initializing the weights of these layers from above, as it does with GPT-2's."""
    for parent in {name.rpartition(".")[0] for name in names}:
        module = model.get_submodule(parent)
        if not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module._is_hf_initialized = True


def _require_loaded(model: PreTrainedModel, name: str, module: BCQModule) -> None:
    for part, parameter in module.named_parameters(recurse=False):
        if not getattr(parameter, "_is_hf_initialized", False):
            raise missing_tensor(model, f"{name}.{part}")
    module.require_sound(name)


def _plain(module: BCQModule | TiedHead, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        if isinstance(module, BCQEmbedding):
            plain: nn.Module = nn.Embedding(module.num_embeddings, module.embedding_dim)
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    if isinstance(module, BCQModule):
        plain.weight = nn.Parameter(module.coding().dequantize().to(dtype), requires_grad=False)
    if module.bias is not None:
        plain.bias = module.bias
    return plain
