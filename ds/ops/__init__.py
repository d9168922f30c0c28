"""Operations with several implementations: one public function each, backends chosen behind it."""

from ds.ops._native import build_info
from ds.ops._op import Row, table, use_backend
from ds.ops.attention import attention
from ds.ops.group_norm_silu import group_norm, group_norm_silu

__all__ = [
    "Row",
    "attention",
    "build_info",
    "group_norm",
    "group_norm_silu",
    "table",
    "use_backend",
]
