"""What one `mikv quantize` is to do: refuses what cannot be before the model is loaded, then does it."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mikv.cli.measuring import Show
from mikv.cli.quantize_place import NEW, PARTIAL, Place, sync
from mikv.errors import CheckpointError, ConfigError, ModelNotFoundError

if TYPE_CHECKING:
    from mikv.bench.memory import PeakMemory
    from mikv.integrations.quantizer import BCQConfig, LayerReport, QuantizationReport
    from mikv.models import LoadedModel

_NO_CALIBRATION = "none"
_CHARACTERS = 2**20  # of a file that are read at once
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.bin")  # what makes a model


@dataclass(frozen=True)
class Order:
    """What to quantize, how, and where it goes. `calibration` is a file, `none`, or None for texts of our own."""

    model: str
    config: "BCQConfig"
    calibration: str | None
    budget_bits: float | None
    dtype: str | None = None

    def require_possible(self) -> Path | str:
        """What `model` stands for. Raises MiKVError for all that can be known before it is loaded."""
        from mikv.models import find_model, require_dtype

        source = find_model(self.model)
        require_dtype(self.dtype)
        if self.is_import:
            self._require_importable(source)
        else:
            self._require_calibration()
        return source

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
        if config.modules_to_not_convert or self.dtype:
            raise ConfigError("--method import excludes --modules-to-not-convert and --dtype")
        if self.calibration not in (None, _NO_CALIBRATION):
            raise ConfigError("--method import has nothing to calibrate; leave out --calibration")

    def _require_calibration(self) -> None:
        """Raise ConfigError for settings that go together neither with the texts nor with each other."""
        from mikv.integrations.quantizer.budget import require_budget
        from mikv.integrations.quantizer.config import AUTO
        from mikv.weights.solve import needs_hessian

        if self._has_file and not any(part.strip() for part in self._given_text()):
            raise ConfigError(f"--calibration {self.calibration} is empty; a few thousand words do, or `none`")
        method, without = self.config.method, self.calibration == _NO_CALIBRATION
        if without and method != AUTO and needs_hessian(method):
            raise ConfigError(
                f"--method {method} needs calibration; leave out --calibration none, or use --method offset"
            )
        self.config.resolved(calibrated=not without)
        if self.budget_bits is not None:
            require_budget(self.budget_bits, self.config, calibrated=not without, name="--budget-bits")

    def fingerprint(self, source: Path | str) -> dict[str, Any]:
        """All that decides what comes out. Files count by their content."""
        from importlib.metadata import version

        from mikv.integrations.quantizer.quantization import MAX_TOKENS, SEQUENCE_LENGTH

        given = Path(self.calibration) if self.calibration and self._has_file else None
        return {
            "model": source if isinstance(source, str) else _digest(*_files_of(source)),
            "calibration": self.calibration if given is None else _digest(given),
            "tokens": [MAX_TOKENS, SEQUENCE_LENGTH],
            "settings": self.config.to_dict(),
            "budget_bits": self.budget_bits,
            "dtype": self.dtype,
            "versions": {package: version(package) for package in ("mikv", "torch", "transformers")},
        }

    def require_room(self, source: Path | str, place: Place, work: Path) -> None:
        """Raise MiKVError for layers that cannot be quantized and a disk that is too small, as far as files tell."""
        from mikv.integrations.quantizer.preview import bytes_to_write, skeleton

        if not isinstance(source, Path) or not source.exists():
            return
        if self.is_import:
            place.require_room(2 * sum(file.stat().st_size for file in _files_of(source)), work)
        elif source.is_dir() and (model := skeleton(source, self._torch_dtype)) is not None:
            place.require_room(bytes_to_write(model, self.config, self.budget_bits, calibrated=self._calibrated), work)

    def carry_out(self, work: Path, place: Place, show: Show) -> dict[str, Any]:
        """Load and quantize in `work`, the model coming to stand in work/new. Returns what the record says of it."""
        from transformers.utils import logging

        from mikv.bench.memory import PeakMemory

        memory = PeakMemory()
        loaded, bytes_before, report = self._load_and_quantize(work, place, memory, show)
        logging.disable_progress_bar()  # of writing files
        _save(loaded, work)
        bytes_after = _bytes_in_files(work / NEW)
        sizes = {"bytes_before": bytes_before, "bytes_after": bytes_after, "peak_rss_bytes": memory.peak()}
        quantizer: Any = loaded.model.hf_quantizer
        description = self._description(report, quantizer.quantization_config) | {"out": str(place.name)}
        return description | sizes | {"layers": [asdict(layer) for layer in report.layers]}

    def _load_and_quantize(
        self, work: Path, place: Place, memory: "PeakMemory", show: Show
    ) -> "tuple[LoadedModel, int, QuantizationReport]":
        """The quantized model, the bytes it had before, and the report."""
        from mikv.integrations.quantizer.packed_settings import is_packed
        from mikv.models import find_model, load_model

        source = find_model(self.model)
        if self.is_import and isinstance(source, Path) and is_packed(source):
            loaded, report = self._import_packed(source, work, show)
            return loaded, _bytes_in_files(source), report
        loaded = load_model(self.model, dtype=self._torch_dtype)
        memory.start()
        plain_bytes = _bytes_in_memory(loaded.model)
        return loaded, plain_bytes, self._quantized(loaded, work, place, show)

    def _import_packed(self, source: Path, scratch: Path, show: Show) -> "tuple[LoadedModel, QuantizationReport]":
        from transformers import AutoTokenizer

        from mikv.integrations.quantizer.packed_import import import_packed
        from mikv.models import LoadedModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"the folder {source} has no tokenizer that transformers can load") from error
        model, report = import_packed(
            source, scratch=scratch, on_progress=lambda layer, done, total: show(layer.name, done, total)
        )
        return LoadedModel(self.model, model, tokenizer), report

    def _quantized(self, loaded: "LoadedModel", work: Path, place: Place, show: Show) -> "QuantizationReport":
        def show_layer(layer: "LayerReport", done: int, total: int) -> None:
            show(layer.name, done, total)

        if self.is_import:
            from mikv.integrations.quantizer.gguf_import import import_gguf
            from mikv.models import find_model

            return import_gguf(loaded.model, Path(find_model(self.model)), on_progress=show_layer)
        import mikv
        from mikv.integrations.quantizer.journal import Journal
        from mikv.integrations.quantizer.preview import bytes_to_write
        from mikv.integrations.quantizer.quantization import require_plain

        require_plain(loaded.model)
        num_bytes = bytes_to_write(loaded.model, self.config, self.budget_bits, calibrated=self._calibrated)
        place.require_room(num_bytes, work)
        _require_same_revision(loaded, work)
        return mikv.quantize(
            loaded.model,
            self.config,
            self._texts(loaded),
            tokenizer=loaded.tokenizer,
            budget_bits=self.budget_bits,
            on_progress=show_layer,
            on_measured=lambda name, done, total: show(f"what {name} does", done, total),
            journal=Journal.open(work),
        )

    def _description(self, report: "QuantizationReport", config: "BCQConfig") -> dict[str, Any]:
        return {
            "model": self.model,
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

    @property
    def _calibrated(self) -> bool:
        return self.calibration != _NO_CALIBRATION

    @property
    def _has_file(self) -> bool:
        return self.calibration not in (None, _NO_CALIBRATION)

    @property
    def _torch_dtype(self) -> Any:
        import torch

        return getattr(torch, self.dtype) if self.dtype else None

    def _given_text(self) -> Iterator[str]:
        """The text of --calibration FILE, in parts as they are asked for. Raises ConfigError if it cannot be read."""
        name = str(self.calibration)
        if os.path.exists(name) and not os.path.isfile(name):
            raise ConfigError(f"--calibration {name} is not a file")
        try:
            with Path(name).open(encoding="utf-8") as file:
                while part := file.read(_CHARACTERS):
                    yield part
        except OSError as error:
            raise ConfigError(f"cannot read --calibration {name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--calibration {name} is not UTF-8 text: {error}") from error

    def _texts(self, loaded: "LoadedModel") -> "Iterator[str] | list[str] | None":
        if self.calibration == _NO_CALIBRATION:
            return None
        if self._has_file:
            parts = self._given_text()
            return list(parts) if Path(str(self.calibration)).stat().st_size <= _CHARACTERS else parts
        from mikv.integrations.quantizer.quantization import MAX_TOKENS, SEQUENCE_LENGTH
        from mikv.lab.weight_fidelity import calibration_texts

        return list(calibration_texts(loaded.tokenizer, MAX_TOKENS // SEQUENCE_LENGTH, SEQUENCE_LENGTH))


def _save(loaded: "LoadedModel", work: Path) -> None:
    """Write model and tokenizer, then call them whole. Raises CheckpointError."""
    from safetensors import SafetensorError

    partial = work / PARTIAL
    try:
        loaded.model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        sync(partial)
        os.replace(partial, work / NEW)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the model into {work}: {error}") from error


def _require_same_revision(loaded: "LoadedModel", work: Path) -> None:
    """Raise ConfigError if `work` is on another revision of a model from the hub."""
    revision, note = str(getattr(loaded.model.config, "_commit_hash", None)), work / "revision"
    if note.exists() and note.read_text() != revision:
        raise ConfigError(f"{work} holds work on revision {note.read_text()} of {loaded.name}; delete it to begin anew")
    note.write_text(revision)


def _files_of(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return sorted({file for pattern in _FILES for file in source.glob(pattern) if file.is_file()})


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _bytes_in_memory(model: Any) -> int:
    """All different tensors of a model."""
    return sum({x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}.values())


def _bytes_in_files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
