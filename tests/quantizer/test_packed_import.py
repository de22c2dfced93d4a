"""What GPTQ and AWQ packed stands for the same weights afterwards, in mikv's own format; what would not is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import Grid, Program, Tensors, columns, packed, quantized_names, write
from quantized_models import TOKENS, logits, reload
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from mikv import CheckpointError, ConfigError, MiKVError, UnsupportedModelError
from mikv.cli import app
from mikv.integrations.quantizer import shards
from mikv.integrations.quantizer.packed_import import import_packed
from mikv.weights.linear import BCQLinear

AWQ = Program("awq", "gemm")
LAYER = "model.layers.1.self_attn.k_proj"  # 128 outputs, 64 inputs
PROGRAMS = [
    *(Program(format=name, bits=bits) for name in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)),
    Program(bits=3, group_size=-1),
    Program(format="gptq_v2", bits=8, group_size=-1, desc_act=True),  # a single group is in order
    Program(bits=4, group_size=64),  # the last group of down_proj's 96 inputs has 32
    AWQ,
    Program("awq", "gemm", group_size=-1),
]


def change(**settings: Any) -> Any:
    return lambda tensors, found: found.update(settings)


def drop(name: str) -> Any:
    return lambda tensors, found: tensors.pop(name)


def rename(name: str, new: str) -> Any:
    return lambda tensors, found: tensors.update({new: tensors.pop(name)})


def replace(name: str, new: Any) -> Any:
    return lambda tensors, found: tensors.update({name: new(tensors[name]).contiguous()})


def add(name: str, size: int = 96) -> Any:
    return lambda tensors, found: tensors.update({name: torch.ones(size)})


def name_of(value: Any) -> str:
    return f"{value.format}-{value.bits}-{value.group_size}" if isinstance(value, Program) else ""


def allowed(grid: Grid, program: Program, size: int) -> Tensor:
    """How far weights (M, K) may be from what they stand for: the offset's rounding to float16, and float32's sums."""
    codes, scale, zero = grid
    offset = scale.double() * ((2**program.bits - 1) / 2 - zero)
    lost = (offset.half().double() - offset).abs() + scale.double() * 2.0**program.bits * 2.0**-23
    return lost.repeat_interleave(size, 1)[:, : codes.shape[1]]


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_weights_are_those_of_the_file_but_for_one_rounding_of_the_offset(program: Program, tmp_path: Path) -> None:
    wanted = write(tmp_path / "packed", program)
    model, report = import_packed(tmp_path / "packed")
    assert [layer.name for layer in report.layers] == list(wanted.grids)
    for layer in report.layers:
        weight, coding = wanted.weight(layer.name), model.get_submodule(layer.name).coding()
        size = columns(weight, program)
        off = (coding.dequantize() - weight).abs()
        assert bool((off <= allowed(wanted.grids[layer.name], program, size)).all()), layer.name
        assert (coding.bits, coding.group_size) == (program.bits, min(size, weight.shape[1]))
        assert coding.is_uniform
    for name, x in wanted.model.state_dict().items():
        if name.rpartition(".")[0] not in wanted.grids:
            assert torch.equal(model.state_dict()[name], x), name


@pytest.mark.parametrize("program", [Program(), Program(format="gptq_v2", bits=3), AWQ], ids=name_of)
def test_logits_are_those_of_the_float_model(program: Program, tmp_path: Path) -> None:
    wanted = logits(write(tmp_path / "packed", program).model)
    model, _ = import_packed(tmp_path / "packed")
    largest = float(wanted.abs().max())
    assert torch.allclose(logits(model), wanted, rtol=0, atol=0.05 * largest), "kernels round their inputs"
    assert torch.allclose(logits(model.dequantize()), wanted, rtol=0, atol=1e-3 * largest)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_weights_are_the_same_bit_for_bit(bits: int, tmp_path: Path) -> None:
    wanted = write(tmp_path / "packed", Program(bits=bits, sym=True))
    model, report = import_packed(tmp_path / "packed")
    for layer in report.layers:
        assert torch.equal(model.get_submodule(layer.name).coding().dequantize(), wanted.weight(layer.name))
        assert layer.output_error == 0
    assert torch.equal(logits(model.dequantize()), logits(wanted.model))


@pytest.mark.parametrize("program", [Program(bits=3, group_size=-1), AWQ], ids=name_of)
def test_an_imported_model_is_saved_and_loaded_as_our_own(program: Program, tmp_path: Path) -> None:
    write(tmp_path / "packed", program)
    model, report = import_packed(tmp_path / "packed")
    assert report.method == "import"
    config = model.hf_quantizer.quantization_config
    groups = None if program.group_size == -1 else program.group_size
    assert (config.method, config.bits, config.group_size) == ("import", program.bits, groups)
    assert config.modules_to_not_convert == ["lm_head"]
    again = reload(model)
    assert isinstance(again.get_submodule(LAYER), BCQLinear)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_head_that_is_tied_to_the_embedding_stays_tied(tmp_path: Path) -> None:
    wanted = write(tmp_path / "packed", AWQ, edit=drop("lm_head.weight"), tie_word_embeddings=True)
    model, _ = import_packed(tmp_path / "packed")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, wanted.weight("lm_head"))
    write(tmp_path / "packed", AWQ, names=lambda _: ["lm_head"], tie_word_embeddings=True)
    with pytest.raises(UnsupportedModelError, match="lm_head is packed, but the token embedding"):
        import_packed(tmp_path / "packed")


def test_a_model_keeps_its_name_and_how_it_generates(tmp_path: Path) -> None:
    write(tmp_path / "packed", AWQ)
    (tmp_path / "packed/generation_config.json").write_text(json.dumps({"top_k": 7}))
    model, _ = import_packed(tmp_path / "packed")
    assert model.name_or_path == model.config.name_or_path == str(tmp_path / "packed")
    assert model.generation_config.top_k == 7


def test_biases_and_float16_stay_as_they_are(tmp_path: Path) -> None:
    def halve(tensors: Tensors, settings: dict[str, Any]) -> None:
        tensors.update({name: x.half() if x.is_floating_point() else x for name, x in tensors.items()})

    wanted = write(tmp_path / "packed", Program(), family="qwen2", edit=halve)
    file = tmp_path / "packed/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float16"}))
    model, _ = import_packed(tmp_path / "packed")
    assert torch.equal(model.get_submodule(LAYER).bias, wanted.model.get_submodule(LAYER).bias.half())
    assert model.dtype == model.get_submodule("lm_head").weight.dtype == torch.float16


def test_biases_of_zeros_that_the_model_does_not_have_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "packed", AWQ, edit=lambda tensors, _: tensors.update({f"{LAYER}.bias": torch.zeros(128)}))
    assert import_packed(tmp_path / "packed")[0].get_submodule(LAYER).bias is None
    write(tmp_path / "packed", AWQ, edit=lambda tensors, _: tensors.update({f"{LAYER}.bias": torch.ones(128)}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.bias is not zero"):
        import_packed(tmp_path / "packed")


def test_several_files_with_an_index_are_as_good_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packed"
    write(folder, Program())
    whole, _ = import_packed(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"one.safetensors": sorted(tensors)[::2], "two.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(shards, "_BYTES", 1)  # a file for every layer on the way
    assert torch.equal(logits(import_packed(folder)[0]), logits(whole))
    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no two\.safetensors; the folder is incomplete"):
        import_packed(folder)


def test_negative_scales_are_turned_round(tmp_path: Path) -> None:
    codes, scale, zero = write(tmp_path / "packed", Program(format="gptq_v2")).grids[LAYER]
    before = import_packed(tmp_path / "packed")[0].get_submodule(LAYER).coding()
    codes[:2], scale[:2], zero[:2] = 15 - codes[:2], -scale[:2], 15 - zero[:2]
    turned = {f"{LAYER}.{part}": x for part, x in packed(codes, scale, zero, Program(format="gptq_v2")).items()}
    assert int((turned[f"{LAYER}.scales"] < 0).sum()) == 4
    write(tmp_path / "packed", Program(format="gptq_v2"), edit=lambda tensors, _: tensors.update(turned))
    after = import_packed(tmp_path / "packed")[0].get_submodule(LAYER).coding()
    assert torch.equal(after.dequantize(), before.dequantize())


def test_an_output_head_that_is_packed_too_is_imported(tmp_path: Path) -> None:
    wanted = write(tmp_path / "packed", AWQ, names=lambda model: [*quantized_names(model), "lm_head"])
    model, _ = import_packed(tmp_path / "packed")
    assert isinstance(model.get_submodule("lm_head"), BCQLinear)
    largest = float(logits(wanted.model).abs().max())
    assert torch.allclose(logits(reload(model).dequantize()), logits(wanted.model), rtol=0, atol=1e-3 * largest)


REFUSED = [
    (Program(desc_act=True), replace(f"{LAYER}.g_idx", lambda x: x.flip(0)), rf"{LAYER}\.g_idx: .*act-order"),
    (Program(), change(bits=5), "'gptq' with bits=5 cannot be imported; 2, 3, 4, 8 can"),
    (AWQ, change(bits=8), "'awq' with bits=8 cannot be imported; 4 can"),
    (AWQ, change(version="GEMV"), "format 'gemv' cannot be imported; gemm can"),
    (AWQ, change(version="exllama"), "format 'exllama'"),
    (AWQ, change(backend="llm-awq"), "format 'llm-awq'"),
    (Program(), change(checkpoint_format="marlin"), "format 'marlin' cannot be imported; gptq or gptq_v2 can"),
    (Program(), change(is_marlin_format=True), "format 'marlin'"),
    (Program(), change(dynamic={"+:.*k_proj": {"bits": 8}}), r"settings for some layers \(dynamic\)"),
    (AWQ, add("model.extra.qweight"), r"model\.extra is no linear layer of transformers' LlamaForCausalLM"),
    (AWQ, add("model.layers.0.mlp.experts.0.w1.qweight"), r"experts\.0\.w1: the experts of mixture-of-experts"),
]
CONTRADICTORY = [
    (Program(), change(group_size=None), "group_size=None is damaged"),
    (Program(), change(bits=8), r"q_proj\.qweight is \(8, 256\), but \(16, 256\) by config.json \(8 bits"),
    (Program(), change(group_size=64), r"q_proj\.qzeros is \(2, 32\), but \(1, 32\) by .*groups of 64"),
    (Program(sym=True), change(checkpoint_format="gptq_v2"), "zero-points are 7, .* have 8; checkpoint_format"),
    (Program(format="gptq_v2", sym=True), change(checkpoint_format="gptq"), "zero-points are 9, .* have 8"),
    (Program(), replace(f"{LAYER}.qzeros", lambda x: x | 15), rf"{LAYER}\.qzeros: .* stored as 15, .*gptq_v2"),
    (Program(), drop(f"{LAYER}.scales"), rf"has no {LAYER}\.scales"),
    (Program(group_size=-1, desc_act=True), drop(f"{LAYER}.g_idx"), rf"has no {LAYER}\.g_idx"),
    (AWQ, drop(f"{LAYER}.qweight"), rf"has {LAYER}\.\w+, but no {LAYER}\.qweight"),
    (AWQ, drop("model.norm.weight"), r"has no model\.norm\.weight"),
    (AWQ, rename("model.norm.weight", "model.norm.gamma"), r"has no model\.norm\.weight"),
    (AWQ, replace(f"{LAYER}.scales", lambda x: x[:1]), rf"{LAYER}\.scales is \(1, 128\), but \(2, 128\) by"),
    (AWQ, replace("model.norm.weight", lambda x: x[:5]), r"norm\.weight is \(5,\), but \(64,\) by"),
    (AWQ, replace(f"{LAYER}.qweight", lambda x: x.long()), rf"{LAYER}\.qweight is I64, not I32"),
    (AWQ, add("model.layers.0.mlp.act.scales"), r"act\.scales, but no .*AWQ scaled the activations"),
]
NOTHING = [
    (Program(), change(quant_method="fp8"), r"nothing to import \(quant_method 'fp8'\).* gptq or awq .*\.gguf files"),
    (Program(), change(group_size=48), "group_size=48 is not a multiple of 32"),
]


@pytest.mark.parametrize(
    ("program", "edit", "message", "error"),
    [
        *((*case, UnsupportedModelError) for case in REFUSED),
        *((*case, CheckpointError) for case in CONTRADICTORY),
        *((*case, ConfigError) for case in NOTHING),
    ],
)
def test_what_would_not_be_the_same_model_is_refused_by_name(
    program: Program, edit: Any, message: str, error: type[MiKVError], tmp_path: Path
) -> None:
    write(tmp_path / "packed", program, edit=edit)
    with pytest.raises(error, match=message):
        import_packed(tmp_path / "packed", scratch=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["packed"], "nothing is left behind"


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "packed", AWQ, family="mixtral")
    with pytest.raises(UnsupportedModelError, match="hold all experts in one tensor"):
        import_packed(tmp_path / "packed")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_imports_a_folder_that_every_command_takes(tmp_path: Path) -> None:
    write(tmp_path / "packed", Program(bits=3, group_size=-1, sym=True))
    result = run("quantize", tmp_path / "packed", tmp_path / "q", "--method", "import", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert {"bits": 3, "group_size": None, "method": "import", "calibration": "none"}.items() <= record.items()
    assert record["bytes_after"] == (tmp_path / "q/model.safetensors").stat().st_size
    assert record["bytes_before"] == (tmp_path / "packed/model.safetensors").stat().st_size
    assert len(record["layers"]) == 14
    plain = tmp_path / "plain"
    write(plain, Program()).model.save_pretrained(plain)
    other = run("quantize", plain, tmp_path / "p", "--calibration", "none", "--json")
    assert other.exit_code == 0, other.output
    assert set(record) == set(json.loads(other.stdout))
    said = run("generate", "w5 w6", "--model", tmp_path / "q", "--raw", "--max-new-tokens", 4)
    assert said.exit_code == 0, said.output


def test_the_command_says_what_can_be_imported(tmp_path: Path) -> None:
    write(tmp_path / "packed", Program(bits=3, group_size=64))
    command = ("quantize", tmp_path / "packed", tmp_path / "q", "--method", "import")
    assert "takes the folder's own 3 bits, groups of 64; leave out --bits" in run(*command, "--bits", 2).stderr
    write(tmp_path / "packed", Program(), edit=change(quant_method="fp8"))
    assert "whose config.json has a quantization_config with quant_method gptq or awq" in run(*command).stderr
    write(tmp_path / "packed", Program(), edit=change(checkpoint_format="marlin"))
    assert "the packed format 'marlin' cannot be imported; gptq or gptq_v2 can" in run(*command).stderr
    assert not (tmp_path / "q").exists()
