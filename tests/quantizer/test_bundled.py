"""The bundled model with binary-coded weights."""

from pathlib import Path

import pytest
import torch

import mikv
from mikv.integrations.quantizer import import_gguf
from mikv.models import bundled_model_file, load_model

TEXT = "The capital of France is Paris. The capital of Italy is Rome, the capital of Germany is Berlin. Water boils at"
# all layers take half a minute
CONFIG = mikv.BCQConfig(
    bits=4,
    group_size=64,
    method="rtn",
    quantize_embeddings=True,
    modules_to_not_convert=[f"model.layers.{i}" for i in range(3, 30)],
)


@pytest.mark.bundled
def test_smollm2_with_layers_and_embedding_in_4_bits_predicts_what_it_predicted(tmp_path: Path) -> None:
    loaded = load_model()
    model, tokens = loaded.model, loaded.tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        exact = model(**tokens).logits.log_softmax(-1)
        mikv.quantize(model, CONFIG)
        coded = model(**tokens).logits
        model.save_pretrained(tmp_path)
        loaded.tokenizer.save_pretrained(tmp_path)
        again = load_model(str(tmp_path)).model(**tokens).logits
    assert torch.equal(again, coded)
    divergence = torch.nn.functional.kl_div(coded.log_softmax(-1)[0], exact[0], log_target=True, reduction="batchmean")
    assert divergence < 0.2  # 0.106 measured


@pytest.mark.bundled
def test_the_4_bit_codes_of_smollm2_s_file_are_its_weights_but_for_one_rounding_to_float16() -> None:
    model = load_model().model
    plain = {name: x.detach().clone() for name, x in model.named_parameters()}
    report = import_gguf(model, bundled_model_file())
    assert (len(report.layers), report.bits_per_weight) == (210, 5.0)
    for layer in report.layers:
        coding, weight = model.get_submodule(layer.name).coding(), plain[f"{layer.name}.weight"]
        off = (coding.dequantize() - weight).unflatten(1, (-1, 32)).abs().amax(2)
        offset, scale = coding.offset[0].float().abs(), coding.scales[0].float()
        half_step = torch.clamp(offset * 2.0**-11, min=2.0**-25)
        assert bool((off <= 1.01 * half_step + 1e-6 * (scale + offset)).all()), layer.name
