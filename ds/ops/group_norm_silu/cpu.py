"""The C++ kernels (csrc/cpu): float32 and bfloat16, contiguous and channels_last."""

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Kernel, Unsupported
from ds.ops.dispatch.transforms import like
from ds.ops.group_norm_silu.addends import Addends
from ds.ops.group_norm_silu.layout import affine_rows, sizes


def load_forward() -> Kernel:
    """Load the op's forward pass."""
    kernel = _native.cpu_library().ds_group_norm_silu

    def launch(x, weight, bias, groups, eps, silu, keep=False, *addends):
        is_bf16 = _is_bf16(x)
        x = Addends(*addends).merge(x)
        weight, bias, stride = affine_rows(weight.float(), bias.float())
        images, channels, pixels = sizes(x)
        y = torch.empty_like(x)
        mean = x.new_empty((images, groups), dtype=torch.float32)
        rstd = torch.empty_like(mean)
        pointers = map(Tensor.data_ptr, (x, weight, bias, y, mean, rstd))
        counts = images, channels, pixels, groups
        error = kernel(*pointers, *counts, eps, silu, not x.is_contiguous(), is_bf16, stride)
        _native.check("group_norm_silu", error)
        return y, mean, rstd, x if keep else x.new_empty(0)

    return launch


def load_backward() -> Kernel:
    """Load the op's backward pass."""
    kernel = _native.cpu_library().ds_group_norm_silu_backward

    def launch(grad, x, weight, bias, mean, rstd, groups, silu, split, grad_merged=None, *addends):
        is_bf16, addends = _is_bf16(x), Addends(*addends)
        x = addends.merged_before(x, grad_merged)
        grad = like(grad, x)
        images, channels, pixels = sizes(x)
        w, b, stride = affine_rows(weight.float(), bias.float())
        d_norm = torch.empty_like(x)
        by_image = weight.dim() == 2  # whose gradients are the rows
        d_weight, d_bias = (None if by_image else torch.empty_like(p) for p in (w, b))
        rows = x.new_empty((2, images, channels), dtype=torch.float64)
        statistics = mean.contiguous(), rstd.contiguous()
        tensors = (grad, x, w, b, *statistics, d_norm, d_weight, d_bias, rows)
        counts = images, channels, pixels, groups
        pointers = (None if t is None else t.data_ptr() for t in tensors)
        error = kernel(*pointers, *counts, silu, not x.is_contiguous(), is_bf16, stride)
        _native.check("group_norm_silu_backward", error)
        if by_image:
            d_bias, d_weight = (row.float() for row in rows)
        if grad_merged is not None and grad_merged.dtype == d_norm.dtype:
            d_norm, grad_merged = d_norm.add_(grad_merged), None  # saves fresh memory
        d_x, d_shift, d_skip = addends.split_gradient(d_norm, x, split, grad_merged)
        return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_shift, d_skip

    return launch


def _is_bf16(x: Tensor) -> bool:
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise Unsupported(f"it takes x in float32 or bfloat16, not {x.dtype}")
    return x.dtype == torch.bfloat16
