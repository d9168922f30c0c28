"""Distribution matching: a teacher and a critic judge what a student draws, on TrigFlow's arc.

Two denoisers of x_t say what KL(student, data) has for a gradient: the teacher's is of the data,
the critic's of the student's samples. Yin et al. 2024, arXiv:2311.18828, section 3.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.predictions import Estimate, TrigFlow
from ds.diffusion.schedules import Trig
from ds.methods import losses, times
from ds.methods.flow.path import rowwise
from ds.pairs.sources import Batch

# Streams of random numbers: of the number of calls that draw a sample, its first noise, and the
# time and noise at each further call, to which the number of the call is added; of the time and
# the noise at which samples are judged.
_CALLS, _START = 0x2D81F60B7C93A54E, 0x5A3E94C7D0B1682F
_AGAIN, _FRESH = 0x61C70E2BA94F5D38, 0x1F94B8D36E07C2A5
_JUDGED, _NOISE = 0x4B6EA0D9257FC813, 0x7305CD1E48A9B6F2

Levels = tuple[float, float]  # mean and standard deviation of the logarithm of a noise level


def level(batch: Batch, path: Trig, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return the time, float64 [N], and the noise [N, *shape] at which samples are judged."""
    noise = batch.draws.normal(_NOISE, batch.x0.shape[1:]).to(batch.x0)
    return path.times_of(times.log_normal(batch.draws, _JUDGED, *levels)), noise


def drawn(f: Denoiser, batch: Batch, most: int, levels: Levels) -> Tensor:
    """Return samples [N, *shape] of a consistency function, by 1 to `most` calls, at random.

    Times fall from the noise: each is one of `levels`, or the last again where that is later. The
    rows draw numbers of calls of their own, so all take part in `most` calls. Only the last has a
    gradient.
    """
    path, draws, shape = f.schedule, batch.draws, batch.x0.shape[1:]
    x = path.prior(draws.normal(_START, shape).to(batch.x0))
    further = times.grid(draws, _CALLS, most)
    t = torch.full_like(further, path.noise, dtype=torch.float64)
    with torch.no_grad():
        for k in range(most - 1):
            s = path.times_of(times.log_normal(draws, _AGAIN + k, *levels)).minimum(t)
            alpha, sigma = path.gather(s, x)
            noisy = alpha * f(x, t).x0 + sigma * draws.normal(_FRESH + k, shape).to(x)
            x, t = noisy.where(rowwise(k < further, x), x), s.where(k < further, t)
    return f(x, t).x0


def criticism(critic: Denoiser, made: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return the critic's squared error of x0 / (sigma_data * sin(t)), the sum of each row, [N].

    That is its error of F, which is computed without a division. `made` [N, *shape] has no
    gradient.
    """
    alpha, sigma = critic.schedule.gather(t, made)
    target = TrigFlow(cast(Trig, critic.schedule).sigma_data).target
    seen = critic(alpha * made + sigma * eps, t)
    return losses.squares(target(*seen, alpha, sigma) - target(made, eps, alpha, sigma))


def moved(
    made: Tensor,
    t: Tensor,
    eps: Tensor,
    teacher: Callable[[Tensor, Tensor], Estimate],
    critic: Denoiser,
) -> Tensor:
    """Return a loss of samples `made` [N, *shape], judged at times t [N] with the noise eps: [N].

    Its gradient is twice (x0 of the critic - x0 of the teacher) / mean |made - x0 of the teacher|,
    at x_t. Yin et al. 2024, Eq. 7 and 8.
    """
    alpha, sigma = critic.schedule.gather(t, made)
    with torch.no_grad():
        x = alpha * made + sigma * eps
        likely, own = teacher(x, t).x0, critic(x, t).x0
        size = (made - likely).abs().flatten(1).mean(1).clamp(min=1e-5)
        push = (own - likely) / rowwise(size, made)
    return losses.squares(made - (made - push).detach())
