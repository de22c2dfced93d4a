"""Checks of `generate`: every decoding strategy that transformers 5 ships, padded batches, chats, pipelines.

Contrastive search, DoLa, group and constrained beam search are not among them: transformers 5 moved them to
`custom_generate` repositories on the hub. What results are compared with is described in trial.py.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, pipeline

from conformance.trial import (
    NEW_TOKENS,
    TOLERANCES,
    Generated,
    Prompt,
    Trial,
    require_same_tokens,
    typical_error,
)
from mikv.integrations.transformers.versions import as_argument
from tiny import LATENT, model_of, tiny_tokenizer

ONE_ROW = (75,)
RAGGED = (90, 71, 44)
CHUNK = 16


def greedy(trial: Trial) -> None:
    """greedy decoding"""
    _require_generation(trial, Prompt.random(*ONE_ROW))


def left_padding(trial: Trial) -> None:
    """left-padded batch, each row as if alone"""
    _require_generation(trial, Prompt.random(*RAGGED))


def sampling(trial: Trial) -> None:
    """sampling with a seed"""
    _require_generation(trial, Prompt.random(*RAGGED), do_sample=True)


def several_sequences(trial: Trial) -> None:
    """several sequences per prompt"""
    _require_generation(trial, Prompt.random(*RAGGED[:2]), do_sample=True, num_return_sequences=3)


def chunked_prefill(trial: Trial) -> None:
    """chunked prefill"""
    _require_generation(
        trial, Prompt.random(*ONE_ROW), pieces=lambda row: row.split(CHUNK, 1), prefill_chunk_size=CHUNK
    )


def bfloat16(trial: Trial) -> None:
    """model in bfloat16"""
    narrow, prompt = Trial(copy.deepcopy(trial.model).to(torch.bfloat16), trial.subject), Prompt.random(*RAGGED)
    produced = narrow.generate(narrow.cache(), prompt)
    forced = Prompt(produced.tokens, torch.ones_like(produced.tokens))
    with narrow.full_cache() as cache:
        logits = narrow.feed(cache, prompt.then(forced).ids, prompt.then(forced).mask)
    error = typical_error(produced.logits, logits[:, -NEW_TOKENS - 1 : -1])
    allowed = TOLERANCES["bfloat16"] + (0 if trial.subject.exact else trial.subject.rounding)
    assert error <= allowed, f"logits are {error:.2g} (rms) from those of DynamicCache, {allowed:.2g} allowed"


def beam_search(trial: Trial) -> None:
    """beam search"""
    _require_beams(trial, do_sample=False)


def beam_sampling(trial: Trial) -> None:
    """beam sampling"""
    _require_beams(trial, do_sample=True)


def assisted_decoding(trial: Trial) -> None:
    """assisted decoding with a draft model"""
    _require_speculation(trial, lambda: {"assistant_model": _draft_model(trial.model)})


def speculative_sampling(trial: Trial) -> None:
    """speculative sampling with a draft model"""
    _require_speculation(trial, lambda: {"assistant_model": _draft_model(trial.model), "do_sample": True})


def prompt_lookup(trial: Trial) -> None:
    """prompt-lookup decoding"""
    _require_speculation(trial, lambda: {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1})


def early_exit(trial: Trial) -> None:
    """self-speculation by early exit"""
    _require_speculation(trial, lambda: {"assistant_early_exit": 1})


def second_turn(trial: Trial) -> None:
    """second turn of a chat on the same cache, padding in the middle"""
    # transformers' sliding windows count columns, so padding in the middle would shorten them for any cache
    lengths = (20, 20, 20) if any(trial.cache().is_sliding) else (20, 33, 9)
    first, more = Prompt.random(*RAGGED), Prompt.random(*lengths, seed=1)
    one, two = _two_turns(trial, trial.cache(), first, more)
    with trial.same_tokens_cache() as cache:
        for turn, expected in zip((one, two), _two_turns(trial, cache, first, more), strict=True):
            require_same_tokens(turn.tokens, expected.tokens, type(cache).__name__)
    if trial.subject.exact:
        return
    replayed = []
    for row in range(first.num_rows):
        read, last = one.tokens[row, None].split((NEW_TOKENS - 1, 1), 1)
        pieces = [first.row(row), *read.split(1, 1), torch.cat((last, more.row(row)), 1)]
        replayed.append(trial.replay(*pieces, one_by_one=two.tokens[row, None, :-1]))
    trial.require_same_rows(two.logits, torch.cat(replayed), "the row alone")


def text_generation_pipeline(trial: Trial) -> None:
    """text-generation pipeline, batched"""
    tokenizer, prompt = tiny_tokenizer(), Prompt.random(*RAGGED)
    texts = [tokenizer.decode(prompt.row(row)[0]) for row in range(prompt.num_rows)]
    generator = pipeline("text-generation", model=trial.model, tokenizer=tokenizer)
    outputs = generator(
        texts,
        batch_size=len(texts),
        **as_argument(trial.cache()),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_full_text=False,
    )
    direct = trial.generate(trial.cache(), prompt)
    assert [output[0]["generated_text"].strip() for output in outputs] == tokenizer.batch_decode(
        direct.tokens, skip_special_tokens=True
    ), "the pipeline's text is not what generate gives"


def latent_attention(trial: Trial) -> None:
    """multi-head latent attention (DeepSeek)"""
    greedy(Trial(model_of(LATENT.configuration()), trial.subject))


def _generated(trial: Trial, prompt: Prompt, options: Callable[[], dict[str, Any]] = dict) -> Generated:
    """What `generate` gives, which must be what it gives with DynamicCache, or when it is run again."""
    produced = trial.generate(trial.cache(), prompt, **options())
    with trial.same_tokens_cache() as cache:
        expected = trial.generate(cache, prompt, **options())
    require_same_tokens(produced.tokens, expected.tokens, type(cache).__name__)
    return produced


def _require_generation(
    trial: Trial, prompt: Prompt, pieces: Callable[[Tensor], tuple[Tensor, ...]] | None = None, **options: Any
) -> None:
    """A cache that rounds gives for each row what it gives for the row alone, its prompt fed in `pieces`."""
    produced = _generated(trial, prompt, lambda: options)
    if trial.subject.exact:
        return
    copies, replayed = produced.tokens.shape[0] // prompt.num_rows, []
    for row, tokens in enumerate(produced.tokens):
        alone = prompt.row(row // copies)
        replayed.append(trial.replay(*(pieces(alone) if pieces else (alone,)), one_by_one=tokens[None, :-1]))
    trial.require_same_rows(produced.logits, torch.cat(replayed), "the row alone")


def _require_beams(trial: Trial, do_sample: bool) -> None:
    """The beams of a cache that rounds score what their tokens score when each is fed alone."""
    prompt = Prompt.random(*RAGGED[:2])
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "do_sample": do_sample}
    produced = _generated(trial, prompt, lambda: options)
    if trial.subject.exact:
        return
    assert produced.scores is not None
    for row, tokens in enumerate(produced.tokens):
        replayed = trial.replay(prompt.row(row // 2), one_by_one=tokens[None, :-1])
        score = replayed[0].float().log_softmax(-1).gather(1, tokens[:, None]).mean().item()
        error = abs(produced.scores[row].item() / len(tokens) - score)
        assert error <= trial.on_the_edge, (
            f"beam {row} scores {error:.2g} per token off its tokens alone, {trial.on_the_edge:.2g} allowed"
        )


def _require_speculation(trial: Trial, options: Callable[[], dict[str, Any]]) -> None:
    """The logits of a cache that rounds are near those without drafts."""
    prompt = Prompt.random(*ONE_ROW)
    produced = _generated(trial, prompt, options)
    if not trial.subject.exact:
        replayed = trial.replay(prompt.row(0), one_by_one=produced.tokens[:, :-1])
        trial.require_near(produced.logits, replayed, "decoding without drafts")


def _draft_model(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that is wrong often enough for some of its drafts to be rejected."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    for parameter in draft.parameters():
        parameter *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
    return draft


def _two_turns(trial: Trial, cache: Cache, first: Prompt, more: Prompt) -> tuple[Generated, Generated]:
    """Two calls of `generate` with one cache."""
    one = trial.generate(cache, first)
    answer = Prompt(one.tokens, torch.ones_like(one.tokens))
    return one, trial.generate(cache, first.then(answer).then(more))
