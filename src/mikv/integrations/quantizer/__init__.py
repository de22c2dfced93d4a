"""Binary-coded weights in Hugging Face transformers: quantize a model, save it, load it again."""

from mikv.integrations.quantizer.config import BCQConfig
from mikv.integrations.quantizer.gguf_import import import_gguf
from mikv.integrations.quantizer.journal import Journal
from mikv.integrations.quantizer.packed_import import import_packed
from mikv.integrations.quantizer.quantization import LayerReport, QuantizationReport, quantize, set_bits
from mikv.integrations.quantizer.quantizer import BCQQuantizer

__all__ = [
    "BCQConfig",
    "BCQQuantizer",
    "Journal",
    "LayerReport",
    "QuantizationReport",
    "import_gguf",
    "import_packed",
    "quantize",
    "set_bits",
]
