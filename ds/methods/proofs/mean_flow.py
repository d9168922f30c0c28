"""The proof of MeanFlow."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds.analytic import Gaussian
from ds.methods.proof import NOISE, NORMAL, STDS, Check, Formula, exact

NO_CLASS = Gaussian(0.3, STDS.flip(0), (3,))  # in the place of data without a class


def u(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """Return the average velocity of normal data from t back to t - h, [N] each."""
    return (x - NORMAL.flow(x, _levels(t), _levels(t - h))) / h[:, None]


def v(x: Tensor, t: Tensor, h: Tensor | None = None) -> Tensor:
    """Return the velocity of normal data."""
    return (x - NORMAL.x0(x, *_levels(t))) / t[:, None]


def steps() -> tuple[Tensor, Tensor, Tensor]:
    """Return points, times t and steps h, [N] each, on which u is held to its target."""
    even = torch.linspace(0, 1, len(NOISE), dtype=torch.float64, device="cpu")
    t = 0.2 + 0.75 * even
    return NOISE, t, t * (0.1 + 0.8 * even.roll(11))


def _levels(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - t[:, None], t[:, None]


def identity(method: Any) -> tuple[Check, ...]:
    """With the average velocity of normal data, u is its own target, and samples are exact."""
    method = replace(method, derivative="exact")
    x, t, h = steps()

    def error(net: Callable[..., Tensor]) -> Tensor:
        return method.error(Formula(net), x, v(x, t), t, h, {})

    end = NORMAL.endpoint(x, 0, 1)
    own = exact(
        "u minus its target",
        error(u),
        sign_of_derivative_flipped=2 * (u(x, t, h) - v(x, t)) - error(u),
        time_derivative_dropped=error(lambda y, *_, **__: u(y, t, h)),
        state_derivative_dropped=error(lambda _, s, h: u(x, s, h)),
    )
    samples = (
        exact(
            f"end of {nfe} steps",
            method.sample(Formula(u), x, nfe=nfe) - end,
            velocity_alone=method.sample(Formula(v), x, nfe=nfe) - end,
        )
        for nfe in (1, 3)
    )
    return own, *samples, guided(method)


def guided(method: Any) -> Check:
    """With the average velocity of guidance between normal data, u is its own target too.

    Both data have one mean, so the guided velocity is linear, and it widens by powers of both.
    """
    scale = 2.5
    method = replace(method, guidance=scale, kappa=0.3)

    def velocity(x: Tensor, t: Tensor, data: Gaussian) -> Tensor:
        return (x - data.x0(x, *_levels(t))) / t[:, None]

    def widening(data: Gaussian, t: Tensor, r: Tensor) -> Tensor:
        variance = [(a * data.std) ** 2 + s**2 for a, s in map(_levels, (r, t))]
        return (variance[0] / variance[1]).sqrt()

    def average(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        asked, free = (widening(data, t, t - h) for data in (NORMAL, NO_CLASS))
        away = x - (1 - t[:, None]) * NORMAL.mean
        end = _levels(t - h)[0] * NORMAL.mean + asked**scale * free ** (1 - scale) * away
        return (x - end) / h[:, None]

    def error(wanted: Tensor) -> Tensor:
        return method.error(Formula(average), x, wanted, t, h, {})

    x, t, h = steps()
    asked, free = (velocity(x, t, data) for data in (NORMAL, NO_CLASS))
    now = scale * asked + (1 - scale) * free
    return exact(
        "u minus its target, guided",
        error(method.toward(asked, now, free)),
        guidance_left_out=error(asked),
        guidance_of_the_network_left_out=error(method.toward(asked, asked, free)),
        no_class_left_out=error(method.toward(asked, now, 0 * free)),
    )
