"""What work will cost, said before it starts: time from a short measurement, disk, money."""

import time
from collections.abc import Callable


def seconds_each(work: Callable[[int], None], most: int) -> float:
    """Time work(n) for an item, n growing to what takes a fifth of a second, or to `most`.

    `work` waits for its device. Each size is done three times, and the quickest counts.
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


def size(count: float) -> str:
    """Say a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Say a time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cost(seconds: float, price: float) -> str:
    """Say a time, and what it costs at so many dollars an hour, where that is known."""
    return duration(seconds) + (f", ${seconds / 3600 * price:.2f}" if price else "")
