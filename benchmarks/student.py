"""A one-step student: images a second in batches, and how long one image takes.

The CIFAR-10 network with random weights, from noise to uint8 in float32. "diffusers, one call" is
its network in channels_last, called once; ConsistencyModelPipeline is what diffusers has for models
of one step, its weights made to draw the same images.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, Side
from benchmarks.network import about, exact_levels, random_cifar10
from benchmarks.peers import SLOW, Loop, compiled, consistency_pipeline, diffusers_twin
from ds.methods import DenoisingStudent
from ds.nets import UNet
from ds.sample import Sampler, Student

METHOD = DenoisingStudent()


def cases(device: torch.device, *, quick: bool) -> Iterator[Case]:
    """Yield a case for each batch size, 1 the last."""
    net = random_cifar10(device, quick=quick)
    batches = (1024, 256, 32, 1) if device.type == "cuda" else (16, 4, 1)
    for images in batches[-2:-1] if quick else batches:
        z = torch.randn(images, *net.shape, device=device)
        sides, missing = contenders(net, images, device, quick=quick or images not in (16, 256, 1))
        yield Case(
            f"student {about(net, images)}",
            {name: Side(functools.partial(_run, draw, z)) for name, draw in sides.items()},
            functools.partial(exact_levels, net, METHOD.sample, z),
            images=images,
            missing=missing,
        )


def contenders(
    net: UNet, images: int, device: torch.device, *, quick: bool
) -> tuple[dict[str, Loop], dict[str, str]]:
    """Return what to compare, ours last, and what is missing; from noise to uint8."""
    sides, missing = {}, {}
    try:
        twin = diffusers_twin(net).to(device, memory_format=torch.channels_last)
        sides["diffusers, one call"] = lambda z: _levels(METHOD.sample(twin, z) / 2 + 0.5)
        pipeline = consistency_pipeline(net, METHOD.t)
        sides["ConsistencyModelPipeline"] = lambda z: _levels(pipeline(z))
        if quick:
            missing |= SLOW
        else:
            fast = compiled(twin, device)
            sides["diffusers, compiled"] = lambda z: _levels(METHOD.sample(fast, z) / 2 + 0.5)
    except ImportError as error:
        missing["diffusers"] = str(error)
    sampler = Sampler(Student(net, METHOD), batch_size=images, engine=device.type == "cpu" or None)
    sides["ours"] = sampler.draw
    return sides, missing


def _levels(x: Tensor) -> Tensor:
    """Bring images in [0, 1] into the form in which images are kept."""
    return (255 * x).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu()


@torch.no_grad()
def _run(draw: Loop, z: Tensor, _: None) -> Tensor:
    return draw(z)
