"""The proof of PosteriorMeanFlow."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds.analytic import Gaussian, GaussianMixture
from ds.diffusion.noise import noise
from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact

HALF_WAY, POINTS = 0.5, 16  # an outer time, and how many x_t are looked at then


def identity(method: Any) -> tuple[Check, ...]:
    """With the flow of the exact posterior, u is its own target, and samples have exact moments."""
    y, even = NOISE, torch.linspace(0, 1, len(NOISE), dtype=torch.float64, device="cpu")
    s = 0.2 + 0.75 * even
    h, cond = s * (0.1 + 0.8 * even.roll(11)), method.told(NOISE.flip(0), 0.1 + 0.8 * even.roll(5))
    v = (y - _posterior(**cond).x0(y, *_level(s))) / s[:, None]

    def error(net: Callable[..., Tensor]) -> Tensor:
        return method.flow.error(Formula(net), y, v, s, h, cond)

    def context_moves(x: Tensor, s: Tensor, h: Tensor, outer: Tensor, context: Tensor) -> Tensor:
        return _u(x, s, h, outer, context + x - y)

    def context_of_another(*at: Tensor, outer: Tensor, context: Tensor, **h: Tensor) -> Tensor:
        return _u(*at, **h, outer=outer, context=context.roll(1, 0))

    own = exact(
        "u minus its target",
        error(_u),
        sign_of_derivative_flipped=2 * (_u(y, s, h, **cond) - v) - error(_u),
        time_derivative_dropped=error(lambda x, *_, **told: _u(x, s, **{**told, "h": h})),
        context_moves_with_y=error(context_moves),
        context_of_another=error(context_of_another),
    )
    return own, *(_moments(method, nfe) for nfe in (1, method.inner, 4 * method.inner))


def _moments(method: Any, nfe: int) -> Check:
    """Check the mean and the standard deviation of samples: of normal data, those of the data."""

    def mean_alone(y: Tensor, s: Tensor, h: Tensor, outer: Tensor, context: Tensor) -> Tensor:
        return (y - _posterior(outer, context).mean) / s[:, None]

    def miss(net: Callable[..., Tensor], *, again: bool = False) -> Tensor:
        mean, std = _found(method, net, nfe, again=again)
        return torch.cat([mean - NORMAL.mean, std - NORMAL.std])

    wrong = {"mean_in_place_of_a_draw": miss(mean_alone)}
    if nfe > method.inner:
        wrong["the_same_noise_in_every_step"] = miss(_u, again=True)
    return exact(f"mean and deviation, {nfe} call{'s' * (nfe > 1)}", miss(_u), **wrong)


def _found(
    method: Any, net: Callable[..., Tensor], nfe: int, *, again: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of samples, [3] each.

    A sample is linear in the noises, each of which is 1 in a row of its own.
    """
    rows = torch.eye(2 * nfe + 2, dtype=torch.float64, device="cpu")[:, :, None].expand(-1, -1, 3)
    noises: Iterator[Tensor] = iter(rows[:, 1:].unbind(1))

    class Unit:
        def normal(self, stream: int, shape: Iterable[int]) -> Tensor:
            return rows[:, 1] if again else next(noises)

    z = next(noises)
    draws: Any = Unit()
    samples = method.sample(Formula(net), z, nfe=nfe, draws=draws)
    mean = samples[0]
    return mean, (samples - mean).square().sum(0).sqrt()


def _level(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - t[:, None], t[:, None]


def _posterior(outer: Tensor, context: Tensor) -> Gaussian:
    """Return p(x0 | x_t) of normal data for what a network is told: t and (1 - t) * x_t."""
    alpha, sigma = _level(outer)
    return NORMAL.posterior((context / alpha).where(alpha > 0, 0.0), alpha, sigma)


def _u(y: Tensor, s: Tensor, h: Tensor, outer: Tensor, context: Tensor) -> Tensor:
    """Return the exact average velocity of the inner flow from time s to s - h."""
    end = _posterior(outer, context).flow(y, _level(s), _level(s - h))
    return (y - end) / h[:, None]


def without_h(net: nn.Module) -> nn.Module:
    """Return a network whose average velocities are those of steps of no length."""
    return Formula(lambda y, s, h, **told: net(y, s, h=0 * h, **told))


def measure(method: Any, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
    """Check draws from p(x0 | x_t) against the exact posterior, in the mean over x_t half-way."""
    data, alpha = GaussianMixture(), 1 - HALF_WAY
    clean, e = data.sample(0, range(POINTS)), noise(1, range(POINTS), data.shape)
    points = (alpha * clean + HALF_WAY * e).to(z)
    truths = [data.posterior(x, alpha, HALF_WAY) for x in points]

    def figures(net: nn.Module, z: Tensor) -> tuple[float, float]:
        """Return the relative error of the trace, and the largest error of a mode's share."""
        variance, missed = 0.0, 0.0
        for x, truth in zip(points, truths, strict=True):
            drawn = method.draw(net, x.expand(z.shape), HALF_WAY, z, method.inner, {})
            variance += float(drawn.var(0).sum())
            nearest = torch.cdist(drawn, truth.centres(z)).argmin(1)
            share = torch.bincount(nearest, minlength=len(truth.weights)) / len(z)
            missed += float((share - share.new_tensor(truth.weights)).abs().max())
        wanted = sum(truth.total_variance for truth in truths)
        return abs(variance / wanted - 1), missed / POINTS

    def without_context(y: Tensor, s: Tensor, **told: Tensor) -> Tensor:
        return net(y, s, **{**told, **method.told(0 * y, torch.ones_like(s))})

    wrong = {
        "inner noise fixed": figures(net, z[:1].expand(z.shape)),
        "x_t ignored": figures(Formula(without_context), z),
    }
    names = "trace of the posterior's covariance", "share of a mode in the posterior"
    return tuple(
        Check(name, value, 0.05, {k: v[i] for k, v in wrong.items()})
        for i, (name, value) in enumerate(zip(names, figures(net, z), strict=True))
    )
