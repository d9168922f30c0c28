"""The Triton kernels (kernels/group_norm_silu*.py), which read the addends themselves."""

import functools

import torch
from torch import Tensor

from ds.ops.dispatch.op import Kernel, triton_kernels
from ds.ops.float8 import FLOAT8, check_converts
from ds.ops.group_norm_silu.addends import Addends
from ds.ops.group_norm_silu.layout import (
    check_gpu_kernels_take,
    dense,
    from_rows,
    resized,
    to_rows,
)


def load_forward() -> Kernel:
    """Load the op's forward pass."""
    return functools.partial(_forward, triton_kernels("group_norm_silu"))


def load_forward_float8() -> Kernel:
    """Load the forward pass of the op whose result is float8."""
    kernels = triton_kernels("group_norm_silu")

    def launch(x, weight, bias, groups, eps, keep, *addends):
        check_converts(x.device)
        norm = weight, bias, groups, eps, True
        y, _, _, kept = _forward(kernels, x, *norm, keep, *addends, dtype=FLOAT8)
        return y, kept

    return launch


def load_backward() -> Kernel:
    """Load the op's backward pass."""
    kernel = triton_kernels("group_norm_silu_backward").group_norm_silu_backward

    def launch(grad, x, weight, bias, mean, rstd, groups, silu, split, grad_merged=None, *addends):
        x = dense(x)
        check_gpu_kernels_take(x)
        grad = to_rows(grad.to(x.dtype))
        if grad_merged is not None:
            grad_merged = to_rows(grad_merged.to(x.dtype))
        statistics = mean.contiguous(), rstd.contiguous()
        settings = groups, silu, split, grad_merged
        addends = _addends_as_rows(*addends)
        with torch.cuda.device_of(x):
            d_x, d_weight, d_bias, d_shift, d_skip = kernel(
                grad, to_rows(x), weight, bias, *statistics, *settings, *addends
            )
        d_x = from_rows(d_x, resized(x, split))
        d_shift = x.new_empty(0) if d_shift is None else d_shift
        if d_skip is None:
            return d_x, d_weight, d_bias, d_shift, x.new_empty(0)
        return d_x, d_weight, d_bias, d_shift, from_rows(d_skip, resized(x, d_skip.shape[2]))

    return launch


def _forward(kernels, x, weight, bias, groups, eps, silu, keep=False, *addends, dtype=None):
    x = dense(x)
    check_gpu_kernels_take(x)
    norm, addends = kernels.Norm(weight, bias, groups, eps, silu), _addends_as_rows(*addends)
    with torch.cuda.device_of(x):
        y, mean, rstd, merged = kernels.group_norm_silu(
            to_rows(x), norm, keep, *addends, dtype=dtype
        )
    whole = x if addends.skip is None else resized(x, weight.shape[-1])
    merged = from_rows(merged, whole) if keep else x.new_empty(0)
    return from_rows(y, whole), mean, rstd, merged


def _addends_as_rows(
    shift: Tensor | None = None, residual: Tensor | None = None, skip: Tensor | None = None
) -> Addends:
    """Return addends as the kernels take them; the rows of shift may all be one."""
    if shift is not None and shift.stride(1) != 1:
        shift = shift.contiguous()
    residual, skip = (None if part is None else to_rows(part) for part in (residual, skip))
    return Addends(shift, residual, skip)
