"""`mikv generate`: one prompt, one answer, and what its cache took."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikv.cli.options import (
    BudgetOption,
    CacheChoice,
    ConfigOption,
    MaxNewTokensOption,
    ModelOption,
    PresetOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TrustOption,
    load_for_cli,
)
from mikv.cli.terminal import console, writer
from mikv.errors import ConfigError
from mikv.models import BUNDLED_MODEL, find_model

if TYPE_CHECKING:
    from mikv.cli.answer import Answer
    from mikv.integrations.transformers import MiKVCache
    from mikv.models import LoadedModel

_MOST_BYTES = 64 << 20  # of a prompt; a device such as /dev/zero has no end


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt, or - to read it from stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    model: ModelOption = BUNDLED_MODEL,
    trust_remote_code: TrustOption = False,
    preset: PresetOption = None,
    budget: BudgetOption = None,
    config: ConfigOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    system: SystemOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="With --json: the memory of every layer, too.")] = False,
) -> None:
    """Answer one prompt with a compressed KV cache."""
    text = _read_prompt(prompt, prompt_file)
    if raw and system is not None:
        raise ConfigError("--raw and --system exclude each other: a system message needs the chat template")
    if layers and not as_json:
        raise ConfigError("--layers needs --json")
    choice = CacheChoice.of_options(preset, budget, config)
    find_model(model)

    import torch

    from mikv.cache.geometry import context_length
    from mikv.cli.answer import AnswerOptions, answer, summary
    from mikv.cli.progress import prefill_bar
    from mikv.integrations.transformers import MiKVCache

    loaded = load_for_cli(model, quiet=as_json, trust_remote_code=trust_remote_code)
    token_ids = _prompt_ids(loaded, text, system, raw)
    longest = context_length(loaded.model.config)
    if longest is not None and len(token_ids) + max_new_tokens > longest:
        raise ConfigError(
            f"a prompt of {len(token_ids):,} tokens and {max_new_tokens:,} new ones are more than the {longest:,} that "
            f"{model} was trained for; shorten the prompt or lower --max-new-tokens"
        )
    cache = MiKVCache(loaded.model.config, choice.for_model(loaded.model.config, len(token_ids) + max_new_tokens))
    if seed is not None:
        torch.manual_seed(seed)
    options = AnswerOptions(max_new_tokens, temperature, on_text=_ignore if as_json else writer())
    with prefill_bar(loaded.model, len(token_ids), quiet=as_json):
        result = answer(loaded, token_ids, cache, options)
    if as_json:
        typer.echo(json.dumps(_record(model, result, cache, layers)))
    else:
        typer.echo()
        console(stderr=True).print(summary(result, cache), style="dim", soft_wrap=True)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ConfigError("PROMPT and --prompt-file exclude each other; give one of them")
    source = prompt_file or "on stdin"
    try:
        if prompt_file is not None:
            with prompt_file.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        else:
            data = sys.stdin.buffer.read(_MOST_BYTES + 1) if prompt == "-" else os.fsencode(prompt or "")
        text = data.decode("utf-8")
    except UnicodeError as error:
        raise ConfigError(f"the prompt {source} is not UTF-8 text: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the prompt {source}: {reason}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"the prompt {source} is longer than {_MOST_BYTES >> 20} MiB, which no model reads at once")
    if not text.strip():
        raise ConfigError("there is no prompt; give PROMPT, --prompt-file FILE, or - and the text on stdin")
    return text


def _prompt_ids(loaded: "LoadedModel", text: str, system: str | None, raw: bool) -> list[int]:
    from mikv.chat_template import chat_ids, require_chat_template

    if raw:
        return loaded.tokenizer.encode(text)
    require_chat_template(loaded.tokenizer, loaded.name)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return chat_ids(loaded.tokenizer, [*messages, {"role": "user", "content": text}])


def _record(model: str, answer: "Answer", cache: "MiKVCache", layers: bool) -> dict[str, Any]:
    memory = cache.memory().to_dict()
    if not layers:
        del memory["layers"]
    return {
        "model": model,
        "prompt_tokens": answer.num_prompt_tokens,
        "new_tokens": answer.num_new_tokens,
        "text": answer.text,
        "prefill_seconds": answer.prefill_seconds,
        "decode_tokens_per_second": answer.decode_tokens_per_second,
        "config": cache.config.to_dict(),
        "memory": memory,
    }


def _ignore(_: str) -> None:
    """JSON is printed at the end."""
