"""Operations with several implementations: one public function each, backends chosen behind it."""

from ds.ops._native import build_info
from ds.ops.adam import adam_step
from ds.ops.attention import attention, attention_residual
from ds.ops.conv.conv3x3 import conv3x3
from ds.ops.conv.fused import conv, conv_group_norm_silu, phase_weight
from ds.ops.conv.winograd import winograd_conv, winograd_weight
from ds.ops.conv.winograd_int16 import winograd_int16_conv, winograd_int16_weight
from ds.ops.dispatch.op import Row, table, use_backend
from ds.ops.float8 import float8_weight, to_float8
from ds.ops.gather_rows import gather_rows
from ds.ops.group_norm_silu import (
    fused_add_group_norm_silu,
    group_norm,
    group_norm_silu,
    scale_shift,
)
from ds.ops.noise import noise
from ds.ops.prepare_batch import prepare_batch
from ds.ops.quantize import dequantize, quantize
from ds.ops.solver_update import solver_update

__all__ = [
    "Row",
    "adam_step",
    "attention",
    "attention_residual",
    "build_info",
    "conv",
    "conv3x3",
    "conv_group_norm_silu",
    "dequantize",
    "float8_weight",
    "fused_add_group_norm_silu",
    "gather_rows",
    "group_norm",
    "group_norm_silu",
    "noise",
    "phase_weight",
    "prepare_batch",
    "quantize",
    "scale_shift",
    "solver_update",
    "table",
    "to_float8",
    "use_backend",
    "winograd_conv",
    "winograd_int16_conv",
    "winograd_int16_weight",
    "winograd_weight",
]
