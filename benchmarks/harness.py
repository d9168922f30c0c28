"""How everything here is timed: right results first, then the sides in turns, medians with spread.

A case is a piece of work and the sides that can do it. `gate` holds each side against the exact
answer and refuses to time what is wrong. `measure` then lets the sides take turns, so that whatever
else the machine does reaches all of them. `calibrate` finds what this machine can copy and multiply
in the same run; figures are given as shares of that, not of a data sheet.
"""

import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ds
from ds import ops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The L2 caches of today's GPUs are smaller; what is written between two runs of a side.
FLUSH_BYTES = 256 * 2**20


class Wrong(Exception):
    """A side's results are not what they should be; the text says by how much."""


@dataclass(frozen=True)
class Side:
    """One way to do the work: run(prepare()) does it once. Only `run` is timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Case:
    """A piece of work, the sides that do it, the first of them the baseline, and the exact answer.

    `bytes` are those that must move, each once, and `flops` those of the work as it is stated,
    whatever a side saves, in `dtype`; 0 where such a figure says nothing. `images` are those that a
    run makes or learns from. `missing` names peers that cannot run here, with the reason. A side
    may be off by `factor` times what the baseline is off by, and by two roundings. `wall`: it also
    waits, for a disk or another process. Sides may add to `phases` the seconds of their parts.
    """

    name: str
    sides: Mapping[str, Side]
    exact: Callable[[], Any]
    bytes: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32
    images: int = 0
    factor: float = 3.0
    missing: Mapping[str, str] = field(default_factory=dict)
    wall: bool = False
    phases: dict[str, dict[str, list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """How long to measure: rounds of turns, and seconds that a side's turn takes at least.

    Rounds that would take longer than `most` seconds in all are fewer, but one after the first.
    """

    rounds: int = 15
    seconds: float = 0.01
    most: float = 10.0


QUICK = Pace(rounds=21, seconds=0.01, most=2.0)


def gate(case: Case) -> dict[str, float]:
    """Return the root mean square error of each side's first tensor, as a share of the values.

    Raises Wrong if a side's result is further from the exact answer than the case allows.
    """
    exact = _tensors(case.exact())
    allowed: list[float] = []
    found = {}
    for name, side in case.sides.items():
        got = _tensors(side.run(side.prepare()))
        if len(got) != len(exact):
            raise Wrong(f"{case.name}: {name} returns {len(got)} tensors, not {len(exact)}")
        for i, (a, e) in enumerate(zip(got, exact, strict=True)):
            error = _distance(a, e)
            if len(allowed) <= i:
                allowed.append(case.factor * error + 2 * _rounding(a))
            if not error <= allowed[i]:
                raise Wrong(
                    f"{case.name}: {name} is off by {error:.2g}, {allowed[i]:.2g} is allowed"
                )
        found[name] = _rms(got[0], exact[0])
    return found


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _distance(actual: Tensor, exact: Tensor) -> float:
    """Return the largest error as a share of the largest value."""
    if actual.shape != exact.shape:
        raise Wrong(f"a result is {list(actual.shape)}, not {list(exact.shape)}")
    scale = exact.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual.double() - exact.double()).abs().max() / scale).item()


def _rms(actual: Tensor, exact: Tensor) -> float:
    scale = exact.double().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual.double() - exact.double()).square().mean() / scale).sqrt().item()


def _rounding(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0


def measure(case: Case, device: torch.device, pace: Pace) -> dict[str, dict[str, float]]:
    """Return median, p20 and p80 of the microseconds of a run, by side; all have run once."""
    seconds = _wall_seconds if case.wall else _seconds(device)
    runs, times, turn = {}, {}, 0.0
    for name, side in case.sides.items():
        first = seconds(side, 1)
        runs[name] = 1 + min(40, int(pace.seconds / first))
        times[name] = [1e6 * first] if runs[name] == 1 else []
        turn += runs[name] * first
    for _ in range(max(1, min(pace.rounds, int(pace.most / turn)))):
        for name, side in case.sides.items():
            times[name].append(1e6 * seconds(side, runs[name]))
    return {name: summary(taken) for name, taken in times.items()}


def summary(times: list[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentile."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": statistics.median(times), "p20": fifths[0], "p80": fifths[-1]}


def _seconds(device: torch.device) -> Callable[[Side, int], float]:
    """Return what times runs: one CPU thread by the process's time, untouched by waiting."""
    if device.type == "cuda":
        return _cuda_seconds
    return _cpu_seconds if torch.get_num_threads() == 1 else _wall_seconds


def _cpu_seconds(side: Side, runs: int, clock: Callable[[], float] = time.process_time) -> float:
    states = [side.prepare() for _ in range(runs)]
    start = clock()
    while states:
        side.run(states.pop())
    return (clock() - start) / runs


def _wall_seconds(side: Side, runs: int) -> float:
    return _cpu_seconds(side, runs, settled)


def settled() -> float:
    """Return the time at which the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _cuda_seconds(side: Side, runs: int) -> float:
    """Time runs of a side on the device, each with a cold L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    states = [side.prepare() for _ in range(runs)]
    events = []
    while states:
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        side.run(states.pop())
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def calibrate(device: torch.device) -> dict[str, float]:
    """Return what this machine copies (GB/s) and multiplies (TFLOP/s, by dtype) at its best.

    Square matrices, by PyTorch's product and as a 1x1 convolution: they are of two libraries, and
    on some CPUs either is much the faster one.
    """
    cuda = device.type == "cuda"
    source = torch.randn((1 << 28) if cuda else (1 << 25), device=device)
    target = torch.empty_like(source)
    found = {"copy_gbs": 2 * source.nbytes / 1e9 / _fastest(lambda: target.copy_(source), device)}
    size = 8192 if cuda else 1024
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        image, weight = a.T[None, :, :, None], b[:, :, None, None]  # channels_last
        ways = [lambda a=a, b=b: a @ b, lambda x=image, w=weight: F.conv2d(x, w)]
        rate = 2e-12 * size**3 / min(_fastest(way, device) for way in ways)
        found[f"matmul_tflops_{str(dtype)[6:]}"] = rate
    return found


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    seconds, taken = _seconds(device), []
    while len(taken) < 2 or (len(taken) < 8 and sum(taken) < 1):
        taken.append(seconds(Side(lambda _: run()), 1))
    return min(taken)


def run(cases: Iterable[Case], device: torch.device, pace: Pace) -> Iterator[dict[str, Any]]:
    """Check and time cases one after another; yield a row of figures each."""
    gc.disable()
    try:
        for case in cases:
            errors = gate(case)
            times = measure(case, device, pace)
            yield {
                "case": case.name,
                "us": times,
                "error": errors,
                "bytes": case.bytes,
                "flops": case.flops,
                "dtype": str(case.dtype)[6:],
                "images": case.images,
                "wall": case.wall,
                "missing": dict(case.missing),
                "phases": {
                    side: {phase: statistics.median(taken) for phase, taken in parts.items()}
                    for side, parts in case.phases.items()
                },
            }
            gc.collect()
    finally:
        gc.enable()


def floor(row: dict[str, Any], calibration: dict[str, float]) -> float:
    """Return the microseconds that a row's bytes or FLOPs take at the machine's rates, or 0."""
    rate = calibration.get(f"matmul_tflops_{row['dtype']}", calibration["matmul_tflops_float32"])
    return max(row["bytes"] / 1e3 / calibration["copy_gbs"], row["flops"] / 1e6 / rate)


def line(row: dict[str, Any], calibration: dict[str, float]) -> str:
    """Lay a row out for people: each side's median and how many times faster the last one is."""
    text = f"{row['case']:58}"
    *_, (last, ours) = row["us"].items()
    for name, t in row["us"].items():
        text += f"  {name} {t['median']:.0f} ({t['p20']:.0f} to {t['p80']:.0f})"
        if name != last:
            text += f" {t['median'] / ours['median']:.2f}x"
    if least := floor(row, calibration):
        text += f"  floor {least:.0f}, {least / ours['median']:.0%} of its rate attained"
    for side, parts in row["phases"].items():
        split = ", ".join(f"{phase} {seconds:.3g} s" for phase, seconds in parts.items())
        text += f"\n    {side}: {split}"
    for name, reason in row["missing"].items():
        text += f"\n    {name} missing: {reason}"
    return text


def environment(device: torch.device, *, wall: bool = False) -> dict[str, Any]:
    """Say what was measured, on what, with which versions, and by the clock on the wall or not."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "timing": "wall-clock time" if wall else _timing(device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "compiler": str(ops.build_info()["compiler"]),
        "ds": ds.__version__,
        "commit": git("rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def _timing(device: torch.device) -> str:
    if device.type == "cuda":
        return "CUDA events, cold L2"
    return "process CPU time" if torch.get_num_threads() == 1 else "wall-clock time"


def _cpu() -> str:
    """Return the name of the processor and its vectors: a name may stand for several of them."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except FileNotFoundError:
        found = None
    name = found.group(1) if found else platform.processor() or platform.machine()
    narrow = " with bfloat16" * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{narrow}"


def machine(device: torch.device) -> str:
    """Return the name of the folder for the results of this machine."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu()} {os.cpu_count()} cores"
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def dirty() -> bool:
    """Say whether the checkout holds changes that no commit names; results do not count."""
    return bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results"))


def save(
    name: str, folder: str, rows: list[dict[str, Any]], calibration: dict[str, float],
    device: torch.device,
) -> Path:  # fmt: skip
    """Write results/<folder>/<name>.json. Raises ValueError if the checkout is dirty."""
    if dirty():
        raise ValueError("the checkout has uncommitted changes: commit them, or pass --no-save")
    path = RESULTS / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    wall = any(row["wall"] for row in rows)
    about = {"environment": environment(device, wall=wall), "calibration": calibration}
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps(about, indent=1)[:-2]
    path.write_text(f'{head},\n "cases": [\n{lines}\n]}}\n')
    return path
