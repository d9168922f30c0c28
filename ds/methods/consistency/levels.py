"""Noise levels of EDM's path, and what a consistency function says at two of them."""

from typing import Literal

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import EDM
from ds.diffusion.solvers import Clipped, Renoise, integrate
from ds.methods import losses
from ds.methods.base import student_net
from ds.methods.flow.path import rowwise
from ds.methods.networks import SharedDropout
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.pairs.sources import Batch
from ds.system.config import Count, require

RHO = 7.0


def karras(i: Tensor, count: Tensor | int, least: float, most: float) -> Tensor:
    """Return level i [N] of `count`, float64 [N]: from `most` for i = 0 to `least` for the last.

    The last is `least` to the bit, where a consistency function returns its input. Karras et al.
    2022, arXiv:2206.00364, Eq. 5.
    """
    start, end = most ** (1 / RHO), least ** (1 / RHO)
    level = (start + i.double() / (count - 1) * (end - start)) ** RHO
    return torch.where(i == count - 1, least, level.clamp(max=most))


def start(teacher: Teacher, config: AbstractNetConfig | None, noise_scale: float) -> nn.Module:
    """Return the network to train, as `student_net` does. It is told noise_scale * log(sigma).

    Raises ValueError for a copy of a network that knows another multiple of it.
    """
    known = getattr(teacher.denoiser.prediction, "noise_scale", noise_scale)
    if config is None and known != noise_scale:
        raise ValueError(
            f"the teacher's network is told {known:g} * log(sigma), its copy would be told "
            f"{noise_scale:g} * log(sigma); set noise_scale to {known:g}, or name a student"
        )
    return student_net(teacher, config)


def index(sigma: Tensor, count: Tensor | int, least: float, most: float) -> Tensor:
    """Return the i of which sigma [N] lies between levels i and i + 1 of `karras`, int64 [N]."""
    start, end = most ** (1 / RHO), least ** (1 / RHO)
    i = (sigma ** (1 / RHO) - start) / (end - start) * (count - 1)
    return i.floor().clamp(min=0).clamp(max=count - 2).long()


def noisy(batch: Batch, sigma: Tensor) -> Tensor:
    """Return x0 + sigma * noise of every row, at noise levels sigma [N]."""
    return batch.x0 + rowwise(sigma, batch.x0).to(batch.x0) * batch.noise


def ends(
    student: Denoiser, x: Tensor, t: Tensor, target: Denoiser, nearer: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the student's x0 of x [N, *shape] at t [N], and the target's of `nearer` at s [N].

    The target has no gradient, and the dropout of the student.
    """
    dropout = SharedDropout(student.net, target.net, device=x.device)
    with dropout:
        f = student(x, t).x0
    with dropout, torch.no_grad():
        return f, target(nearer, s).x0


def disagreement(
    student: Denoiser, x: Tensor, t: Tensor, target: Denoiser, nearer: Tensor, s: Tensor
) -> Tensor:
    """Return the difference of `ends`."""
    f, wanted = ends(student, x, t, target, nearer, s)
    return f - wanted


def distance(
    a: Tensor,
    b: Tensor,
    kind: Literal["l1", "l2", "huber"],
    width: float,
    lpips: nn.Module | None = None,
) -> Tensor:
    """Return the mean distance of images a and b: LPIPS if there is one, else that of a kind.

    The Huber loss of a row has `width` times the root of its elements.
    """
    if lpips is not None:
        return lpips(a, b).mean()
    if kind == "huber":
        return losses.pseudo_huber(a - b, width * a[0].numel() ** 0.5).mean()
    return losses.mean(a - b, kind)


def visited(nfe: int, indices: tuple[int, ...], count: int, least: float, most: float) -> Grid:
    """Return the noise levels at which a sample of `nfe` calls calls the network.

    They are those of `indices` among `count` levels if there are so many, else evenly spaced.
    Raises ValueError unless nfe is at least 1.
    """
    require("sample", Count, nfe=nfe)
    given = nfe == len(indices)
    levels = grids.karras(count if given else nfe + 1, EDM(most), top=most, bottom=least)
    return tuple(levels[i] for i in (indices if given else range(nfe)))


def check_levels(
    name: str, indices: tuple[int, ...], count: int, least: float, most: float
) -> None:
    """Raise ValueError, with the name of a method, for levels that do not fit each other."""
    if least >= most:
        raise ValueError(f"{name}: sigma_min ({least}) must be below sigma_max ({most})")
    if indices and (indices[0] or [*indices] != sorted({*indices}) or indices[-1] >= count - 1):
        raise ValueError(
            f"{name}: indices must rise from 0 to at most {count - 2}, the last level above "
            f"sigma_min, not {', '.join(map(str, indices))}"
        )


def sampled(
    f: Denoiser, grid: Grid, z: Tensor, draws: Draws | None, *, floor: float, clip: bool = False
) -> Tensor:
    """Sample a consistency function by turns of denoising and fresh noise, from noise z.

    Its x0 has the noise level `floor`, and is clipped to [-1, 1] if `clip`. Song et al. 2023,
    arXiv:2303.01469, Algorithm 1.
    """
    solver = Clipped(Renoise(floor)) if clip else Renoise(floor)
    return integrate(f, solver, grid, f.schedule.prior(z), draws=draws)
