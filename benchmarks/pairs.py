"""The pair factory: from indices to a store on the disk that is hashed and can be resumed.

The CIFAR-10 network with random weights and the last times of a grid of 20, in float32. The peer is
what one writes with diffusers: the loop of DDIMPipeline in channels_last, its conversion to uint8,
numpy.save. Ours also estimates how long it will take, from a few network calls; among a million
pairs that is nothing, here it counts.
"""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Side
from benchmarks.network import about, exact_levels, random_cifar10
from benchmarks.peers import Loop, ddim_loop, diffusers_twin
from ds.denoiser import Denoiser
from ds.pairs import generate_pairs
from ds.philox import noise
from ds.sample import Teacher
from ds.schedule import LinearBeta
from ds.solvers import DDIM

GRID = (150, 100, 50, 0)


def cases(device: torch.device, *, quick: bool) -> Iterator[Case]:
    """Yield the case."""
    batch = 256 if device.type == "cuda" else 4
    count = 4 * batch
    net = random_cifar10(device, quick=quick)
    teacher = Teacher(Denoiser(net, LinearBeta()), DDIM(), GRID)
    sides, missing = {}, {}
    try:
        twin = diffusers_twin(net).to(device, memory_format=torch.channels_last)
        loop = ddim_loop(twin, GRID, 50)
        sides["diffusers"] = Side(functools.partial(_pipeline, loop, count, batch, device), _folder)
    except ImportError as error:
        missing["diffusers"] = str(error)
    sides["ours"] = Side(functools.partial(_ours, teacher, count, batch), _folder)
    yield Case(
        f"{count} pairs, {len(GRID)} calls each, {about(net, batch)}", sides,
        functools.partial(_exact, teacher, count), images=count, missing=missing,
    )  # fmt: skip


def _folder() -> Path:
    return Path(tempfile.mkdtemp())


def _pipeline(loop: Loop, count: int, batch: int, device: torch.device, folder: Path) -> Tensor:
    rows = []
    for start in range(0, count, batch):
        z = noise(0, range(start, start + batch), (3, 32, 32)).to(device)
        x = (loop(z) / 2 + 0.5).clamp(0, 1)
        rows.append((255 * x.cpu().permute(0, 2, 3, 1).numpy()).round().astype(np.uint8))
    np.save(folder / "images.npy", np.concatenate(rows))
    images = torch.from_numpy(np.load(folder / "images.npy"))
    shutil.rmtree(folder)
    return images


def _ours(teacher: Teacher, count: int, batch: int, folder: Path) -> Tensor:
    store = generate_pairs(teacher, folder, count, batch_size=batch)
    images = store.images(range(count))
    shutil.rmtree(folder)
    return images


def _exact(teacher: Teacher, count: int) -> Tensor:
    z = noise(0, range(count), teacher.shape, device=teacher.net.conv_in.weight.device)
    return exact_levels(teacher.net, lambda _, z: teacher.sample(z), z)
