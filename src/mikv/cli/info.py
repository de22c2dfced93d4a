"""`mikv info`: what is installed, what will be used, and where things are kept. Missing parts are facts, not errors."""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.table import Table

from mikv.cache.config import PRESETS, MiKVConfig
from mikv.cli.terminal import console
from mikv.errors import MiKVError
from mikv.gguf_model import cache_dir, converted_folder, is_complete
from mikv.models import BUNDLED_MODEL, bundled_model_file
from mikv.processor import cpu_model

_PACKAGES = ("mikv", "torch", "transformers", "safetensors")
_HEAD_DIM = 64  # the bundled model's; overheads shrink a little with larger ones


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over packed tiers, whether it is in use, and why or why not."""

    name: str
    used: bool
    reason: str


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, hardware, backends, presets and where the cache is."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    out = console()
    out.print(_facts_table(facts))
    out.print(_presets_table(facts["presets"]))


def collect() -> dict[str, Any]:
    """Everything that `mikv info` shows, as JSON types."""
    threads, accelerators = _torch_facts()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "threads": threads},
        "accelerators": accelerators,
        "backends": [vars(backend) for backend in backends()],
        "native": _native_facts(),
        "bundled_model": _bundled_model(),
        "cache_dir": str(cache_dir()),
        "presets": [{"name": name} | _preset(name) for name in PRESETS],
    }


def backends() -> list[Backend]:
    """All backends, the one in use first."""
    module, reason = _native()
    native = Backend("native CPU kernels", module is not None, reason)
    reference = Backend("pytorch reference", module is None, reason if module is None else "works everywhere")
    triton = Backend("triton GPU kernels", False, "not built yet")
    return [native, reference, triton] if module is not None else [reference, native, triton]


def _native() -> tuple[ModuleType | None, str]:
    """The native module, or None, and why."""
    try:
        from mikv.ops import native
    except (ImportError, OSError) as error:
        return None, f"cannot be loaded: {error}"
    except MiKVError as error:  # MIKV_ISA names what there is not
        return None, str(error)
    return native.module, native.reason


def _native_facts() -> dict[str, Any] | None:
    module, _ = _native()
    if module is None:
        return None
    return {
        "isa": module.isa(),
        "isas_available": module.isas_available(),
        "isas_compiled": module.isas_compiled(),
        "threads": module.thread_provider(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torch_facts() -> tuple[int | None, list[str]]:
    try:
        import torch
    except (ImportError, OSError):
        return None, []
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    return torch.get_num_threads(), accelerators


def _bundled_model() -> dict[str, Any]:
    try:
        converted = is_complete(converted_folder(bundled_model_file()))
    except (MiKVError, OSError) as error:
        return {"name": BUNDLED_MODEL, "installed": False, "converted": False, "note": str(error)}
    note = "ready" if converted else "will be converted when it is first used, in about 20 seconds"
    return {"name": BUNDLED_MODEL, "installed": True, "converted": converted, "note": note}


def _preset(name: str) -> dict[str, Any]:
    try:
        from mikv.cache.accounting import nominal_bits

        config = MiKVConfig.preset(name)
    except (ImportError, OSError):
        return {"tiers": "needs torch", "nominal_bits": None}
    low = f"keys {config.low_k}, values {config.low_v}"
    tiers = f"{config.importance_ratio:.0%} {config.high}, rest {low if config.low_k != config.low_v else config.low_k}"
    return {"tiers": tiers, "nominal_bits": round(nominal_bits(config, _HEAD_DIM), 2)}


def _facts_table(facts: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in facts["versions"].items():
        table.add_row(name, value)
    cpu = facts["cpu"]
    table.add_row("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads'] or 'unknown'} threads")
    table.add_row("accelerators", ", ".join(facts["accelerators"]) or "none")
    for backend in facts["backends"]:
        state = "in use" if backend["used"] else "not in use"
        table.add_row("attention", f"{backend['name']}: {state}, {backend['reason']}")
    if native := facts["native"]:
        runs, compiled = (", ".join(native[name]) for name in ("isas_available", "isas_compiled"))
        table.add_row("instructions", f"{native['isa']} in use; {runs} run here; {compiled} are compiled")
        table.add_row("threads", f"{cpu['threads']} of {native['threads']}")
    table.add_row("bundled model", f"{facts['bundled_model']['name']}: {facts['bundled_model']['note']}")
    table.add_row("cache folder", facts["cache_dir"])
    return table


def _presets_table(presets: list[dict[str, Any]]) -> Table:
    table = Table("preset", "tiers", title=f"presets; bits per number for heads of {_HEAD_DIM}", title_justify="left")
    table.add_column("bits", justify="right")
    table.add_column("of fp16", justify="right")
    for preset in presets:
        bits = preset["nominal_bits"]
        shown = ("-", "-") if bits is None else (f"{bits:.2f}", f"{bits / 16:.2f}")
        table.add_row(preset["name"], preset["tiers"], *shown)
    return table
