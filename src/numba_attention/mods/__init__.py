"""Named mods for `score_mod` and `mask_mod`, as a user would write them."""

from .library import (
    alibi,
    causal,
    dilated_window,
    documents,
    neighborhood,
    prefix_lm,
    relative_positions,
    shifted_windows,
    sliding_window,
    softcap,
    t5_bias,
    t5_bias_causal,
    tree,
)

__all__ = [
    "alibi",
    "causal",
    "dilated_window",
    "documents",
    "neighborhood",
    "prefix_lm",
    "relative_positions",
    "shifted_windows",
    "sliding_window",
    "softcap",
    "t5_bias",
    "t5_bias_causal",
    "tree",
]
