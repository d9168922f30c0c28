"""Throughput: FLOPs per row, the peak of the device, and what a run reaches of it."""

import copy
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ds.methods import AbstractMethod, Progress
from ds.models.teacher import Teacher
from ds.pairs.sources import AbstractSource, Batch
from ds.system import cost, distributed
from ds.training.config import TrainConfig


class Throughput:
    """Rows per second since `start`, their arithmetic, the wait for data, and memory.

    `flops` are those of a row. `dtype` is that of matrix products: on a GPU its peak is measured.
    """

    def __init__(self, device: torch.device, flops: float, dtype: torch.dtype):
        self.device, self.flops = device, flops
        self.peak = matmul_tflops(device, dtype) if device.type == "cuda" else 0.0
        self.start(0)

    def start(self, rows: int) -> None:
        """Measure from here on, after so many rows: work between steps does not count."""
        self.since, self.first, self.waited = time.perf_counter(), rows, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a wait for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def figures(self, rows: int) -> dict[str, float]:
        """Return what was measured since `start`, now after so many rows of all processes."""
        seconds = time.perf_counter() - self.since
        each = (rows - self.first) / seconds
        tflops = each * self.flops / distributed.world_size() / 1e12
        return {
            "images_per_second": round(each, 1),
            "tflops": float(f"{tflops:.4g}"),
            **({"peak_share": round(tflops / self.peak, 4)} if self.peak else {}),
            "loader_wait": round(self.waited / seconds, 4),
            "memory_gb": round(self._memory(), 3),
        }

    def _memory(self) -> float:
        """Return the most memory that was used so far, in GB: of the GPU, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used * (1 if sys.platform == "darwin" else 1024) / 1e9


def price_of_rows(
    method: AbstractMethod,
    start: Teacher,
    rows: AbstractSource,
    config: TrainConfig,
    device: torch.device,
) -> tuple[float, int]:
    """Return the seconds that a row takes, and the bytes of the weights of the network that learns.

    The seconds are measured: forward and backward of all turns, no optimiser.
    """
    method, config = method.on(start), config.of(method).on(device)
    modules = method.init(start).to(device)
    most = max(1, config.batch_size // distributed.world_size())
    whole = rows.batch([i % len(rows) for i in range(most)], device=device)

    def work(n: int) -> None:
        x0, z, index, draws, cond = whole
        told = {name: value[:n] for name, value in cond.items()}
        batch = Batch(x0[:n], z[:n], index[:n], draws._replace(index=draws.index[:n]), told)
        for turn in method.turns:
            with config.autocast(device):
                loss = method.loss(modules, batch, Progress(0, 1, turn))
            loss.backward()
            loss.item()  # waits for the device

    weights = sum(w.nbytes for w in modules["student"].parameters())
    with distributed.alone():  # the first process measures while the others wait
        return cost.seconds_each(work, most), weights


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter with the formulas of our ops.

    ds.ops.conv3x3 counts as a plain convolution, although its algorithm multiplies less.
    """

    def forward(x, weight, *_, out_shape: Any = None, **__) -> int:
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

    Only convolutions, matrix products and attention count. A multiplication is one operation, and
    so is an addition. The modules are left as they are.
    """
    device = row.noise.device
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with forked, flop_counter() as counter:
        method.loss(copy.deepcopy(modules), row, progress).backward()
    return counter.get_total_flops()


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Measure a GPU's matrix product in a tenth of a second; return its best TFLOP/s.

    float32 products do not use TF32. cuDNN's convolutions may, and then exceed this figure.
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
