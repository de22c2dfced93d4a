"""A GGUF file's 4-bit codes become a model's weights: those of its own layers, in the order of the model's rows."""

import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import mikv
from mikv import CheckpointError, ConfigError
from mikv.integrations.quantizer import import_gguf
from tiny import tiny_model

Q4_0, Q4_1, Q8_0 = (gguf.GGMLQuantizationType[kind] for kind in ("Q4_0", "Q4_1", "Q8_0"))
OTHER = "model.layers.0.mlp.up_proj"


@pytest.fixture(params=[Q4_0, Q4_1], ids=["Q4_0", "Q4_1"])
def written(request: Any, tmp_path: Path) -> tuple[Any, Path, dict[str, Tensor]]:
    """A model, a file that holds its layers with their rows in another order, and the weights before."""
    model, file = tiny_model("llama"), tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for i, (name, module) in enumerate(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            kind = Q8_0 if name == OTHER else request.param
            blocks = gguf.quants.quantize(module.weight.detach().numpy(), kind)
            module.weight.data = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
            order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(i)).numpy()
            writer.add_tensor(f"blk.{i}.weight", blocks[order], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, file, {name: x.detach().clone() for name, x in model.named_parameters()}


def test_the_codes_of_the_file_are_taken_row_by_row(written: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, file, before = written
    with caplog.at_level(logging.WARNING, logger="mikv"):
        report = import_gguf(model, file)
    assert (report.method, report.bits_per_weight, len(report.layers)) == ("import", 5.0, 13)
    for layer in report.layers:
        coding = model.get_submodule(layer.name).coding()
        step = 2 * coding.offset.abs().float().amax() * 2.0**-11  # of float16, and as much for sums in float32
        assert float((coding.dequantize() - before[f"{layer.name}.weight"]).abs().max()) <= step
        assert layer.output_error < 1e-6
    assert torch.equal(model.get_submodule(OTHER).weight, before[f"{OTHER}.weight"])
    assert OTHER in caplog.text


def test_an_imported_model_is_saved_and_loaded(written: Any, tmp_path: Path) -> None:
    model, file, _ = written
    import_gguf(model, file)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert type(loaded.get_submodule(OTHER)) is torch.nn.Linear


def test_a_model_that_is_not_the_file_s_is_refused(written: Any) -> None:
    _, file, _ = written
    with pytest.raises(ConfigError, match=r"no linear layer of the model is Q4_0 or Q4_1 in model\.gguf"):
        import_gguf(tiny_model("llama"), file)


def test_a_file_that_is_cut_off_is_refused(written: Any) -> None:
    model, file, _ = written
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is the file complete"):
        import_gguf(model, file)


def test_import_is_no_method_of_quantize_or_loading(tmp_path: Path) -> None:
    config = mikv.BCQConfig(method="import")
    with pytest.raises(ConfigError, match="takes codes that files have; call import_gguf or import_packed"):
        mikv.quantize(tiny_model("llama"), config)
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="takes codes that files have"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
