"""The proof of SimplifiedConsistencyModel."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds.diffusion.predictions import Preconditioned, TrigFlow
from ds.diffusion.schedules import EDM
from ds.diffusion.solvers import DDIM
from ds.methods.networks import Frozen
from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact


def angles() -> Tensor:
    """Return times from near the data to near the noise, float64 [N], on which g is looked at."""
    return torch.linspace(0.05, 1.55, len(NOISE), dtype=torch.float64, device="cpu")


def velocity(method: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return F of the map from every point to the end of the flow of normal data."""
    data = method.sigma_data

    def F(u: Tensor, t: Tensor) -> Tensor:
        cos, sin = t.cos()[:, None], t.sin()[:, None]
        x = data * u
        return (cos * x - NORMAL.flow(x, (cos, data * sin), (1, 0))) / (data * sin)

    return F


def identity(method: Any) -> tuple[Check, ...]:
    """With the map to the flow's end, g is 0 on the flow of a teacher, and in the mean on data."""
    method = replace(method, prediction=None, converted=False, derivative="exact")
    return _teacher(method), _data(method), _samples(method), _converted(method)


def g(method: Any, net: Any, slope: Tensor, ramp: float = 1.0, *, x: Tensor = NOISE) -> Tensor:
    """Return g of a formula at NOISE, where dx/dt is `slope`."""
    t = angles()
    F, dF = method.velocity(Formula(net), x, t, slope, {})
    return method.tangent(F, dF, x, t, slope, torch.full_like(t, ramp))


def slope(method: Any) -> Tensor:
    """Return dx/dt of normal data at NOISE, as a teacher of another path tells it."""
    teacher = NORMAL.teacher(DDIM(), (80.0,), EDM(), Preconditioned(0.7))
    frozen, t = Frozen(teacher.denoiser, method.path), angles()
    return method.slope(*frozen(NOISE, t, {}), t)


def _teacher(method: Any) -> Check:
    F, v, t = velocity(method), slope(method), angles()
    right, half = g(method, F, v), g(method, F, v, 0.0)
    rest = (t.cos() * t.sin())[:, None] * NOISE
    return exact(
        "g on the flow of a teacher",
        right,
        tangent_of_x_flipped=g(method, lambda u, s: F(2 * NOISE / method.sigma_data - u, s), v),
        time_tangent_dropped=g(method, lambda u, _: F(u, t), v),
        sign_of_the_derivative_flipped=right + 2 * (half - right - rest),
        flow_backwards=g(method, F, -v),
    )


def _data(method: Any) -> Check:
    """The mean over the two rows, x0 on either side of its mean, that lead to one x."""
    F, t = velocity(method), angles()
    cos, sin = t.cos()[:, None], method.sigma_data * t.sin()[:, None]
    given = NORMAL.posterior(NOISE, cos, sin)

    def one(side: float) -> Tensor:
        x0 = given.mean + side * given.std
        return g(method, F, method.slope(x0, (NOISE - cos * x0) / sin, t))

    mean = (one(1.0) + one(-1.0)) / 2
    return exact("mean g on data and noise", mean, one_row_alone=one(1.0))


def _samples(method: Any) -> Check:
    (first,) = method.visited(1)
    cos, sin = method.path.at(first)
    x, found = sin * NOISE, method.sample(Formula(velocity(method)), NOISE)
    end = NORMAL.flow(x, (cos, sin), (1, 0))
    return exact("end of 1 call", found - end, x0_of_teacher=NORMAL.x0(x, cos, sin) - end)


def _converted(method: Any) -> Check:
    """A converted EDM teacher begins with F of its own flow."""
    teacher = NORMAL.teacher(DDIM(), (80.0,), EDM(), Preconditioned(0.7))
    t, method = angles(), replace(method, converted=True).on(teacher)
    F, _ = method.velocity(teacher.net, NOISE, t, slope(method), {})
    own = slope(method) / method.sigma_data
    plain = replace(method, converted=False, prediction=TrigFlow(method.sigma_data))
    wrong, _ = plain.velocity(teacher.net, NOISE, t, slope(method), {})
    return exact("F of a converted EDM", F - own, not_converted=wrong - own)
