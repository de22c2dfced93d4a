"""The bundled model with binary-coded weights."""

from pathlib import Path

import pytest
import torch

import mikv
from mikv.models import load_model

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
