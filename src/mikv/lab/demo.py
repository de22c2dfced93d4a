"""The demo: a fact early in a long document, asked for through six caches; bytes, speed and fidelity are measured.

Every cache reads the prompt once. A copy of it answers the question; the cache itself goes on with the document's last
paragraph, token by token, which gives the speed and the distance to the full cache.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mikv.cache.accounting import cache_bytes
from mikv.cache.config import MiKVConfig
from mikv.cache.geometry import CacheGeometry
from mikv.integrations.transformers import LayerMemory, MemoryReport, MiKVCache
from mikv.integrations.transformers.versions import as_argument
from mikv.lab.baselines.h2o import h2o
from mikv.lab.baselines.uniform import uniform
from mikv.lab.fidelity import Reading, compare, prefill, read_on

PASS_KEY = "71432"
FACT = f"One thing more before the year begins: the pass key of the harbour safe is {PASS_KEY}. Remember it."
QUESTION = "What is the pass key of the harbour safe?"
FORCED_TOKENS = 64
ANSWER_TOKENS = 24
_FACT_AFTER = 3  # paragraphs, the title included


@dataclass(frozen=True)
class DemoRow:
    """What one cache did; `bytes` and `ratio` (to fp16) are what it took after the last token."""

    cache: str
    answer: str
    correct: bool
    bytes: int
    ratio: float
    decode_tokens_per_second: float
    kl_to_full: float
    top1_agreement: float


@dataclass(frozen=True)
class Demo:
    """All rows."""

    model: str
    prompt_tokens: int
    rows: tuple[DemoRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Reader:
    """A model with the demo's prompt (T,) and the tokens (N,) that it then reads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: Tensor
    forced: Tensor

    @classmethod
    def make(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Reader":
        """Tokenize the document."""
        text, last = document()
        messages = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids[0]
        forced = tokenizer(last, return_tensors="pt", add_special_tokens=False).input_ids[0, :FORCED_TOKENS]
        return cls(model, tokenizer, prompt, forced)

    def prefill(self, cache: Cache) -> None:
        """Read the prompt up to its last token, which is the first to be read through the cache."""
        prefill(self.model, cache, self.prompt[:-1])

    def answer(self, cache: Cache) -> str:
        """The model's answer to the question; `cache` has read the prompt."""
        generated = self.model.generate(
            self.prompt[None], **as_argument(cache), max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        return str(self.tokenizer.decode(generated[0, len(self.prompt) :], skip_special_tokens=True)).strip()

    def read_on(self, cache: Cache, on_token: Callable[[], None]) -> Reading:
        """The model's predictions along the last paragraph; `cache` has read the prompt."""
        read_on(self.model, cache, self.prompt[-1:])
        return read_on(self.model, cache, self.forced, on_step=on_token)


def document() -> tuple[str, str]:
    """The document with the fact in it, and its last paragraph, which is held back."""
    text = (files("mikv.lab") / "texts" / "harbour.txt").read_text(encoding="utf-8")
    *paragraphs, last = text.strip().split("\n\n")
    return "\n\n".join([*paragraphs[:_FACT_AFTER], FACT, *paragraphs[_FACT_AFTER:]]), last


def demo_configs(model_config: Any, num_tokens: int) -> dict[str, MiKVConfig]:
    """The compressed caches of the demo; eviction gets the bytes that `balanced` takes at `num_tokens`."""
    geometry = CacheGeometry.from_model_config(model_config)
    balanced = MiKVConfig.preset("balanced")
    return {
        "h2o": h2o(cache_bytes(balanced, geometry, num_tokens).ratio, geometry, num_tokens),
        "int4": uniform("int4"),
        "int2": uniform("int2"),
        "paper-int2": MiKVConfig.preset("paper-int2"),
        "balanced": balanced,
    }


def run_demo(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    on_row: Callable[[DemoRow], None] = lambda row: None,
    on_progress: Callable[[str, int], None] = lambda cache, tokens: None,
) -> Demo:
    """Measure every cache; `on_row` gets each row when it is done, `on_progress` (cache, tokens read on)."""
    reader = Reader.make(model, tokenizer)
    full: Reading | None = None
    rows = []
    for cache_name, make in _factories(model, len(reader.prompt)).items():
        on_progress(cache_name, 0)
        cache, tokens_read = make(), 0
        reader.prefill(cache)
        answer = reader.answer(copy.deepcopy(cache))

        def count(cache_name: str = cache_name) -> None:
            nonlocal tokens_read
            tokens_read += 1
            on_progress(cache_name, tokens_read)

        reading = reader.read_on(cache, count)
        full = full or reading
        rows.append(_row(cache_name, answer, cache, reading, full))
        on_row(rows[-1])
    return Demo(name, len(reader.prompt), tuple(rows))


def _factories(model: PreTrainedModel, num_tokens: int) -> dict[str, Callable[[], Cache]]:
    def packed(config: MiKVConfig) -> Callable[[], Cache]:
        return lambda: MiKVCache(model.config, config)

    compressed = demo_configs(model.config, num_tokens)
    return {"full": lambda: DynamicCache(config=model.config)} | {n: packed(c) for n, c in compressed.items()}


def _row(name: str, answer: str, cache: Cache, reading: Reading, full: Reading) -> DemoRow:
    memory = cache.memory() if isinstance(cache, MiKVCache) else _full_memory(cache)
    fidelity = compare(full, reading)
    return DemoRow(
        cache=name,
        answer=answer,
        correct=PASS_KEY in answer,
        bytes=memory.bytes,
        ratio=memory.ratio,
        decode_tokens_per_second=1 / reading.seconds_per_token,
        kl_to_full=fidelity.kl_mean,
        top1_agreement=fidelity.top1_agreement,
    )


def _full_memory(cache: Cache) -> MemoryReport:
    layers = (LayerMemory.of_other(i, "full cache", layer) for i, layer in enumerate(cache.layers))
    return MemoryReport(tuple(layers))
