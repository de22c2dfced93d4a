"""Keys and values too small for 16-bit scales are said, layer by layer; those that the scales hold are not."""

import logging

import pytest
import torch

from mikv import MiKVCache, MiKVConfig
from mikv.integrations.transformers.versions import as_argument
from tiny import tiny_model


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize(
    ("size", "is_said"), [(1.0, False), (1e-4, False), (1e-6, True), (1e-7, True), (1e-20, True), (0.0, False)]
)
def test_what_16_bit_scales_cannot_hold_is_said(
    caplog: pytest.LogCaptureFixture, projection: str, size: float, is_said: bool
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.get_submodule(projection).weight.mul_(size)
        with caplog.at_level(logging.WARNING, "mikv"):
            model(torch.arange(3, 83)[None], **as_argument(MiKVCache(model.config, MiKVConfig.preset("balanced"))))
    said = [record.getMessage() for record in caplog.records if "too small for scales" in record.getMessage()]
    assert bool(said) == is_said
    assert all(line.startswith("layer 1: a head's ") and "skip_layers=(1,)" in line for line in said)
