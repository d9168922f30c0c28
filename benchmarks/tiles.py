"""From how many tiles on Winograd's is the faster 3x3 convolution on a CPU: the table of `pays`.

    python -m benchmarks.tiles [portable] [avx2] [avx512] [vnni]

For each instruction set, way and pair of widths, images of 8 x 8 pixels, up to 512 tiles of 4 x 4,
are convolved by both kernels in turns on one thread. Their caches are cold, as a layer of a large
network finds them: hot ones hide that tiles read four times the weights. The table has the least
number from which ours takes less of the process's time, twice in a row: a minute or two for each
instruction set.

PyTorch's library is limited to the same instruction set, which has to be said before it starts:
each is measured in a process of its own. The result is ds/ops/conv/faster_cpu.json.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ds.engine import Target
from ds.engine.convolutions import Conv, Winograd
from ds.ops import _native
from ds.ops.conv.conv3x3 import by_tiles, gradients_by_tiles
from ds.ops.conv.winograd import FASTER, LEVELS, WIDTHS, Least, Way
from ds.system.staging import replacing

# What limits PyTorch and oneDNN to an instruction set of ours.
LIMITS = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
TILES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ROUNDS = 7  # turns
CACHE = 48 * 2**20  # bytes, more than the last cache has
Convolve = Callable[[], Tensor | tuple[Tensor, ...]]


def main(levels: Sequence[str]) -> None:
    """Measure the levels and put them into the table."""
    for level in levels or LEVELS:
        command = [sys.executable, "-m", "benchmarks.tiles", "--one", level]
        found = subprocess.run(
            command, env={**os.environ, **LIMITS.get(level, {})}, capture_output=True, text=True
        )
        if found.returncode:
            raise SystemExit(f"{level}: {found.stderr.strip().splitlines()[-1]}")
        table = json.loads(FASTER.read_text()) if FASTER.exists() else {}
        table[level] = json.loads(found.stdout)
        with replacing(FASTER) as temporary:
            temporary.write_text(laid_out(table))
        print(f"{level}: {FASTER}")


def laid_out(table: dict[str, Least]) -> str:
    """Return the table as JSON with a line for each way."""
    levels = []
    for level, ways in table.items():
        lines = (f"  {json.dumps(way)}: {json.dumps(rows)}" for way, rows in ways.items())
        levels.append(f" {json.dumps(level)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(levels) + "\n}\n"


@torch.no_grad()
def measured(level: str) -> Least:
    """Return the least numbers of tiles, by way, C and O."""
    number = LEVELS.index(level)
    if _native.cpu_library().ds_limit_simd(number) != number:
        raise ValueError(f"this processor does not have {level}")
    torch.set_num_threads(1)
    return {
        way: [[least(way, channels, out) for out in WIDTHS] for channels in WIDTHS]
        for way in get_args(Way)
    }


def least(way: Way, channels: int, out: int) -> int | None:
    """Return the number of tiles from which ours is faster there and at the next number."""
    before = None
    for tiles in TILES:
        if not is_faster(*both(way, channels, out, tiles)):
            before = None
        elif before is not None:
            return before
        else:
            before = tiles
    return before


def both(way: Way, channels: int, out: int, tiles: int) -> tuple[Convolve, Convolve]:
    """Return our convolution and PyTorch's."""
    images, size = (tiles // 4, 8) if tiles % 4 == 0 else (tiles, 4)
    narrow = way == "packed bfloat16"
    dtype = torch.bfloat16 if narrow else torch.float32
    x, dy = (
        torch.randn(images, c, size, size).to(dtype, memory_format=torch.channels_last)
        for c in (channels, out)
    )
    weight = torch.randn(out, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    if way.startswith("packed"):
        target = Target(torch.device("cpu"), dtype, images)
        bias = torch.zeros(out)
        ours, theirs = (
            functools.partial(call.prepare(target, (channels, size, size)), torch.zeros(0), x)
            for call in (Winograd(weight, bias), Conv(weight, bias))
        )
        return ours, theirs
    if way == "forward":
        direct = functools.partial(F.conv2d, x, weight, padding=1)
        return functools.partial(by_tiles, x, weight, None), direct
    wanted = [way == "gradient of x", way == "gradient of the weight"]
    direct = functools.partial(
        torch.ops.aten.convolution_backward,
        dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*wanted, False],
    )  # fmt: skip
    return functools.partial(gradients_by_tiles, dy, x, weight, wanted), direct


def is_faster(ours: Convolve, theirs: Convolve) -> bool:
    """Return whether the first takes less time in the median of turns."""
    ratios = [seconds(ours) / seconds(theirs) for _ in range(ROUNDS + 1)]
    return statistics.median(ratios[1:]) < 1


def seconds(convolve: Convolve) -> float:
    """Return the process's time of a call whose weight is in no cache, as within a network."""
    _FLUSH.add_(1)
    begin = time.process_time()
    convolve()
    return time.process_time() - begin


_FLUSH = torch.zeros(CACHE // 4)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        json.dump(measured(sys.argv[2]), sys.stdout)
    else:
        main(sys.argv[1:])
