"""Sharing work among the processes that torchrun starts; alone, everything here is a no-op."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes if torchrun started any, and leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Say whether this is the process that writes and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(n: int) -> range:
    """Return this process's part of range(n); the parts in order of rank make the whole."""
    if not dist.is_initialized():
        return range(n)
    rank, world = dist.get_rank(), dist.get_world_size()
    return range(n * rank // world, n * (rank + 1) // world)


def gather(rows: Tensor) -> Tensor:
    """Return the rows [N_r, ...] of all processes in order of rank, on the CPU, everywhere."""
    if not dist.is_initialized():
        return rows.cpu()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    most = max(int(c) for c in counts)
    padded = rows.new_zeros((most, *rows.shape[1:]), device="cpu")
    padded[: len(rows)] = rows.cpu()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)])


def from_first(compute: Callable[[], T]) -> T:
    """Return what the first process computes, everywhere."""
    if not dist.is_initialized():
        return compute()
    box = [compute() if is_first() else None]
    dist.broadcast_object_list(box)
    return box[0]
