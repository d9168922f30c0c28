"""The straight path between data and noise, and the steps that follow it."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ds.diffusion.grids import Grid
from ds.diffusion.schedules import Linear
from ds.pairs.sources import Batch

PATH = Linear()


def point(batch: Batch, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) * x0 + t * noise of every row, at times t [N]."""
    alpha, sigma = PATH.gather(t, batch.x0)
    return alpha * batch.x0 + sigma * batch.noise


def jumps(u: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, grid: Grid) -> Tensor:
    """Follow average velocities u(x, t [N], h [N]), from t to t - h, from noise to the data."""
    x = z
    for t, r in pairwise((*grid, PATH.data)):
        now, h = (x.new_full((len(x),), value) for value in (t, t - r))
        x = x - (t - r) * u(x, now, h)
    return x
