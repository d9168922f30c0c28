"""Floats to 8-bit levels: round or floor of clip(x, -1, 1) * 127.5 + 127.5, NaN to 0.

[N, C, ...] becomes [N, ..., C]. A program takes a tile of the output, in its order. If x consists
of planes, the program reads a run of each of the C planes.

Traffic: x is read once and its levels are written once. GPU figures: not measured yet.

Contract: x is contiguous or channels_last, float32, float16 or bfloat16. Product and sum are
rounded one by one, without fusion, so that the levels are those of PyTorch to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements a program


@triton.jit
def _quantize_kernel(
    x_ptr,
    levels_ptr,
    size,
    pixels,
    tiles,
    PLANES: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize a tile of an image that has PLANES planes, 1 if x has the order of the levels."""
    image = (tl.program_id(0) // tiles).to(tl.int64) * size
    offset = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    place = offset // PLANES + offset % PLANES * pixels
    x = tl.load(x_ptr + image + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.minimum(tl.maximum(x, -1.0), 1.0) * 127.5 + 127.5
    nearest = (value + 8388608.0) - 8388608.0  # 2**23: the sum has no room for a fraction
    value = tl.where(x == x, tl.floor(value) if FLOOR else nearest, 0.0)
    tl.store(levels_ptr + image + offset, value.to(tl.uint8), mask=inside)


def quantize(x: Tensor, floor: bool) -> Tensor:
    """Return uint8 [N, ..., C] of x [N, C, ...]."""
    images, channels, *spatial = x.shape
    levels = torch.empty((images, *spatial, channels), dtype=torch.uint8, device=x.device)
    if levels.numel():
        size, pixels = x[0].numel(), x[0, 0].numel()
        tiles = triton.cdiv(size, BLOCK)
        _quantize_kernel[(images * tiles,)](
            x_ptr=x,
            levels_ptr=levels,
            size=size,
            pixels=pixels,
            tiles=tiles,
            PLANES=channels if x.is_contiguous() else 1,
            FLOOR=floor,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return levels
