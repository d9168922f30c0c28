"""The straight path between data and noise, and the steps that follow it."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ds.diffusion import grids
from ds.diffusion.grids import Grid
from ds.diffusion.schedules import Linear
from ds.pairs.sources import Batch

PATH = Linear()


def point(batch: Batch, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) * x0 + t * noise of every row, at times t [N]."""
    alpha, sigma = PATH.gather(t, batch.x0)
    return alpha * batch.x0 + sigma * batch.noise


def rowwise(values: Tensor, x: Tensor) -> Tensor:
    """Return values [N] in the shape that goes with x [N, *shape]."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def jumps(u: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, grid: Grid) -> Tensor:
    """Follow average velocities u(x, t [N], h [N]), from t to t - h, from noise to the data."""
    x = z
    for t, r in pairwise((*grid, PATH.data)):
        now, h = (x.new_full((x.shape[0],), value) for value in (t, t - r))
        x = x - (t - r) * u(x, now, h)
    return x


@torch.no_grad()
def straightness(velocity: Callable[[Tensor, float], Tensor], z: Tensor, steps: int = 50) -> float:
    """Return how far paths from noise z [N, *shape] are from straight ones, which have 0.

    velocity(x, t) is that of the flow at time t. The figure is the integral over the time of the
    mean of |(noise - end) - velocity|**2, along the flow's own paths, in `steps` Euler steps. Liu
    et al. 2022, arXiv:2209.03003, Eq. 8.
    """
    x, mean, spread = z, torch.zeros_like(z), torch.zeros_like(z)
    for k, (t, s) in enumerate(pairwise((*grids.uniform(steps, PATH), PATH.data)), 1):
        v = velocity(x, t)
        x = x + (s - t) * v
        # The mean velocity is noise - end. Running sums of squared distances to it lose no digits.
        off = v - mean
        mean = mean + off / k
        spread = spread + off * (v - mean)
    return float(spread.flatten(1).sum(1).mean() / steps)
