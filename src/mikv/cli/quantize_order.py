"""What one `mikv quantize` is to do: refuses what cannot be before the model is loaded, then does it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mikv.cli.measuring import Show
from mikv.errors import ConfigError

if TYPE_CHECKING:
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
        """Whether codes are taken from a GGUF file as they are."""
        from mikv.integrations.quantizer.config import IMPORT

        return self.config.method == IMPORT

    def _require_importable(self, source: Path | str) -> None:
        """Raise ConfigError for a model that is no GGUF file, and for settings that the file decides."""
        config = self.config
        if not (isinstance(source, Path) and source.is_file()):
            raise ConfigError(f"--method import takes the codes of a .gguf file, which {self.model} is not")
        if (config.bits, config.group_size) != (4, 32):
            raise ConfigError("--method import takes 4 bits in groups of 32; leave out --bits and --group-size")
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
        from mikv.models import load_model

        loaded = load_model(self.model)
        plain_bytes, memory = _bytes_in_memory(loaded.model), PeakMemory()
        report = self._quantized(loaded, show)
        logging.disable_progress_bar()  # of writing files
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        sizes = {"bytes_before": plain_bytes, "bytes_after": _bytes_in_files(folder), "peak_rss_bytes": memory.peak()}
        return self._description(report) | sizes | {"layers": [asdict(layer) for layer in report.layers]}

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

    def _description(self, report: "QuantizationReport") -> dict[str, Any]:
        return {
            "model": self.model,
            "out": str(self.out),
            "bits": self.config.bits,
            "budget_bits": self.budget_bits,
            "group_size": self.config.group_size,
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
