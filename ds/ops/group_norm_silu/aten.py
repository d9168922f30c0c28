"""PyTorch's own kernels, on float32 copies of narrower types so that statistics stay wide."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds.ops.dispatch.takes import wide
from ds.ops.dispatch.transforms import like
from ds.ops.group_norm_silu.addends import Addends
from ds.ops.group_norm_silu.layout import columns, sizes, sums


def forward(x, weight, bias, groups, eps, silu, keep=False, *addends):
    """Compute the op's forward pass."""
    x = Addends(*addends).merge(x)
    by_image = weight.dim() == 2
    parameters = (None, None) if by_image else _contiguous(x, weight, bias)
    y, mean, rstd = torch.ops.aten.native_group_norm(
        _pixels(x), *parameters, *sizes(x), groups, eps
    )
    if by_image:
        y = torch.addcmul(columns(bias, x), y, columns(weight, x))
    return like(F.silu(y) if silu else y, x), mean, rstd, x if keep else x.new_empty(0)


def backward(grad, x, weight, bias, mean, rstd, groups, silu, split, grad_merged=None, *addends):
    """Compute the op's backward pass."""
    addends = Addends(*addends)
    merged = addends.merged_before(x, grad_merged)
    x, grad = _pixels(merged), _pixels(like(grad, merged))
    w, b, mean, rstd = _contiguous(merged, weight, bias, mean, rstd)
    by_image = weight.dim() == 2
    if silu or by_image:
        spread = w.shape[-1] // groups  # the mean goes first: a sum of large terms would round more
        means, rstds = (columns(s.repeat_interleave(spread, 1), x) for s in (mean, rstd))
        normal = (x - means) * rstds
    if silu:
        y = torch.addcmul(columns(b, x), normal, columns(w, x))
        grad = torch.ops.aten.silu_backward(grad, y)
    d_norm, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
        grad * columns(w, x) if by_image else grad,
        *(x, mean, rstd, None if by_image else w),
        *(*sizes(x), groups, [True, not by_image, not by_image]),
    )
    if by_image:
        d_weight, d_bias = sums(grad * normal, w), sums(grad, b)
    d_x, d_shift, d_skip = addends.split_gradient(d_norm, merged, split, grad_merged)
    return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_shift, d_skip


def _pixels(x: Tensor) -> Tensor:
    """Return a dense x as these kernels take it: wide, and with the strides of NCHW.

    The kernels ignore strides. Those of a channels_last x are made to look like its memory.
    """
    x = x.to(wide(x.dtype))
    if x.is_contiguous():
        return x
    _, channels, height, width = x.shape
    return x.as_strided(x.shape, (channels * height * width, 1, width * channels, channels))


def _contiguous(x: Tensor, *values: Tensor) -> list[Tensor]:
    """Return parameters and statistics as these kernels take them, which ignore strides."""
    return [value.to(wide(x.dtype)).contiguous() for value in values]
