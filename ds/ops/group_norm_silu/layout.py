"""Dtypes and memory formats of what the backends take and return."""

import math

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Unsupported, same_order
from ds.ops.dispatch.takes import wide
from ds.ops.dispatch.transforms import channels_last


def dense(x: Tensor) -> Tensor:
    """Return x, or a dense copy: channels_last if the channels of a pixel are neighbors."""
    if x.is_contiguous():
        return x
    return channels_last(x) if x.dim() == 4 and x.stride(1) == 1 else x.contiguous()


def resized(x: Tensor, channels: int) -> Tensor:
    """Return an empty tensor like a dense x, but with this number of channels."""
    if channels == x.shape[1]:
        return torch.empty_like(x)
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format_of(x))


def format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of a dense tensor."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """Return y in the memory format of a dense x."""
    return y.contiguous() if x.is_contiguous() else channels_last(y)


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Return the numbers of images, channels and pixels."""
    images, channels, *pixels = x.shape
    return images, channels, math.prod(pixels)


def columns(values: Tensor, x: Tensor) -> Tensor:
    """View [C] or [N, C] in the dtype of computation so that it broadcasts against x."""
    return values.to(wide(x.dtype)).view(*values.shape, *[1] * (x.dim() - 2))


def sums(values: Tensor, parameter: Tensor) -> Tensor:
    """Sum [N, C, ...] to the shape of a parameter, [C] or [N, C]."""
    if parameter.dim() == 1:
        return values.sum((0, *range(2, values.dim())))
    return values[..., None].sum((*range(2, values.dim() + 1),))


def affine_rows(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return weight and bias with dense rows, and the stride from an image's row to the next.

    That is 0 for parameters [C]. Columns of a wider table are not copied.
    """
    if weight.dim() == 1:
        return weight.contiguous(), bias.contiguous(), 0
    if weight.stride(1) != 1 or weight.stride() != bias.stride():
        weight, bias = weight.contiguous(), bias.contiguous()
    return weight, bias, weight.stride(0)


def to_rows(x: Tensor) -> Tensor:
    """Return x [N, C, ...] as [N, pixels, C]; a channels_last x is not copied."""
    return x.reshape(sizes(x)).transpose(1, 2).contiguous()


def from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """Return [N, pixels, C] in the shape and strides of x; not copied if x is channels_last."""
    y = rows.transpose(1, 2).reshape(x.shape)
    if same_order(y, x):
        return y.as_strided(x.shape, x.stride())
    return torch.empty_like(x, dtype=y.dtype).copy_(y)


def check_gpu_kernels_take(x: Tensor) -> None:
    """Raise Unsupported for an x that neither Triton's nor the CUDA kernels take."""
    if x.dtype not in _native.TYPES:
        raise Unsupported(f"it takes x in float32, float16 or bfloat16, not {x.dtype}")
    if 0 in x.shape[2:]:
        raise Unsupported("it takes no images without pixels")
