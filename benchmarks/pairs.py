"""The pair factory: from indices to a store on the disk that is hashed and can be resumed.

The CIFAR-10 network with random weights and the last times of a grid of 20, in float32, on GPUs in
bfloat16. The peer is what one writes with diffusers: the loop of DDIMPipeline in channels_last, its
conversion to uint8, numpy.save. Ours also estimates how long it will take, from a few network
calls; among a million pairs that is nothing, here it counts.
"""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Side, Size, batch
from benchmarks.network import about, exact_levels, random_cifar10, twin
from benchmarks.peers import Loop, ddim_loop
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import noise
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM
from ds.models.execution import Execution, Precision
from ds.models.teacher import Teacher
from ds.pairs.generate import generate_pairs

GRID = (150, 100, 50, 0)
Shape = tuple[int, ...]


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield the case."""
    images = batch(device, size, gpu=256, cpu=4)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    count = images if size == "tiny" else 4 * images
    net = random_cifar10(device, size)
    teacher = Teacher(Denoiser(net, LinearBeta()), DDIM(), GRID)
    sides, missing = {}, {}
    try:
        loop = ddim_loop(twin(net, dtype, device), GRID, 50)
        pipeline = functools.partial(_pipeline, loop, count, images, teacher.shape, device)
        sides["diffusers"] = Side(pipeline, _folder)
    except ImportError as error:
        missing["diffusers"] = str(error)
    sides["ours"] = Side(functools.partial(_ours, teacher, count, images, str(dtype)[6:]), _folder)
    yield Case(
        f"{count} pairs, {len(GRID)} calls each, {about(net, images)}",
        sides,
        functools.partial(_exact, teacher, count),
        images=count,
        dtype=dtype,
        missing=missing,
    )


def _folder() -> Path:
    return Path(tempfile.mkdtemp())


def _pipeline(
    loop: Loop, count: int, batch: int, shape: Shape, device: torch.device, folder: Path
) -> Tensor:
    rows = []
    for start in range(0, count, batch):
        z = noise(0, range(start, start + batch), shape).to(device)
        x = (loop(z) / 2 + 0.5).clamp(0, 1)
        rows.append((255 * x.cpu().permute(0, 2, 3, 1).numpy()).round().astype(np.uint8))
    np.save(folder / "images.npy", np.concatenate(rows))
    images = torch.from_numpy(np.load(folder / "images.npy"))
    shutil.rmtree(folder)
    return images


def _ours(teacher: Teacher, count: int, batch: int, precision: Precision, folder: Path) -> Tensor:
    execution = Execution.default(teacher, precision=precision)
    store = generate_pairs(teacher, folder, count, batch_size=batch, execution=execution)
    images = store.images(range(count))
    shutil.rmtree(folder)
    return images


def _exact(teacher: Teacher, count: int) -> Tensor:
    z = noise(0, range(count), teacher.shape, device=teacher.net.conv_in.weight.device)
    return exact_levels(teacher.net, lambda _, z: teacher.sample(z), z)
