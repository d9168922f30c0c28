"""What a training makes of its device: the arithmetic of a row, and the device at its best."""

import copy
import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ds.methods import AbstractMethod, Progress
from ds.pairs.sources import Batch


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter, which sees through our ops or is told what they do.

    ds.ops.conv3x3 counts as the sum that it is, whatever it saves.
    """

    def forward(x, weight, *_, out_shape=None, **__) -> int:
        return conv_flop_count(x, weight, out_shape)

    def backward(dy, x, weight, wanted, *_, **__) -> int:
        return sum(wanted) * conv_flop_count(x, weight, dy)

    def attention(q, k, v, weight, *_, out_shape=None, **__) -> int:
        images, heads, tokens, width = q
        projection = 0 if weight is None else math.prod(weight)
        return 2 * images * tokens * (2 * tokens * heads * width + projection)

    known = {
        torch.ops.ds.conv3x3: forward,
        torch.ops.ds.conv3x3_backward: backward,
        torch.ops.ds.attention_residual_triton: attention,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def flops_per_row(
    method: AbstractMethod, modules: nn.ModuleDict, row: Batch, progress: Progress
) -> int:
    """Count the operations of a loss and its gradient, on a batch of one row.

    Multiplications and additions of convolutions, matrix products and attention are counted, each
    as one, and nothing else. The modules are left as they are.
    """
    device = row.noise.device
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with forked, flop_counter() as counter:
        method.loss(copy.deepcopy(modules), row, progress).backward()
    return counter.get_total_flops()


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Measure a GPU's matrix product in a tenth of a second; return its best TFLOP/s.

    In float32 this is float32, while cuDNN's convolutions may take TF32 and so be faster.
    """
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        best = max(best, 2e-9 * size**3 / begin.elapsed_time(end))
    return best
