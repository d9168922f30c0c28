"""The proof of EasyConsistencyTuning."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds.diffusion.noise import Draws
from ds.diffusion.predictions import AbstractPrediction, Eps, Preconditioned, Velocity
from ds.diffusion.schedules import EDM, AbstractSchedule, Linear, LinearBeta
from ds.diffusion.solvers import DDIM
from ds.methods.base import Progress
from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact, normal_pairs
from ds.pairs.sources import Batch

Function = Callable[[Tensor, Tensor], Tensor]  # x0 of x [N, 3] at levels sigma [N, 1]


def identity(method: Any) -> tuple[Check, ...]:
    """The exact map is its own target: where pairs are straight, and to first order on data."""
    plain = {"prediction": None, "student": None, "truncate": 0.0, "second": False}
    method = replace(method, **plain, ratio=2.0, most=1 - 1e-9)
    teachers = (EDM(1000.0), Preconditioned(1.0)), (Linear(), Velocity()), (LinearBeta(), Eps())
    begins = (_begins(method, *teacher) for teacher in teachers)
    return *_straight(method), _order(method), _denoises(method), _end(method), *begins


def _net(method: Any, *functions: Function) -> nn.Module:
    """Return a network with which the denoiser's x0 is a function's, that of each call in turn."""
    predicts, left = method.denoiser(nn.Identity()).prediction, list(functions)

    def call(x: Tensor, told: Tensor) -> Tensor:
        sigma = (told / predicts.noise_scale).exp()[:, None]
        x = x * (sigma**2 + predicts.sigma_data**2).sqrt()
        x0 = (left.pop(0) if len(left) > 1 else left[0])(x, sigma)
        return predicts.target(x0, (x - x0) / sigma, torch.ones_like(sigma), sigma)

    return Formula(call)


def _posterior(x: Tensor, sigma: Tensor) -> Tensor:
    return NORMAL.x0(x, 1, sigma)


def _straight(method: Any) -> Iterator[Check]:
    """Yield checks that the error vanishes where the noise of an image is known from it.

    The figure is the error over the share of the level that its step takes, 1 - r / t.
    """

    def straight(x: Tensor, sigma: Tensor) -> Tensor:
        return NORMAL.mean + NORMAL.std * (x - NORMAL.mean) / (NORMAL.std + sigma)

    pairs = normal_pairs()
    shuffled = pairs._replace(noise=pairs.noise.roll(1, 0))
    t = torch.logspace(-2, 1.8, len(NOISE), dtype=torch.float64, device="cpu")

    def error(*functions: Function, batch: Batch = pairs) -> Tensor:
        modules = {"student": _net(method, *functions)}
        return method.error(modules, batch, t, r) * (t / (t - r))[:, None]

    for stage in (-1, 0, 3, 7):
        r, other = (method.lower(t, k)[:, None] for k in (stage, stage + 1))
        r = r[:, 0]
        wrong = {
            "pairs_shuffled": error(straight, batch=shuffled),
            "x0_of_a_denoiser": error(_posterior),
        }
        if stage >= 0:
            wrong["r_of_the_next_stage"] = error(straight, lambda x, _: straight(x, other))  # noqa: B023
            flipped = lambda x, s: straight(2 * pairs.x0 - x, s)  # noqa: E731
            wrong["noise_of_the_target_flipped"] = error(straight, flipped)
        yield exact(f"error on straight pairs, stage {stage}", error(straight), **wrong)


def _order(method: Any) -> Check:
    """Check the power of the step with which the mean error falls, given x_t.

    For normal data it is linear in x_t. Four rows with data and noise at plus and minus one
    deviation have the moments of all.
    """
    rows = _corners(len(NOISE))
    t = torch.logspace(-1.5, 1.0, len(NOISE), dtype=torch.float64, device="cpu")
    t = t.repeat_interleave(4)

    def power(first: Function, target: Function | None = None) -> float:
        sizes = []
        for stage in (10, 11):
            net = _net(method, first, target or first)
            error = method.error({"student": net}, rows, t, method.lower(t, stage))
            along = error * (rows.x0 - NORMAL.mean + t[:, None] * rows.noise)
            sizes.append(along.unflatten(0, (-1, 4)).mean(1).norm())
        return math.log2(sizes[0] / sizes[1])

    def end(x: Tensor, sigma: Tensor) -> Tensor:
        return NORMAL.flow(x, (1, sigma), (1, 0))

    def flipped(x: Tensor, sigma: Tensor) -> Tensor:
        return end(x - 2 * sigma * rows.noise, sigma)

    controls = {
        "x0 of a denoiser": power(_posterior),
        "level of the target 1 % off": power(end, lambda x, sigma: end(x, 1.01 * sigma)),
        "noise of the target flipped": power(end, flipped),
    }
    return Check("order of the mean error", power(end), 1.9, controls, 2.0, miss=1.5, at_least=True)


def _corners(count: int) -> Batch:
    """Return `count` times the four rows of data and noise at plus and minus one deviation."""
    one = torch.tensor(
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64, device="cpu"
    )
    a, b = (one.repeat(count, 1)[:, i, None].expand(-1, 3) for i in (0, 1))
    index = torch.arange(count, dtype=torch.int64, device="cpu").repeat_interleave(4)
    return Batch(NORMAL.mean + NORMAL.std * a, b, index, Draws(0, index))


def _denoises(method: Any) -> Check:
    """Check that in a stage of r = 0 the best denoiser has no slope of the squared loss."""
    method = replace(method, ratio=1.0, loss_type="squared")
    rows = _corners(16)

    def slope(gain: float = 1.0, late: float = 1.0) -> Tensor:
        off = torch.zeros(2, 3, dtype=torch.float64, device="cpu", requires_grad=True)

        def near(x: Tensor, sigma: Tensor) -> Tensor:
            size = sigma / (sigma**2 + method.sigma_data**2).sqrt()  # of the network's part
            return gain * _posterior(x, late * sigma) + size * (off[0] * x + off[1])

        loss = method.loss({"student": _net(method, near)}, rows, Progress(0, 1))
        return torch.autograd.grad(loss, off)[0]

    return exact(
        "slope of the loss where r = 0",
        slope(),
        x0_too_small=slope(0.9),
        level_told_too_large=slope(late=1.1),
    )


def _end(method: Any) -> Check:
    """Check that a call of the exact map takes noise to where the ODE ends."""

    def end(x: Tensor, sigma: Tensor) -> Tensor:
        return NORMAL.flow(x, (1, sigma), (1, 0))

    wanted = end(EDM().noise * NOISE, NOISE.new_tensor(EDM().noise))
    return exact(
        "end of 1 call",
        method.sample(_net(method, end), NOISE) - wanted,
        x0_of_a_denoiser=method.sample(_net(method, _posterior), NOISE) - wanted,
    )


def _begins(method: Any, schedule: AbstractSchedule, prediction: AbstractPrediction) -> Check:
    """The student of a teacher of any path begins as the teacher's own denoiser."""
    teacher = NORMAL.teacher(DDIM(), (schedule.noise,), schedule, prediction)
    t = torch.logspace(-1.5, 1.5, len(NOISE), dtype=torch.float64, device="cpu")
    x = NOISE * t[:, None]
    begun = method.on(teacher).denoiser(teacher.net)(x, t).x0
    weights_alone, own = method.denoiser(teacher.net)(x, t).x0, _posterior(x, t[:, None])
    name = f"x0 of a converted {type(schedule).__name__}"
    return exact(name, begun - own, not_converted=weights_alone - own)
