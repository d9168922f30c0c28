"""The straight path between data and noise, and the steps that follow it."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.predictions import (
    AbstractPrediction,
    LearnedVariance,
    Rescaled,
    as_prediction,
)
from ds.diffusion.schedules import AbstractSchedule, Linear
from ds.pairs.sources import Batch

PATH = Linear()


def point(batch: Batch, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) * x0 + t * noise of every row, at times t [N]."""
    alpha, sigma = PATH.gather(t, batch.x0)
    return alpha * batch.x0 + sigma * batch.noise


def rowwise(values: Tensor, x: Tensor) -> Tensor:
    """Return values [N] in the shape that goes with x [N, *shape]."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def on_path(denoiser: Denoiser, path: AbstractSchedule = PATH) -> AbstractPrediction:
    """Return what a denoiser of any schedule predicts, as a network on the straight path.

    Or on another: EDM's, or TrigFlow's.
    """
    prediction = as_prediction(denoiser.prediction)
    if isinstance(prediction, LearnedVariance):  # whose student has the first half of the channels
        prediction = prediction.prediction
    if denoiser.schedule == path or isinstance(prediction, Rescaled):
        return prediction
    return Rescaled(denoiser.schedule, prediction)


def velocity(
    net: nn.Module,
    predicts: AbstractPrediction | float,
    x: Tensor,
    t: Tensor,
    cond: dict[str, Tensor],
) -> Tensor:
    """Return the velocity eps - x0 that a network sees in x [N, *shape] at times t [N].

    `predicts` is what it predicts, or, for the velocity itself, the factor of the times it is told.
    """
    if isinstance(predicts, AbstractPrediction):
        x0, eps = Denoiser(net, PATH, predicts, cond)(x, t)
        return eps - x0
    return net(x, (predicts * t).to(x.dtype), **cond)


def errors(
    net: nn.Module, predicts: AbstractPrediction | float, batch: Batch, times: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the error of the velocity noise - x0, the image it leads to, and t, at times [N].

    Errors and images have the shape of x0, and t that of one number a row, [N, 1, ...]. `predicts`
    is that of `velocity`.
    """
    x, (_, t) = point(batch, times), PATH.gather(times, batch.x0)
    v = velocity(net, predicts, x, times, batch.cond)
    return v - (batch.noise - batch.x0), x - t * v, t


def jumps(u: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, grid: Grid) -> Tensor:
    """Follow average velocities u(x, t [N], h [N]), from t to t - h, from noise to the data."""
    x = z
    for t, r in pairwise((*grid, PATH.data)):
        now, h = (x.new_full((x.shape[0],), value) for value in (t, t - r))
        x = x - (t - r) * u(x, now, h)
    return x


@torch.no_grad()
def straightness(denoiser: Denoiser, z: Tensor, steps: int = 50) -> float:
    """Return how far paths from noise z [N, *shape] are from straight ones, which have 0.

    The figure is the integral over the time of the mean of |(noise - end) - velocity|**2, along the
    denoiser's own paths, in `steps` Euler steps. Liu et al. 2022, arXiv:2209.03003, Eq. 8.
    """
    x, mean, spread = z, torch.zeros_like(z), torch.zeros_like(z)
    for k, (t, s) in enumerate(pairwise((*grids.uniform(steps, PATH), PATH.data)), 1):
        x0, eps = denoiser(x, t)
        v = eps - x0
        x = x + (s - t) * v
        # The mean velocity is noise - end. Running sums of squared distances to it lose no digits.
        off = v - mean
        mean = mean + off / k
        spread = spread + off * (v - mean)
    return float(spread.flatten(1).sum(1).mean() / steps)
