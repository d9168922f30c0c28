"""A teacher's loop: DDIM with the CIFAR-10 network, the engine beside diffusers' pipeline.

Random weights, and the last two times of a grid of 20, since a step costs what another costs. The
loop of diffusers' DDIMPipeline, called with given noise: as published, with channels_last, and that
compiled, on CPUs with frozen weights. "net" is our loop around the plain network. All in float32.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Side
from benchmarks.network import about, random_cifar10
from benchmarks.peers import SLOW, Loop, compiled, ddim_loop, diffusers_twin
from ds.denoiser import Denoiser
from ds.sample import Teacher
from ds.schedule import LinearBeta
from ds.solvers import DDIM

GRID = (50, 0)


def cases(device: torch.device, *, quick: bool) -> Iterator[Case]:
    """Yield a case for each batch size: throughput, and the latency of one image."""
    net = random_cifar10(device, quick=quick)
    cuda = device.type == "cuda"
    for images in (264, 1) if cuda else (8, 1):
        if quick and images == 1:
            return
        z = torch.randn(images, *net.shape, device=device)
        exact = functools.partial(_exact, net, z)
        sides, missing = contenders(net, images, device, quick=quick or (not cuda and images == 1))
        yield Case(
            f"DDIM, {len(GRID)} steps {about(net, images)}",
            {name: Side(functools.partial(_run, loop, z)) for name, loop in sides.items()},
            exact,
            images=images,
            missing=missing,
        )


def contenders(
    net: nn.Module, images: int, device: torch.device, *, quick: bool
) -> tuple[dict[str, Loop], dict[str, str]]:
    """Return what to compare, the engine last, and what is missing."""
    sides, missing = {}, {}
    loop = functools.partial(ddim_loop, grid=GRID, spacing=50)
    try:
        sides["diffusers"] = loop(diffusers_twin(net).to(device))
        last = diffusers_twin(net).to(device, memory_format=torch.channels_last)
        sides["diffusers, channels_last"] = loop(last)
        if quick:
            missing |= SLOW
        else:
            sides["diffusers, compiled"] = loop(compiled(last, device))
    except ImportError as error:
        missing["diffusers"] = str(error)
    teacher = Teacher(Denoiser(net, LinearBeta()), DDIM(), GRID)
    sides["net"] = teacher.sample
    sides["engine"] = teacher.engine(images).sample
    return sides, missing


def _exact(net: nn.Module, z: Tensor) -> Tensor:
    wide = Teacher(Denoiser(copy.deepcopy(net).double(), LinearBeta()), DDIM(), GRID)
    return wide.sample(z.double())


@torch.no_grad()
def _run(loop: Loop, z: Tensor, _: Any) -> Tensor:
    return loop(z)
