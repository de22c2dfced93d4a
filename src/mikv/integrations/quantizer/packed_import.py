"""Models that GPTQ or AWQ quantized become ours: their codes as sign planes, without rounding weights a second time.

The folder is written anew in mikv's own format, a layer at a time, into a folder that lives as long as this takes, and
transformers loads it from there. Memory holds a layer and what is still to be written (256 MB, or a tensor that is
larger), then the quantized model.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mikv.errors import CheckpointError, UnsupportedModelError
from mikv.integrations.quantizer import modules
from mikv.integrations.quantizer.config import IMPORT, BCQConfig
from mikv.integrations.quantizer.packed_folder import PackedFolder
from mikv.integrations.quantizer.quantization import LayerReport, QuantizationReport
from mikv.integrations.quantizer.shards import Shards
from mikv.weights.packed import unpack
from mikv.weights.solve import output_error

_GENERATION = "generation_config.json"


def import_packed(
    folder: Path,
    *,
    scratch: Path | None = None,
    on_progress: Callable[[LayerReport, int, int], None] | None = None,
) -> tuple[PreTrainedModel, QuantizationReport]:
    """The model of a folder whose config.json has a quantization_config with quant_method gptq or awq.

    Weights are scale * (code - zero) but for one rounding per group: the offset to float16, which is exact for
    symmetric grids. Tensors that are not quantized stay as they are. `scratch` is where the model is written meanwhile,
    by default the system's folder for temporary files. Neither gptqmodel nor autoawq is needed.

    Raises:
        ConfigError: nothing to import, or groups that mikv cannot have.
        UnsupportedModelError: act-order, other bits or packed formats, mixture of experts.
        CheckpointError: tensors that are missing or contradict config.json.

    """
    start = time.perf_counter()
    source = PackedFolder.open(folder)
    config = source.settings.config()
    own, skeleton = _skeleton(folder)
    layers = _layers(source, skeleton, config)
    plain = _plain(source, skeleton)
    reports: list[LayerReport] = []
    with TemporaryDirectory(prefix=".import.", dir=scratch) as place:
        with Shards(Path(place)) as shards:
            for layer in layers:
                reports.append(_write_layer(source, layer, shards))
                if on_progress is not None:
                    on_progress(reports[-1], len(reports), len(layers))
            for name in plain:
                shards.add({name: source.read(name)})
        own.quantization_config = config.to_dict()
        own.dtype = own.dtype or source.read(plain[0]).dtype  # not that of the scales
        model = _load(own, folder, Path(place))
    return model, QuantizationReport(tuple(reports), IMPORT, time.perf_counter() - start)


def _skeleton(folder: Path) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The model's configuration as it was before it was quantized, and the model without weights."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        del config.quantization_config
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"transformers cannot build the model of {folder}: {error}") from error


def _layers(source: PackedFolder, skeleton: PreTrainedModel, config: BCQConfig) -> list[str]:
    """The packed layers in the order of the model, all of them sound. Writes into `config` which are not packed."""
    if experts := [layer for layer in source.layers if "experts" in layer.split(".")]:
        raise UnsupportedModelError(f"{experts[0]}: the experts of mixture-of-experts models cannot be imported")
    linear = {name: module for name, module in skeleton.named_modules() if type(module) in (nn.Linear, Conv1D)}
    if unknown := sorted(set(source.layers) - set(linear)):
        raise UnsupportedModelError(f"{unknown[0]} is no linear layer of transformers' {type(skeleton).__name__}")
    if not source.layers:
        raise CheckpointError(f"{source.folder} has no packed layer, a tensor whose name ends in .qweight")
    config.modules_to_not_convert = sorted(set(linear) - set(source.layers))
    names = modules.linear_names(skeleton, config)
    if lost := sorted(set(source.layers) - set(names)):
        raise UnsupportedModelError(f"{lost[0]} cannot be imported, because {config.modules_to_not_convert} are plain")
    head, _ = modules.embedding_names(skeleton)
    if head in names and modules.is_tied(skeleton):
        raise UnsupportedModelError(f"{head} is packed, but the token embedding that it is tied to is not")
    for name in names:
        source.require_layer(name, *modules.sizes(linear[name]))
    return names


def _plain(source: PackedFolder, skeleton: PreTrainedModel) -> list[str]:
    """The tensors to take over as they are. Raises CheckpointError for those of other shapes and those not there.

    Old names, which transformers translates, are its to check.
    """
    plain = [name for name in source.plain if not _is_empty_bias(source, name, skeleton)]
    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    for name in sorted(set(plain) & set(wanted)):
        source.require_shape(name, wanted[name], "by config.json")
    tied = skeleton.all_tied_weights_keys
    known = {*plain, *tied, *tied.values(), *(f"{layer}.weight" for layer in source.layers)}
    missing = sorted(set(wanted) - known)
    if missing and set(plain) <= set(wanted):
        raise CheckpointError(f"{source.folder} has no {missing[0]}; the folder is incomplete")
    return plain


def _write_layer(source: PackedFolder, layer: str, shards: Shards) -> LayerReport:
    start = time.perf_counter()
    weight = unpack(source.settings.layout, source.read_layer(layer))
    coding = weight.coding()
    assert coding.offset is not None
    shards.add({f"{layer}.{part}": getattr(coding, part) for part in ("planes", "scales", "offset")})
    error, bits_per_weight = output_error(weight.dequantize(), coding), coding.bits_per_weight
    seconds = time.perf_counter() - start
    return LayerReport(layer, coding.bits, coding.group_size, bits_per_weight, weight.codes.numel(), error, seconds)


def _is_empty_bias(source: PackedFolder, name: str, skeleton: PreTrainedModel) -> bool:
    """Whether it is a bias of zeros, which some versions of AutoGPTQ give to layers that have none."""
    layer, _, part = name.rpartition(".")
    if part != "bias" or layer not in source.layers or modules.bias_of(skeleton.get_submodule(layer)) is not None:
        return False
    if bool(source.read(name).any()):
        raise CheckpointError(f"{name} is not zero, but the model's layer has no bias by config.json")
    return True


def _load(config: PreTrainedConfig, folder: Path, place: Path) -> PreTrainedModel:
    """What was written to `place`, under the name of the folder it was made from."""
    config.save_pretrained(place)
    if (folder / _GENERATION).is_file():
        shutil.copy(folder / _GENERATION, place)
    model, info = AutoModelForCausalLM.from_pretrained(
        place, dtype="auto", output_loading_info=True, trust_remote_code=False
    )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder} has no {missing[0]}; the folder is incomplete")
    model.name_or_path = model.config.name_or_path = str(folder)
    loaded: PreTrainedModel = model.eval()
    return loaded
