"""A training batch from stored images: their floats, and the noise of their indices."""

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Op, Unsupported, triton_kernels
from ds.ops.dispatch.transforms import like
from ds.ops.noise import signed
from ds.ops.quantize import dequantize


def prepare_batch(
    images: Tensor, indices: Tensor, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return x0 and noise, both [N, C, H, W] of `dtype` in channels_last memory.

    images are uint8 [N, H, W, C]: x0 = images / 127.5 - 1. noise is that of ds.ops.noise(seed,
    indices, (C, H, W)), to the bit on one backend. indices [N] are int64.

    Raises:
        ValueError: a shape or dtype does not fit, or the seed is out of range.
    """
    bits = signed("prepare_batch", "seed", seed)
    return _op(images, indices, bits, dtype)


def reference(
    images: Tensor, indices: Tensor, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Convert the images and draw the noise, one after the other."""
    x0, noise = fake(images, indices, seed, dtype)
    drawn = torch.ops.ds.noise(indices, seed, x0.shape[1:].numel(), dtype)
    return like(dequantize(images), x0), like(drawn.view(x0.shape), noise)


def fake(images, indices, seed, dtype):
    rows, height, width, channels = images.shape
    shape = rows, channels, height, width
    return tuple(
        torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
        for _ in range(2)
    )


_op = Op(
    "prepare_batch(Tensor images, Tensor indices, int seed, ScalarType dtype) -> (Tensor, Tensor)",
    """
    images [N, H, W, C] uint8
    indices [N] int64
    dtype.is_floating_point : dtype must be floating point, not {dtype}
    """,
    reference,
    fake,
)


@_op.backend("cpu", "cpu")
def _():
    kernel = _native.cpu_library().ds_prepare_batch

    def launch(images, indices, seed, dtype):
        if dtype not in (torch.float32, torch.bfloat16):
            raise Unsupported(f"it makes float32 or bfloat16, not {dtype}")
        images, indices = images.contiguous(), indices.contiguous()
        x0, noise = fake(images, indices, seed, dtype)
        rows, height, width, channels = images.shape
        error = kernel(
            images.data_ptr(), indices.data_ptr(), x0.data_ptr(), noise.data_ptr(),
            seed, rows, channels, height * width, dtype == torch.bfloat16,
        )  # fmt: skip
        _native.check("prepare_batch", error)
        return x0, noise

    return launch


@_op.backend("triton", "cuda")
def _():
    kernels = triton_kernels("prepare_batch")

    def launch(images, indices, seed, dtype):
        if dtype not in _native.TYPES:
            raise Unsupported(f"it makes float32, float16 or bfloat16, not {dtype}")
        x0, noise = fake(images, indices, seed, dtype)
        with torch.cuda.device_of(images):
            kernels.prepare_batch(images.contiguous(), indices.contiguous(), seed, x0, noise)
        return x0, noise

    return launch


@_op.backend("cuda", "cuda")
def _():
    lib = _native.cuda_kernels(capability=80)

    def launch(images, indices, seed, dtype):
        if dtype not in _native.TYPES:
            raise Unsupported(f"it makes float32, float16 or bfloat16, not {dtype}")
        rows, height, width, channels = images.shape
        if channels > 4096:
            raise Unsupported(f"it takes images of at most 4096 channels, not {channels}")
        images, indices = images.contiguous(), indices.contiguous()
        x0, noise = fake(images, indices, seed, dtype)
        _native.cuda_launch(
            lib.ds_cuda_prepare_batch, images,
            images.data_ptr(), indices.data_ptr(), x0.data_ptr(), noise.data_ptr(),
            seed, rows, channels, height * width, _native.TYPES[dtype],
        )  # fmt: skip
        return x0, noise

    return launch
