"""How everything here is timed: right results first, then the sides in turns, medians with spread.

A case is a piece of work and the sides that can do it. `gate` holds each side against the exact
answer and refuses to time what is wrong. `measure` then lets the others take turns, so that
whatever else the machine does reaches all of them. `calibrate` finds what this machine can copy and
multiply in the same run; figures are given as shares of that, not of a data sheet.
"""

import argparse
import datetime
import functools
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import ds
from ds import ops
from ds.system.machine import device_name
from ds.system.staging import replacing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # what is committed, and what the documents are made of
RUNS = ROOT / "runs" / "benchmarks"  # what is measured for oneself
# The L2 caches of today's GPUs are smaller; what is written between two runs of a side.
FLUSH_BYTES = 256 * 2**20


# How far the first side may be off, as a share of the largest value; it has no peer to be held to.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.uint8: 1 / 255}
EMULATED = ", emulated"  # of a device's name (tests/emulated): its times say nothing
# Of the work: as people have it; a tour with small networks and few peers, of minutes; so small
# that a GPU can be emulated, which shows that a case runs and nothing else.
Size = Literal["full", "quick", "tiny"]


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
    run makes or learns from. `missing` names peers that cannot run here, with the reason. The
    baseline may be off by `bound`, by default what BOUNDS has for the dtype or the result's; every
    other side by `factor` times what the baseline is off by and by two roundings. `wall`: it also
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
    bound: float | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    wall: bool = False
    phases: dict[str, dict[str, list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """How long to measure: rounds of turns, and seconds that a side's turn takes at least.

    Rounds that would take longer than `most` seconds in all are fewer, but one after the first run
    unless there are to be none.
    """

    rounds: int = 15
    seconds: float = 0.01
    most: float = 10.0


PACES: dict[Size, Pace] = {
    "full": Pace(),
    "quick": Pace(rounds=21, seconds=0.01, most=2.0),
    "tiny": Pace(rounds=0, seconds=0.0),
}


def batch(device: torch.device, size: Size, *, gpu: int, cpu: int) -> int:
    """Return how many images at a time are the work on a device."""
    if size == "tiny":
        return 2
    return gpu if device.type == "cuda" else cpu


def without(case: Case, pattern: str) -> Case:
    """Return the case without the sides whose name has the pattern."""
    left_out = [name for name in case.sides if re.search(pattern, name)]
    return replace(
        case,
        sides={name: side for name, side in case.sides.items() if name not in left_out},
        missing={**case.missing, **dict.fromkeys(left_out, "left out of this run")},
    )


def late(build: Callable[[], Callable]) -> Callable:
    """Return what `build` returns, built at its first call, which is the gate's.

    A side that cannot be built is then refused, and the others go on.
    """
    built = functools.cache(build)
    return lambda *args, **named: built()(*args, **named)


def gate(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Hold every side against the exact answer; return errors, and why sides are refused.

    An error is the root mean square of a side's first tensor's, as a share of the values. Refused
    is a side that raises, or is further from the exact answer than the case allows.
    """
    exact = _tensors(case.exact())
    allowed = None
    found, refused = {}, {}
    for name, side in case.sides.items():
        try:
            got = _tensors(side.run(side.prepare()))
            errors = _errors(got, exact)
            limits = allowed or [_bound(case, x) for x in got]
            for error, limit in zip(errors, limits, strict=True):
                if not error <= limit:
                    raise Wrong(f"off by {error:.2g}, {limit:.2g} is allowed")
        except Exception as error:  # whatever a peer or a compiler raises, the others can run
            refused[name] = f"{type(error).__name__}: {error}".removeprefix("Wrong: ")
            continue
        if allowed is None:
            roundings = [2 * _rounding(case, x) for x in got]
            allowed = [case.factor * e + r for e, r in zip(errors, roundings, strict=True)]
        found[name] = _rms(got[0], exact[0])
    return found, refused


def _bound(case: Case, result: Tensor) -> float:
    if case.bound is not None:
        return case.bound
    return max(BOUNDS[case.dtype], BOUNDS.get(result.dtype, 0.0))


def _errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    if len(got) != len(exact):
        raise Wrong(f"{len(got)} tensors, not {len(exact)}")
    return [_distance(a, e) for a, e in zip(got, exact, strict=True)]


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


def _rounding(case: Case, result: Tensor) -> float:
    """Return a rounding of a result; of a single number in the case's dtype.

    Such a number, as a loss is, may be off by little by luck.
    """
    if not result.is_floating_point():
        return 0.0
    return torch.finfo(case.dtype if result.numel() == 1 else result.dtype).eps


def measure(
    case: Case, names: Iterable[str], device: torch.device, pace: Pace
) -> dict[str, dict[str, float]]:
    """Return median, p20 and p80 of the microseconds of a run, by side; all have run once."""
    seconds = _wall_seconds if case.wall else _seconds(device)
    sides = {name: case.sides[name] for name in names}
    runs, times, turn = {}, {}, 0.0
    for name, side in sides.items():
        first = seconds(side, 1)
        runs[name] = 1 + min(40, int(pace.seconds / first))
        times[name] = [1e6 * first] if runs[name] == 1 else []
        turn += runs[name] * first
    for _ in range(min(pace.rounds, max(1, int(pace.most / turn)))):
        for name, side in sides.items():
            times[name].append(1e6 * seconds(side, runs[name]))
    return {name: summary(taken) for name, taken in times.items()}


def summary(times: list[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentile."""
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times
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


def calibrate(device: torch.device, size: Size = "full") -> dict[str, float]:
    """Return what this machine copies (GB/s) and multiplies (TFLOP/s, by dtype) at its best.

    Square matrices, by PyTorch's product and as a 1x1 convolution: they are of two libraries, and
    on some CPUs either is much the faster one.
    """
    large = device.type == "cuda" and size != "tiny"
    source = torch.randn((1 << 28) if large else (1 << 25), device=device)
    target = torch.empty_like(source)
    found = {"copy_gbs": 2 * source.nbytes / 1e9 / _fastest(lambda: target.copy_(source), device)}
    width = 8192 if large else 1024
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        image, weight = a.T[None, :, :, None], b[:, :, None, None]  # channels_last
        ways = [lambda a=a, b=b: a @ b, lambda x=image, w=weight: F.conv2d(x, w)]
        rate = 2e-12 * width**3 / min(_fastest(way, device) for way in ways)
        found[f"matmul_tflops_{str(dtype)[6:]}"] = rate
    return found


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    seconds, taken = _seconds(device), []
    with _best():
        while len(taken) < 2 or (len(taken) < 8 and sum(taken) < 1):
            taken.append(seconds(Side(lambda _: run()), 1))
    return min(taken)


def run(cases: Iterable[Case], device: torch.device, pace: Pace | None) -> Iterator[dict[str, Any]]:
    """Check and time cases one after another; yield a row of figures each. No pace: only check."""
    gc.disable()
    try:
        for case in cases:
            with _best():
                errors, refused = gate(case)
                times = measure(case, errors, device, pace) if errors and pace else {}
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
                "refused": refused,
                "phases": {
                    side: {phase: statistics.median(taken) for phase, taken in parts.items()}
                    for side, parts in case.phases.items()
                },
            }
            gc.collect()
    finally:
        gc.enable()


@contextmanager
def _best() -> Iterator[None]:
    """Let cuDNN try its algorithms, peers' too, and let float32 be float32, never TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, False, True
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def floor(row: dict[str, Any], calibration: dict[str, float]) -> float:
    """Return the microseconds that a row's bytes or FLOPs take at the machine's rates, or 0."""
    rate = calibration.get(f"matmul_tflops_{row['dtype']}", calibration["matmul_tflops_float32"])
    return max(row["bytes"] / 1e3 / calibration["copy_gbs"], row["flops"] / 1e6 / rate)


def environment(device: torch.device, *, wall: bool = False) -> dict[str, Any]:
    """Say what was measured, on what, with which versions, and by the clock on the wall or not."""
    cuda = device.type == "cuda"
    return {
        "device": _name(device),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "timing": "wall-clock time" if wall else _timing(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": _triton() if cuda else None,
        "python": platform.python_version(),
        "compiler": str(ops.build_info()["compiler"]),
        "ds": ds.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _timing(device: torch.device) -> str:
    if device.type == "cuda":
        return "CUDA events, cold L2"
    return "process CPU time" if torch.get_num_threads() == 1 else "wall-clock time"


def machine(device: torch.device | str, threads: int = 1) -> str:
    """Return the name of the folder for the results of this machine, several threads apart."""
    if torch.device(device).type == "cuda":
        return folder_name(_name(device))
    apart = f" {threads} threads" * (threads > 1)
    return folder_name(f"{_name(device)} {os.cpu_count()} cores{apart}")


def folder_name(device: str) -> str:
    """Return the name of the folder for the results of a device of this name."""
    return re.sub(r"\W+", "-", device.lower()).strip("-")


def _name(device: torch.device | str) -> str:
    cuda = torch.device(device).type == "cuda"
    return device_name(device) + EMULATED * (cuda and "DS_EMULATED_GPU" in os.environ)


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """Return the commit that is measured, with a "+" for changes; DS_COMMIT says it without git."""
    if given := os.environ.get("DS_COMMIT"):
        return given
    try:
        return git("rev-parse", "HEAD") + "+" * dirty()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def is_named(commit: str) -> bool:
    """Say whether this is a commit, and all that was measured."""
    return bool(re.fullmatch("[0-9a-f]{40}", commit))


def dirty() -> bool:
    """Say whether the checkout holds changes that no commit names; results do not count."""
    return bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results"))


def saving(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where results go."""
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results there instead")
    parser.add_argument("--no-save", action="store_true", help="print, and write nothing")
    parser.add_argument(
        "--commit", action="store_true", help="write to benchmarks/results, to be committed"
    )
    parser.add_argument("--machine", metavar="NAME", help="of its folder there")


def folder(options: argparse.Namespace) -> Path | None:
    """Return where the results of a run go, or None.

    Raises ValueError if they are to be committed and no commit names the code.
    """
    if options.no_save:
        return None
    here = options.machine or machine(options.device, options.threads)
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    chosen = options.out or (RESULTS / here if options.commit else RUNS / here / now)
    if RESULTS in chosen.resolve().parents and not is_named(code := commit()):
        raise ValueError(
            f"results that are committed need a commit that names the code, not {code!r}: commit "
            f"your changes, or leave --commit out and find the results in {RUNS.relative_to(ROOT)}"
        )
    return chosen


def save(
    name: str,
    folder: Path,
    rows: list[dict[str, Any]],
    calibration: dict[str, float],
    device: torch.device,
) -> Path:
    """Write <folder>/<name>.json, in which the environment names the commit, or adds a "+"."""
    environ = environment(device, wall=any(row["wall"] for row in rows))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write(path, {"environment": environ, "calibration": calibration, "cases": rows})
    return path


def write(path: Path, saved: dict[str, Any]) -> None:
    """Write results, a line a case."""
    lines = ",\n".join(json.dumps(row) for row in saved["cases"])
    head = json.dumps({k: v for k, v in saved.items() if k != "cases"}, indent=1)[:-2]
    with replacing(path) as temporary:
        temporary.write_text(f'{head},\n "cases": [\n{lines}\n]}}\n')
