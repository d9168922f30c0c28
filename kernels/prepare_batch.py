"""A training batch: x0 = image / 127.5 - 1 and standard normal noise, both [N, H, W, C] in memory.

Traffic, in elements: an image is read once, as bytes, and x0 and noise are written once.

A program takes a tile of an image and of x0 in the order of memory, and a tile of the same size of
the noise in the order of the noise, one channel after the other (kernels/noise.py). It writes one
element in C; the caches gather those of the C programs that share a line. GPU figures: not measured
yet.

Contract: images are contiguous uint8 [N, H, W, C], indices contiguous int64, x0 and noise
channels_last, float32, float16 or bfloat16. x0 has the bits of PyTorch's division, and the noise
has those of kernels/noise.py.
"""

import triton
import triton.language as tl
from ds.ops.kernels.noise import halves, normals
from torch import Tensor

BLOCKS = 256  # of four elements, a program


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _prepare_batch_kernel(
    images_ptr,
    indices_ptr,
    x0_ptr,
    noise_ptr,
    size,
    pixels,
    tiles,
    seed_low,
    seed_high,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    offset = tile * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    inside = offset < size

    level = tl.load(images_ptr + row * size + offset, mask=inside, other=0).to(tl.float32)
    tl.store(x0_ptr + row * size + offset, tl.div_rn(level, 127.5) - 1.0, mask=inside)

    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    z = normals(block, tl.load(indices_ptr + row), seed_low, seed_high)
    place = offset % pixels * CHANNELS + offset // pixels
    tl.store(noise_ptr + row * size + place, z, mask=inside)


def prepare_batch(images: Tensor, indices: Tensor, seed: int, x0: Tensor, noise: Tensor) -> None:
    """Fill x0 and noise [N, C, H, W] from images [N, H, W, C] and their indices [N]."""
    rows, height, width, channels = images.shape
    size = height * width * channels
    tiles = triton.cdiv(size, 4 * BLOCKS)
    if images.numel():
        _prepare_batch_kernel[(rows * tiles,)](
            images_ptr=images,
            indices_ptr=indices,
            x0_ptr=x0,
            noise_ptr=noise,
            size=size,
            pixels=height * width,
            tiles=tiles,
            **halves(seed),
            CHANNELS=channels,
            BLOCKS=BLOCKS,
        )
