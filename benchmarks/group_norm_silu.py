"""GroupNorm-SiLU on the CPU: ours against eager PyTorch and torch.compile, forward and backward.

    python -m benchmarks.group_norm_silu

Every GroupNorm of the CIFAR-10 network once, 16 images, channels_last, one thread. A case is timed
after its check against float64 only. The contenders take turns, so that what else the machine does
reaches all of them; times are CPU time of the process. Prints a table and writes
benchmarks/results/<machine>/group_norm_silu.json.
"""

import argparse
import datetime
import functools
import gc
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ds
from ds import ops, presets

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 16
ROUNDS = 15
SECONDS = 0.01  # of one contender in one round, at least
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Case = tuple[Tensor, Tensor, Tensor]
Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


class GroupNorms(TorchDispatchMode):
    """Note the channels and size of every GroupNorm that runs."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **kwargs or {})
        if func is torch.ops.ds.group_norm_silu.default:
            self.found.add(tuple(outputs[0].shape[1:3]))
        return outputs


def shapes() -> list[tuple[int, int]]:
    """Return the distinct (channels, size) that the GroupNorms of the network see."""
    with torch.device("meta"), GroupNorms() as norms:
        net = presets.cifar10().net.build()
        net(torch.empty(IMAGES, *net.shape), torch.zeros(IMAGES))
    return sorted(norms.found, key=lambda shape: (-shape[1], shape[0]))


def contenders(groups: int, eps: float) -> dict[str, Contender]:
    """Return the functions to compare, each of x, weight and bias."""

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm_silu(x, weight, bias, groups, eps)

    torch._dynamo.reset()  # one shape at a time, or it would compile for any shape
    return {"eager": eager, "inductor": torch.compile(eager, dynamic=False), "ours": ours}


def case(channels: int, size: int, dtype: torch.dtype) -> tuple[Case, Tensor]:
    """Draw x, weight and bias, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    x, grad = (
        draw(IMAGES, channels, size, size).to(dtype, memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight, bias = 1 + 0.3 * draw(channels), 0.3 * draw(channels)
    leaves = (x, weight.to(dtype), bias.to(dtype))
    return tuple(leaf.requires_grad_() for leaf in leaves), grad


def results(function: Contender, leaves: Case, grad: Tensor) -> list[Tensor]:
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check(functions: dict[str, Contender], leaves: Case, grad: Tensor) -> None:
    """Compare with float64: thrice the error of eager PyTorch and two roundings are allowed."""
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    exact = results(functions["eager"], wide, grad.double())
    errors = {
        name: [
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(results(function, leaves, grad), exact, strict=True)
        ]
        for name, function in functions.items()
    }
    for ours, eager in zip(errors["ours"], errors["eager"], strict=True):
        if not ours <= 3 * eager + 2 * torch.finfo(grad.dtype).eps:
            raise SystemExit(f"wrong results: off by {errors['ours']}, eager by {errors['eager']}")


def forward_seconds(function: Contender, leaves: Case, grad: Tensor, calls: int) -> float:
    with torch.no_grad():
        start = time.process_time()
        for _ in range(calls):
            function(*leaves)
        return time.process_time() - start


def backward_seconds(function: Contender, leaves: Case, grad: Tensor, calls: int) -> float:
    outputs = [function(*leaves) for _ in range(calls)]
    start = time.process_time()
    while outputs:
        torch.autograd.grad(outputs.pop(), leaves, grad)
    return time.process_time() - start


DIRECTIONS = {"forward": forward_seconds, "backward": backward_seconds}


def measure(
    seconds: Callable[..., float], functions: dict[str, Contender], leaves: Case, grad: Tensor
) -> dict[str, dict[str, float]]:
    """Return median, p20 and p80 of the microseconds of a call, by contender."""
    calls, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        seconds(function, leaves, grad, 2)
        calls[name] = 1 + min(40, int(SECONDS / (seconds(function, leaves, grad, 2) / 2)))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            taken = seconds(function, leaves, grad, calls[name])
            times[name].append(1e6 * taken / calls[name])
    return {name: summary(taken) for name, taken in times.items()}


def summary(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5)
    return {"median": statistics.median(times), "p20": fifths[0], "p80": fifths[-1]}


def environment() -> dict[str, str | int | bool]:
    return {
        "cpu": cpu(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "timing": "process CPU time",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": str(ops.build_info()["compiler"]),
        "ds": ds.__version__,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ":!benchmarks/results")),
        "date": datetime.date.today().isoformat(),
    }


def cpu() -> str:
    """Return the name of the processor."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except FileNotFoundError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    here = environment()
    slug = re.sub(r"\W+", "-", f"{here['cpu']} {here['cores']} cores".lower())
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--machine", default=slug, help="folder of the results (%(default)s)")
    machine = parser.parse_args().machine

    torch.set_num_threads(1)
    here["threads"] = 1
    gc.disable()
    net = presets.cifar10().net
    rows = []
    print("microseconds a call, median (p20 to p80)")
    print(f"{'':36}{'eager':>24}{'inductor':>24}{'ours':>24}  eager/ours  inductor/ours")
    for dtype, (channels, size) in itertools.product(FLOATS, shapes()):
        functions = contenders(net.norm_groups, net.norm_eps)
        leaves, grad = case(channels, size, FLOATS[dtype])
        check(functions, leaves, grad)
        for direction, seconds in DIRECTIONS.items():
            times = measure(seconds, functions, leaves, grad)
            shape = [IMAGES, channels, size, size]
            row = {"direction": direction, "dtype": dtype, "shape": shape, "us": times}
            # x and y, or grad, x and dx: each element once
            tensors = 2 if direction == "forward" else 3
            row["bytes"] = tensors * leaves[0].nbytes
            row["gbs"] = {name: row["bytes"] / 1e3 / t["median"] for name, t in times.items()}
            rows.append(row)
            print(line(row), flush=True)

    path = ROOT / "benchmarks" / "results" / machine / "group_norm_silu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": here, "cases": rows}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


def line(row: dict) -> str:
    _, channels, size, _ = row["shape"]
    text = f"{row['direction']:9} {row['dtype']:9} {channels:4} x {size:2} x {size:2}".ljust(36)
    for t in row["us"].values():
        text += f"{t['median']:9.0f} ({t['p20']:.0f} to {t['p80']:.0f})".rjust(24)
    ours = row["us"]["ours"]["median"]
    text += f"{row['us']['eager']['median'] / ours:12.2f}"
    return text + f"{row['us']['inductor']['median'] / ours:15.2f}"


if __name__ == "__main__":
    main()
