"""Options that several commands share, and what they become: a MiKVConfig and a loaded model.

Refuses contradictions before anything is loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mikv.cache.config import PRESETS, MiKVConfig
from mikv.cache.geometry import context_length
from mikv.cache.settings import MOST
from mikv.cli.terminal import console, spinner
from mikv.errors import ConfigError
from mikv.models import BUNDLED_MODEL, LoadedModel, load_model

_USUAL_TOKENS = 4096
_COLDEST, _HOTTEST = 0.001, 100.0


def _temperature(value: float) -> float:
    """Raise ConfigError for what cannot divide logits; typer's ranges let NaN through."""
    if not (value == 0 or _COLDEST <= value <= _HOTTEST):
        raise ConfigError(f"--temperature {value:g} must be 0, or from {_COLDEST:g} to {_HOTTEST:g}")
    return value


ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help=f"{BUNDLED_MODEL} (bundled), a folder, a .gguf file, or a Hugging Face hub id."),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model, with all your rights. Without this it is never run.",
    ),
]
PresetOption = Annotated[str | None, typer.Option(help=f"Cache preset: {', '.join(PRESETS)}. [default: balanced]")]
BudgetOption = Annotated[
    float | None, typer.Option(help="Cache size as a share of the fp16 bytes, for example 0.25; picks the best preset.")
]
ConfigOption = Annotated[Path | None, typer.Option(help="A cache configuration written with MiKVConfig.to_json.")]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, max=MOST, help="Stop an answer after this many tokens.")]
TemperatureOption = Annotated[
    float, typer.Option(callback=_temperature, help="0 always takes the likeliest token; more is bolder.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Makes answers at a temperature repeatable.")
]
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

    def for_model(self, model_config: Any, num_tokens: int | None = None) -> MiKVConfig:
        """The configuration for a model and a context of `num_tokens`; None is one that is not known, up to 4,096.

        A line on stderr names the preset that a budget chose. In a context too short for the budget it is the smallest.
        Raises ConfigError if no preset would meet it at any length.
        """
        if self.fixed is not None:
            return self.fixed
        assert self.budget is not None
        from mikv.cache.budget import choose_preset, smallest_preset  # PyTorch is not imported to refuse an option

        num_tokens = num_tokens or min(_USUAL_TOKENS, context_length(model_config) or _USUAL_TOKENS)
        try:
            chosen = choose_preset(self.budget, model_config, num_tokens)
            line = str(chosen)
        except ConfigError as error:
            smallest = smallest_preset(self.budget, model_config, num_tokens)
            if smallest is None:
                raise
            chosen, line = smallest, f"{error}; using {smallest.preset!r}"
        console(stderr=True).print(line, style="dim", soft_wrap=True)
        return MiKVConfig.preset(chosen.preset)


def load_for_cli(name: str, *, quiet: bool = False, trust_remote_code: bool = False) -> LoadedModel:
    """`load_model`, with its steps behind a spinner if stderr is a terminal and `quiet` is False."""
    with spinner(quiet=quiet) as show:
        return load_model(name, on_progress=show, trust_remote_code=trust_remote_code)
