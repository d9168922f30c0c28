"""GroupNorm, with SiLU or without."""

from ds.ops.group_norm_silu.op import (
    backward,
    forward,
    forward_float8,
    group_norm,
    group_norm_silu,
    merge,
    merge_group_norm_silu,
    reference,
)

__all__ = [
    "backward",
    "forward",
    "forward_float8",
    "group_norm",
    "group_norm_silu",
    "merge",
    "merge_group_norm_silu",
    "reference",
]
