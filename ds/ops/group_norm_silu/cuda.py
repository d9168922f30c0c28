"""The CUDA kernels (csrc/cuda), forward only."""

import functools

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Kernel, Unsupported
from ds.ops.group_norm_silu.addends import Addends
from ds.ops.group_norm_silu.layout import (
    affine_rows,
    check_gpu_kernels_take,
    from_rows,
    sizes,
    to_rows,
)


def load_cluster() -> Kernel:
    """Load the kernel that reads x once, for images too large for one Triton program."""
    lib = _native.cuda_kernels(capability=90, shared=227 * 1024)
    return functools.partial(_launch, lib, True)


def load_two_passes() -> Kernel:
    """Load the kernels that read x twice, for GPUs from sm_80 on."""
    return functools.partial(_launch, _native.cuda_kernels(capability=80), False)


def _launch(lib, cluster, x, weight, bias, groups, eps, silu, keep=False, *addends):
    check_gpu_kernels_take(x)
    x = Addends(*addends).merge(x)
    images, channels, pixels = sizes(x)
    tiles = lib.ds_cuda_group_norm_silu_tiles(pixels, channels, groups, x.itemsize, cluster, None)
    if not tiles:
        raise Unsupported(f"it cannot cut {pixels} pixels of {channels} channels, {groups} groups")
    rows = to_rows(x)
    if rows.data_ptr() % 16:
        raise Unsupported("it takes x that starts on a multiple of 16 bytes")
    weight, bias, stride = affine_rows(_parameter(weight), _parameter(bias))
    y = torch.empty_like(rows)
    mean = torch.empty((images, groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    table = mean.new_empty((0,) if cluster else (images, tiles, 2, channels))
    tensors = rows, weight, bias, y, mean, rstd, table
    pointers = [tensor.data_ptr() or None for tensor in tensors]  # none for an empty table
    counts = images, pixels, channels, groups, stride
    types = [_native.TYPES[t.dtype] for t in tensors[:3]]
    _native.cuda_launch(lib.ds_cuda_group_norm_silu, x, *pointers, *counts, eps, silu, *types)
    return from_rows(y, x), mean, rstd, x if keep else x.new_empty(0)


def _parameter(values: Tensor) -> Tensor:
    return values if values.dtype in _native.TYPES else values.float()
