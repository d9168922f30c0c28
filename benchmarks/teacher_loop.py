"""A teacher's loop: DDIM with the CIFAR-10 network, ours beside diffusers' pipeline.

Random weights, and the last two times of a grid of 20, since a step costs what another costs. The
loop of diffusers' DDIMPipeline, called with given noise: as published in float32, with
channels_last, and that compiled, on CPUs with frozen weights, on GPUs with max-autotune; on CPUs
also around OpenVINO's and ONNX Runtime's networks. "net" is our loop around the plain network,
"engine" around the engine; "ours", on GPUs, is what a Sampler does: the engine's step, captured and
replayed; tuned, it lets cuDNN try its algorithms, as all peers may. All but the one as published
are in the precision of the case; bfloat16 where there are instructions for it. FLOPs are those of
the plain network.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Side, Size, batch, late
from benchmarks.network import about, count_flops, multiplies_narrow, peers, random_cifar10
from benchmarks.peers import Loop, ddim_loop
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM
from ds.models.execution import Execution
from ds.models.sampler import Sampler
from ds.models.teacher import Teacher
from ds.nets import UNet

GRID = (50, 0)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield cases for throughput in each precision, and for the latency of one image."""
    net = random_cifar10(device, size)
    cuda = device.type == "cuda"
    many, narrow = batch(device, size, gpu=264, cpu=8), multiplies_narrow(device)
    work = [(many, torch.float32), (1, torch.bfloat16 if cuda else torch.float32)]
    if narrow:
        work.insert(1, (many, torch.bfloat16))
    for images, dtype in work[:1] if size == "quick" else work:
        z = torch.randn(images, *net.shape, device=device)
        slow = size == "full" and (cuda or images > 1)
        sides, missing = contenders(net, images, dtype, device, slow=slow)
        yield Case(
            f"DDIM {str(dtype)[6:]}, {len(GRID)} steps {about(net, images)}",
            {name: Side(functools.partial(_run, loop, z)) for name, loop in sides.items()},
            functools.partial(_exact, net, z),
            flops=len(GRID) * count_flops(net, z, torch.zeros(images, device=device)),
            dtype=dtype,
            images=images,
            factor=6.0 if cuda and dtype == torch.float32 else 3.0,  # cuDNN may take Winograd's way
            missing=missing,
        )


def contenders(
    net: UNet, images: int, dtype: torch.dtype, device: torch.device, *, slow: bool
) -> tuple[dict[str, Loop], dict[str, str]]:
    """Return what to compare, ours last, with what is slow to start or not, and what is missing."""
    calls, missing = peers(net, dtype, device, compiles=slow)
    loops = {name: ddim_loop(call, GRID, spacing=50) for name, call in calls.items()}
    plain = copy.deepcopy(net).to(dtype)
    loops["net"] = Teacher(Denoiser(plain, LinearBeta()), DDIM(), GRID).sample
    teacher = Teacher(Denoiser(net, LinearBeta()), DDIM(), GRID)
    loops["engine"] = late(lambda: teacher.engine(images, dtype=dtype).sample)
    if device.type == "cuda":
        ours = Execution.default(teacher, precision=str(dtype)[6:])
        tuned = replace(ours, tune=True)
        if slow:
            options = {"batch_size": images, "execution": tuned}
            loops["ours, tuned"] = late(lambda: Sampler(teacher, **options).sample)
        loops["ours"] = late(lambda: Sampler(teacher, batch_size=images, execution=ours).sample)
    return loops, missing


def _exact(net: UNet, z: Tensor) -> Tensor:
    wide = Teacher(Denoiser(copy.deepcopy(net).double(), LinearBeta()), DDIM(), GRID)
    return wide.sample(z.double())


@torch.no_grad()
def _run(loop: Loop, z: Tensor, _: Any) -> Tensor:
    return loop(z)
