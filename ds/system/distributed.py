"""Share work among the processes of torchrun. In a single process, everything is a no-op."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_alone = False


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes of torchrun, if any, and leave them at the end.

    Nested in another `joined` it does nothing.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Let this process count as the only one for a while: it waits for no other."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def is_first() -> bool:
    """Return whether this process is the one that writes files and messages."""
    return rank() == 0


def rank() -> int:
    """Return the number of this process, 0 of 1 where it is alone."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size() -> int:
    """Return how many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def share(n: int) -> range:
    """Return this process's part of range(n); the parts in order of rank make the whole."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def gather(rows: Tensor) -> Tensor:
    """Return the rows [N_r, ...] of all processes in order of rank, on the CPU, everywhere."""
    if not dist.is_initialized():
        return rows.cpu()
    mine = torch.tensor([len(rows)], dtype=torch.int64, device="cpu")
    counts = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine)
    most = max(int(c) for c in counts)
    padded = rows.new_zeros((most, *rows.shape[1:]), device="cpu")
    padded[: len(rows)] = rows.cpu()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)])


def all_reduce_sum(value: float) -> float:
    """Return the sum over all processes, in order of rank, everywhere."""
    return sum(gather(torch.tensor([value], dtype=torch.float64, device="cpu")).tolist())


def all_reduce_max(value: int) -> int:
    """Return the largest value that any process has, everywhere."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, dtype=torch.int64, device="cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def broadcast(compute: Callable[[], T]) -> T:
    """Return what the first process computes, everywhere."""
    if not dist.is_initialized():
        return compute()
    box: list[Any] = [compute() if is_first() else None]
    dist.broadcast_object_list(box)
    return box[0]


def everyone(rows: Tensor) -> Tensor:
    """Return the rows [N, ...] of all processes in order of rank, on their device, no gradient.

    All processes call this together, each with as many rows.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
