"""Noise levels of EDM's path, and what a consistency function says at two of them."""

import torch
from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.methods.flow.path import rowwise
from ds.methods.networks import SharedDropout
from ds.pairs.sources import Batch

RHO = 7.0


def karras(i: Tensor, count: Tensor | int, least: float, most: float) -> Tensor:
    """Return level i [N] of `count`, float64 [N]: from `most` for i = 0 to `least` for the last.

    Karras et al. 2022, arXiv:2206.00364, Eq. 5.
    """
    start, end = most ** (1 / RHO), least ** (1 / RHO)
    return ((start + i.double() / (count - 1) * (end - start)) ** RHO).clamp(least, most)


def noisy(batch: Batch, sigma: Tensor) -> Tensor:
    """Return x0 + sigma * noise of every row, at noise levels sigma [N]."""
    return batch.x0 + rowwise(sigma, batch.x0).to(batch.x0) * batch.noise


def disagreement(
    student: Denoiser, x: Tensor, t: Tensor, target: Denoiser, nearer: Tensor, s: Tensor
) -> Tensor:
    """Return the student's x0 of x [N, *shape] at t [N], minus the target's of `nearer` at s [N].

    The target has no gradient, and the dropout of the student.
    """
    dropout = SharedDropout(student.net, target.net, device=x.device)
    with dropout:
        f = student(x, t).x0
    with dropout, torch.no_grad():
        wanted = target(nearer, s).x0
    return f - wanted
