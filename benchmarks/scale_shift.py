"""A scale-shift norm with SiLU, forward and backward: ours, eager PyTorch, and torch.compile.

SiLU(norm(x) * (1 + scale) + shift) at the sizes of EDM's and ADM's networks, channels_last. Bytes:
x and y, or grad, x and dx, each once.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.group_norm_silu import DTYPES, GPU_ELEMENTS, both_directions, draw
from benchmarks.harness import Case, Size, batch
from ds import ops

GROUPS, EPS = 32, 1e-5
# Channels and pixels a side: ADM's network for ImageNet 64, and EDM's for CIFAR-10.
SHAPES = (192, 64), (384, 32), (256, 16), (576, 16), (768, 8)


def eager(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute it in three steps, as people write it."""
    scale, shift = scale[..., None, None], shift[..., None, None]
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS) * (1 + scale) + shift)


def ours(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute it in one."""
    return ops.group_norm_silu(x, *ops.scale_shift(weight, bias, scale, shift), GROUPS, EPS)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case for each shape, dtype and direction."""
    shapes = {"tiny": ((64, 4),), "quick": SHAPES[::2]}.get(size, SHAPES)
    for dtype, (channels, pixels) in itertools.product(DTYPES, shapes):
        many = max(16, GPU_ELEMENTS // (channels * pixels * pixels))
        images = batch(device, size, gpu=many, cpu=8 if pixels == 64 else 16)
        leaves, grad = draw(images, channels, pixels, dtype, device)
        generator = torch.Generator(device).manual_seed(1)
        told = torch.randn(images, 2 * channels, generator=generator, device=device) * 0.3
        scale, shift = told.to(dtype).chunk(2, 1)
        torch._dynamo.reset()  # one shape at a time, or it would compile for any shape
        functions = {"eager": eager, "inductor": torch.compile(eager, dynamic=False), "ours": ours}
        leaves = *leaves, scale.requires_grad_(), shift.requires_grad_()
        # Inductor's sums over pixels are off by up to ten times as much as eager PyTorch's.
        yield from both_directions(functions, leaves, grad, {}, factor=12.0)
