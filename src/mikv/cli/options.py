"""Options that several commands share, and what they become: a MiKVConfig and a loaded model.

Refuses contradictions before anything is loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mikv.cache.config import PRESETS, MiKVConfig
from mikv.cli.terminal import spinner
from mikv.errors import ConfigError
from mikv.models import BUNDLED_MODEL, LoadedModel, load_model

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help=f"{BUNDLED_MODEL} (bundled), a folder, a .gguf file, or a Hugging Face hub id."),
]
PresetOption = Annotated[str | None, typer.Option(help=f"Cache preset: {', '.join(PRESETS)}. [default: balanced]")]
BudgetOption = Annotated[
    float | None, typer.Option(help="Cache size as a share of the fp16 bytes, for example 0.25; picks the best preset.")
]
ConfigOption = Annotated[Path | None, typer.Option(help="A cache configuration written with MiKVConfig.to_json.")]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Stop an answer after this many tokens.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token; more is bolder.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes answers at a temperature repeatable.")]
SystemOption = Annotated[str | None, typer.Option(help="System message that precedes the conversation.")]


@dataclass(frozen=True)
class CacheChoice:
    """What --preset, --budget and --config ask for: a fixed configuration, or a budget that depends on the model."""

    fixed: MiKVConfig | None
    budget: float | None

    @classmethod
    def of_options(cls, preset: str | None, budget: float | None, config: Path | None) -> "CacheChoice":
        """Raises ConfigError if more than one is given or one cannot work."""
        options = {"--preset": preset, "--budget": budget, "--config": config}
        given = [name for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other; give one of --preset, --budget, --config")
        if config is not None:
            return cls(MiKVConfig.from_file(config), None)
        if budget is None:
            return cls(MiKVConfig.preset(preset or "balanced"), None)
        if not 0 < budget <= 1:
            raise ConfigError(f"--budget {budget:g} must be a share of the fp16 bytes, more than 0 and at most 1")
        return cls(None, budget)

    def for_model(self, model_config: Any) -> MiKVConfig:
        """The configuration for a model. Raises ConfigError if no preset meets the budget."""
        if self.fixed is not None:
            return self.fixed
        assert self.budget is not None
        return MiKVConfig.for_budget(self.budget, model_config)


def load_for_cli(name: str, *, quiet: bool = False) -> LoadedModel:
    """`load_model`, with its steps behind a spinner if stderr is a terminal and `quiet` is False."""
    with spinner(quiet=quiet) as show:
        return load_model(name, on_progress=show)
