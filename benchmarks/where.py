"""Where the time of a network's call goes: seconds by kind of layer, diffusers' and the engine's.

The CIFAR-10 network in float32 (bfloat16 on GPUs), channels_last. diffusers is under PyTorch's
profiler, whose operations are sorted by name; the engine's calls are timed one by one, so that on a
GPU each waits for the one before.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Case, Side, Size, batch, settled
from benchmarks.network import about, exact_call, random_cifar10, twin
from benchmarks.peers import Call
from ds.engine import Engine
from ds.engine.calls import Run

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's, which tells when it starts
Seconds = dict[str, float]
KINDS = {
    "convolution": ("conv", "gemm", "winograd", "phases"),
    "norm and SiLU": ("norm", "silu"),
    "attention and linear": ("attend", "attention", "addmm", "bmm", "aten::mm", "softmax"),
}  # by a part of the name; the rest is "other"


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield the case."""
    net = random_cifar10(device, size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    images = batch(device, size, gpu=264, cpu=8)
    x, t = torch.randn(images, *net.shape, device=device), torch.full((images,), 500, device=device)
    phases: dict[str, dict[str, list[float]]] = {}
    sides, missing = {}, {}
    try:
        sides["diffusers"] = functools.partial(_profiled, twin(net, dtype, device))
    except ImportError as error:
        missing["diffusers"] = str(error)
    sides["engine"] = functools.partial(_timed, Engine(net, [500], images=images, dtype=dtype))
    yield Case(
        f"where, {about(net, images)}",
        {name: Side(_noted(phases, name, call, x, t)) for name, call in sides.items()},
        functools.partial(exact_call, net, x, t),
        dtype=dtype,
        images=images,
        missing=missing,
        phases=phases,
    )


def kind(name: str) -> str:
    """Return the kind of layer that an operation or a call of a plan belongs to."""
    names = (k for k, parts in KINDS.items() if any(part in name.lower() for part in parts))
    return next(names, "other")


def _noted(
    phases: dict[str, dict[str, list[float]]],
    side: str,
    call: Callable[[Tensor, Tensor, Seconds], Tensor],
    x: Tensor,
    t: Tensor,
) -> Callable[[Any], Tensor]:
    """Return what runs once and notes the seconds of every kind."""

    @torch.no_grad()
    def run(_: Any) -> Tensor:
        seconds = Counter()
        y = call(x, t, seconds)
        for name, taken in seconds.items():
            phases.setdefault(side, {}).setdefault(name, []).append(taken)
        return y

    return run


def _profiled(net: Call, x: Tensor, t: Tensor, seconds: Seconds) -> Tensor:
    cuda = x.is_cuda
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        y = net(x, t)
    for event in found.key_averages():
        taken = event.self_device_time_total if cuda else event.self_cpu_time_total
        seconds[kind(event.key)] += taken / 1e6
    return y


def _timed(engine: Engine, x: Tensor, t: Tensor, seconds: Seconds) -> Tensor:
    def timed(run: Run, name: str) -> Run:
        def call(*args: Tensor) -> Tensor | tuple[Tensor, ...]:
            begin = settled()
            made = run(*args)
            seconds[name] += settled() - begin
            return made

        return call

    plain = engine._prepared
    engine._prepared = [(timed(run, kind(s.call.kind)), s, last) for run, s, last in plain]
    try:
        return engine(x, t)
    finally:
        engine._prepared = plain
