"""Estimate the time, memory and money that work will cost."""

import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds_each(work: Callable[[int], object], most: int) -> float:
    """Return the seconds per item of work(n). `work` must wait for its device.

    n grows until a call takes 0.2 s, or to `most`. Each size runs three times and the fastest
    counts.
    """

    def seconds(n: int) -> float:
        begin = time.perf_counter()
        work(n)
        return time.perf_counter() - begin

    n = 1
    while True:
        shortest = min(seconds(n) for _ in range(3))
        if n >= most or shortest > 0.2:
            return shortest / n
        n = min(4 * n, most)


def free_memory(device: Any = "cpu") -> float:
    """Return an estimate of the bytes that this process can still allocate on a device.

    On a CPU it is the least of three: the machine's available memory, what the cgroup's memory.max
    leaves, and what the limit on the process's address space leaves.
    """
    if str(device).startswith("cuda"):
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = [_available(), _group()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = _number("/proc/self/statm")
        free.append(max(0.0, limit - pages * resource.getpagesize()))
    return min(free)


def check_memory(what: str, needed: float, device: Any = "cpu") -> None:
    """Raise ValueError if `what` needs more memory than a device has free."""
    if needed > (free := free_memory(device)):
        raise ValueError(
            f"{what} needs {size(needed)} of memory or more, {size(free)} are free on {device}; "
            f"ask for less"
        )


def _available() -> float:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return math.inf


def _group() -> float:
    folder = "/sys/fs/cgroup"
    cached = (line.split() for line in _lines(f"{folder}/memory.stat"))
    given_back = sum(int(n) for name, n in cached if name in ("inactive_file", "active_file"))
    limit = _number(f"{folder}/memory.max", math.inf)
    return limit - _number(f"{folder}/memory.current") + given_back


def _number(file: str, otherwise: float = 0.0) -> float:
    words = " ".join(_lines(file)).split()
    return float(words[0]) if words and words[0].isdecimal() else otherwise


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:  # not Linux, or no cgroups
        return []


def size(count: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Format a time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cost(seconds: float, price: float) -> str:
    """Format a time and, if the price in dollars an hour is known, its cost."""
    return duration(seconds) + (f", ${seconds / 3600 * price:.2f}" if price else "")
