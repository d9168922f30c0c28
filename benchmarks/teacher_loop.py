"""A teacher's loop: DDIM with the CIFAR-10 network, the engine beside diffusers' pipeline.

Random weights, and the last two times of a grid of 20, since a step costs what another costs. The
loop of diffusers' DDIMPipeline, called with given noise: as published, with channels_last, and that
compiled, on CPUs with frozen weights. "net" is our loop around the plain network. All in float32.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Side
from benchmarks.network import random_cifar10
from benchmarks.peers import diffusers_twin
from ds.denoiser import Denoiser
from ds.sample import Teacher
from ds.schedule import LinearBeta
from ds.solvers import DDIM

GRID = (50, 0)
Loop = Callable[[Tensor], Tensor]


def cases(device: torch.device, *, quick: bool) -> Iterator[Case]:
    """Yield a case for each batch size: throughput, and the latency of one image."""
    net = random_cifar10(device)
    for images in (264, 1) if device.type == "cuda" else (8, 1):
        if quick and images == 1:
            return
        z = torch.randn(images, *net.shape, device=device)
        exact = functools.partial(_exact, net, z)
        sides, missing = contenders(net, images, device)
        yield Case(
            f"DDIM, {len(GRID)} steps {list(z.shape)}",
            {name: Side(functools.partial(_run, loop, z)) for name, loop in sides.items()},
            exact,
            missing=missing,
        )


def contenders(
    net: nn.Module, images: int, device: torch.device
) -> tuple[dict[str, Loop], dict[str, str]]:
    """Return what to compare, the engine last, and what is missing."""
    sides, missing = {}, {}
    try:
        sides["diffusers"] = _diffusers(diffusers_twin(net).to(device))
        last = diffusers_twin(net).to(device, memory_format=torch.channels_last)
        sides["diffusers, channels_last"] = _diffusers(last)
        torch._dynamo.reset()
        sides["diffusers, compiled"] = _diffusers(
            torch.compile(last, dynamic=False, options={"freezing": True})
            if device.type == "cpu"
            else torch.compile(last, mode="max-autotune", dynamic=False)
        )
    except ImportError as error:
        missing["diffusers"] = str(error)
    teacher = Teacher(Denoiser(net, LinearBeta()), DDIM(), GRID)
    sides["net"] = teacher.sample
    sides["engine"] = teacher.engine(images).sample
    return sides, missing


def _diffusers(net: Callable[[Tensor, Tensor], Tensor]) -> Loop:
    """Return the loop of DDIMPipeline.__call__, which draws its noise itself, around a network."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(1000 // 50)

    def loop(x: Tensor) -> Tensor:
        x = x.clone()
        for t in GRID:
            out = net(x, torch.full((len(x),), t, device=x.device))
            x = scheduler.step(out, t, x, eta=0.0).prev_sample
        return x

    return loop


def _exact(net: nn.Module, z: Tensor) -> Tensor:
    wide = Teacher(Denoiser(copy.deepcopy(net).double(), LinearBeta()), DDIM(), GRID)
    return wide.sample(z.double())


@torch.no_grad()
def _run(loop: Loop, z: Tensor, _: Any) -> Tensor:
    return loop(z)
