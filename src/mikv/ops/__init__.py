"""The operations on packed tiers, one signature for every backend."""

from mikv.ops.fallback import AttentionOptions, Segment, attend, score_prompt, visible

__all__ = ["AttentionOptions", "Segment", "attend", "score_prompt", "visible"]
