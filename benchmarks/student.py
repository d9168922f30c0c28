"""A one-step student: images a second in batches, and how long one image takes.

The CIFAR-10 network with random weights, from noise to uint8, in float32, on GPUs in bfloat16.
"diffusers, one call" is its network in channels_last, called once, as are OpenVINO's and ONNX
Runtime's; ConsistencyModelPipeline is what diffusers has for models of one step, its weights made
to draw the same images, in float32 as published.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Side, Size, late
from benchmarks.network import about, exact_levels, random_cifar10, twin
from benchmarks.peers import SLOW, Loop, compiled, consistency_pipeline
from benchmarks.runtimes import runtimes
from ds.methods import DenoisingStudent
from ds.models.execution import Execution
from ds.models.sampler import Sampler
from ds.models.student import Student
from ds.nets import UNet

METHOD = DenoisingStudent(t=999)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case for each batch size, 1 the last."""
    net = random_cifar10(device, size)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    batches = {"full": (1024, 256, 32, 1) if cuda else (16, 4, 1), "quick": (32 if cuda else 4,)}
    for images in batches.get(size, (2, 1)):
        z = torch.randn(images, *net.shape, device=device)
        compiles = size == "full" and images in (16, 256, 1)
        sides, missing = contenders(net, images, dtype, device, compiles=compiles)
        yield Case(
            f"student {about(net, images)}",
            {name: Side(functools.partial(_run, draw, z)) for name, draw in sides.items()},
            functools.partial(exact_levels, net, METHOD.sample, z),
            images=images,
            dtype=dtype,
            missing=missing,
        )


def contenders(
    net: UNet, images: int, dtype: torch.dtype, device: torch.device, *, compiles: bool
) -> tuple[dict[str, Loop], dict[str, str]]:
    """Return what to compare, ours last, and what is missing; from noise to uint8."""
    sides, missing = {}, {}
    try:
        peer = twin(net, dtype, device)
        sides["diffusers, one call"] = _drawn(peer)
        pipeline = consistency_pipeline(net, METHOD.t)
        sides["ConsistencyModelPipeline"] = lambda z: _levels(pipeline(z))
        if compiles:
            sides["diffusers, compiled"] = _drawn(compiled(peer, device))
        else:
            missing |= SLOW
    except ImportError as error:
        missing["diffusers"] = str(error)
    ready, absent = runtimes(net, dtype, device)
    sides |= {name: _drawn(call) for name, call in ready.items()}
    missing |= absent
    student = Student(net, METHOD)
    execution = Execution.default(student, precision=str(dtype)[6:])
    sides["ours"] = late(lambda: Sampler(student, batch_size=images, execution=execution).draw)
    return sides, missing


def _drawn(net: Any) -> Loop:
    return lambda z: _levels(METHOD.sample(net, z) / 2 + 0.5)


def _levels(x: Tensor) -> Tensor:
    """Bring images in [0, 1] into the form in which images are kept."""
    return (255 * x).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu()


@torch.no_grad()
def _run(draw: Loop, z: Tensor, _: None) -> Tensor:
    return draw(z)
