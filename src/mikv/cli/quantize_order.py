"""What one `mikv quantize` is to do: refuses what cannot be before the model is loaded, then does it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mikv.cli.measuring import Show
from mikv.errors import ConfigError, ModelNotFoundError

if TYPE_CHECKING:
    from mikv.bench.memory import PeakMemory
    from mikv.integrations.quantizer import BCQConfig, LayerReport, QuantizationReport
    from mikv.models import LoadedModel

_NO_CALIBRATION = "none"


@dataclass(frozen=True)
class Order:
    """What to quantize, how, and where it goes. `calibration` is a file, `none`, or None for texts of our own."""

    model: str
    out: Path
    config: "BCQConfig"
    calibration: str | None
    budget_bits: float | None

    def require_possible(self, overwrite: bool) -> None:
        """Raise MiKVError for all that can be known before the model is loaded."""
        from mikv.models import find_model

        source = find_model(self.model)
        if self.is_import:
            self._require_importable(source)
        else:
            self._require_calibration()
        if not self.out.parent.is_dir():
            raise ConfigError(f"{self.out}: there is no folder {self.out.parent}")
        if not self.out.exists():
            return
        if isinstance(source, Path) and self.out.samefile(source):
            raise ConfigError(
                f"{self.out} is the model itself, which --overwrite does not replace; name another folder"
            )
        if not overwrite:
            raise ConfigError(f"{self.out} exists; pass --overwrite to replace it, or name another folder")
        if not (self.out / "config.json").is_file():
            raise ConfigError(f"{self.out} is not the folder of a model, so --overwrite does not replace it")

    @property
    def is_import(self) -> bool:
        """Whether codes are taken as they are."""
        from mikv.integrations.quantizer.config import IMPORT

        return self.config.method == IMPORT

    def _require_importable(self, source: Path | str) -> None:
        """Raise MiKVError for a model that has no codes to import, and for settings that they decide."""
        from mikv.integrations.quantizer.packed_settings import PackedSettings, is_packed

        config, taken = self.config, "4 bits in groups of 32"
        if isinstance(source, Path) and is_packed(source):
            taken = f"the folder's own {PackedSettings.read(source)}"
        elif not (isinstance(source, Path) and source.is_file()):
            raise ConfigError(
                f"--method import takes the codes of a .gguf file, which {self.model} is not, or of a folder whose "
                "config.json has a quantization_config with quant_method gptq or awq"
            )
        if (config.bits, config.group_size) != (4, 32):
            raise ConfigError(f"--method import takes {taken}; leave out --bits and --group-size")
        if self.budget_bits is not None or config.nested_bits or config.quantize_embeddings:
            raise ConfigError("--method import excludes --budget-bits, --nested and --embeddings")
        if self.calibration not in (None, _NO_CALIBRATION):
            raise ConfigError("--method import has nothing to calibrate; leave out --calibration")

    def _require_calibration(self) -> None:
        """Raise ConfigError for settings that go together neither with the texts nor with each other."""
        from mikv.integrations.quantizer.budget import require_budget
        from mikv.integrations.quantizer.config import AUTO
        from mikv.weights.solve import needs_hessian

        self._given_text()
        method, without = self.config.method, self.calibration == _NO_CALIBRATION
        if without and method != AUTO and needs_hessian(method):
            raise ConfigError(
                f"--method {method} needs calibration; leave out --calibration none, or use --method offset"
            )
        self.config.resolved(calibrated=not without)
        if self.budget_bits is not None:
            require_budget(self.budget_bits, self.config, calibrated=not without, name="--budget-bits")

    def carry_out(self, folder: Path, show: Show) -> dict[str, Any]:
        """Load, quantize and save into `folder`. Returns what the record says of it, as JSON types."""
        from transformers.utils import logging

        from mikv.bench.memory import PeakMemory

        memory = PeakMemory()
        loaded, bytes_before, report = self._load_and_quantize(folder.parent, memory, show)
        logging.disable_progress_bar()  # of writing files
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        sizes = {"bytes_before": bytes_before, "bytes_after": _bytes_in_files(folder), "peak_rss_bytes": memory.peak()}
        quantizer: Any = loaded.model.hf_quantizer
        description = self._description(report, quantizer.quantization_config)
        return description | sizes | {"layers": [asdict(layer) for layer in report.layers]}

    def _load_and_quantize(
        self, scratch: Path, memory: "PeakMemory", show: Show
    ) -> "tuple[LoadedModel, int, QuantizationReport]":
        """The quantized model, the bytes it had before, and the report."""
        from mikv.integrations.quantizer.packed_settings import is_packed
        from mikv.models import find_model, load_model

        source = find_model(self.model)
        if self.is_import and isinstance(source, Path) and is_packed(source):
            loaded, report = self._import_packed(source, scratch, show)
            return loaded, _bytes_in_files(source), report
        loaded = load_model(self.model)
        memory.start()
        plain_bytes = _bytes_in_memory(loaded.model)
        return loaded, plain_bytes, self._quantized(loaded, show)

    def _import_packed(self, source: Path, scratch: Path, show: Show) -> "tuple[LoadedModel, QuantizationReport]":
        from transformers import AutoTokenizer

        from mikv.integrations.quantizer.packed_import import import_packed
        from mikv.models import LoadedModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"the folder {source} has no tokenizer that transformers can load") from error
        model, report = import_packed(
            source, scratch=scratch, on_progress=lambda layer, done, total: show(layer.name, done, total)
        )
        return LoadedModel(self.model, model, tokenizer), report

    def _quantized(self, loaded: "LoadedModel", show: Show) -> "QuantizationReport":
        def show_layer(layer: "LayerReport", done: int, total: int) -> None:
            show(layer.name, done, total)

        if self.is_import:
            from mikv.integrations.quantizer.gguf_import import import_gguf
            from mikv.models import find_model

            return import_gguf(loaded.model, Path(find_model(self.model)), on_progress=show_layer)
        import mikv

        return mikv.quantize(
            loaded.model,
            self.config,
            self._texts(loaded),
            tokenizer=loaded.tokenizer,
            budget_bits=self.budget_bits,
            on_progress=show_layer,
            on_measured=lambda name, done, total: show(f"what {name} does", done, total),
        )

    def _description(self, report: "QuantizationReport", config: "BCQConfig") -> dict[str, Any]:
        return {
            "model": self.model,
            "out": str(self.out),
            "bits": config.bits,
            "budget_bits": self.budget_bits,
            "group_size": config.group_size,
            "method": report.method,
            "calibration": self.calibration or (_NO_CALIBRATION if self.is_import else "built-in"),
            "embeddings": self.config.quantize_embeddings,
            "nested_bits": list(self.config.nested_bits),
            "bits_per_weight": report.bits_per_weight,
            "seconds": report.seconds,
        }

    def _given_text(self) -> str | None:
        """The text of --calibration FILE. Raises ConfigError if it cannot be read or is empty."""
        if self.calibration in (None, _NO_CALIBRATION):
            return None
        assert self.calibration is not None
        try:
            text = Path(self.calibration).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read --calibration {self.calibration}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--calibration {self.calibration} is not UTF-8 text: {error}") from error
        if not text.strip():
            raise ConfigError(f"--calibration {self.calibration} is empty; a few thousand words do, or `none`")
        return text

    def _texts(self, loaded: "LoadedModel") -> "list[str] | None":
        if self.calibration == _NO_CALIBRATION:
            return None
        if (text := self._given_text()) is not None:
            return [text]
        from mikv.integrations.quantizer.quantization import MAX_TOKENS, SEQUENCE_LENGTH
        from mikv.lab.weight_fidelity import calibration_texts

        return list(calibration_texts(loaded.tokenizer, MAX_TOKENS // SEQUENCE_LENGTH, SEQUENCE_LENGTH))


def _bytes_in_memory(model: Any) -> int:
    """All different tensors of a model."""
    return sum({x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}.values())


def _bytes_in_files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
