"""All checks of what transformers does with a cache, for any cache: `CHECKS["beam_search"](Trial(model, subject))`.

A check raises if the cache fails it; the first line of its docstring is its name in docs/results/conformance.md.
"""

from collections.abc import Callable

from conformance import generation, operations
from conformance.trial import Trial

Check = Callable[[Trial], None]

CHECKS: dict[str, Check] = {
    function.__name__: function
    for function in (
        generation.greedy,
        generation.left_padding,
        generation.sampling,
        generation.several_sequences,
        generation.beam_search,
        generation.beam_sampling,
        generation.assisted_decoding,
        generation.speculative_sampling,
        generation.prompt_lookup,
        generation.early_exit,
        generation.chunked_prefill,
        generation.second_turn,
        generation.text_generation_pipeline,
        generation.bfloat16,
        generation.latent_attention,
        operations.close_to_full_cache,
        operations.reorder,
        operations.repeat_interleave,
        operations.select_indices,
        operations.crop,
        operations.crop_unprepared,
        operations.reset,
        operations.offload,
        operations.save_and_load,
        operations.interrupted_step,
        operations.unchanged_model,
        operations.freed,
        operations.hiding_mask,
        operations.hidden_endings,
        operations.compiled_decoding,
    )
}
