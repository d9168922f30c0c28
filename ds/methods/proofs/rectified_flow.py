"""The proof of RectifiedFlow."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds.diffusion.predictions import AbstractPrediction, Eps, Preconditioned
from ds.diffusion.schedules import EDM, AbstractSchedule, LinearBeta
from ds.diffusion.solvers import DDIM
from ds.methods.flow.path import on_path, straightness, velocity
from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact, normal_pairs


def measure(method: Any, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
    """Check, after reflow, how straight the paths are.

    A distilled network has its velocities at few times, so there is nothing to check.
    """
    if method.feeds == "images" or not method.reflow:
        return ()
    return (Check("straightness", straightness(method.denoiser(net), z), 0.002),)


def identity(method: Any) -> tuple[Check, ...]:
    """With straight paths from noise to the ODE's end, loss and any number of steps are exact.

    The control is the velocity of the data's own paths, before reflow. A converted teacher begins
    with exactly these.
    """
    return *_straight(method), *map(_converted, (EDM(), LinearBeta()), (Preconditioned(), Eps()))


def _straight(method: Any) -> Iterator[Check]:
    pairs = normal_pairs()
    end, z = pairs.x0, pairs.noise

    def straight(x: Tensor, told: Tensor) -> Tensor:
        t = told[:, None] / method.time_scale
        start = (x - (1 - t) * NORMAL.mean) / ((1 - t) * NORMAL.std + t)
        return start - NORMAL.endpoint(start, 0, 1)

    def bent(x: Tensor, told: Tensor) -> Tensor:
        return _own(x, told / method.time_scale)

    def backwards(x: Tensor, told: Tensor) -> Tensor:
        return straight(x, method.time_scale - told)

    right, wrong = Formula(straight), Formula(bent)
    shuffled = pairs._replace(x0=end.roll(1, 0))
    distilled = replace(method, feeds="pairs", reflow=0, distil=True, nfe=4)
    for name, stage in (("straight pairs", method), ("the secants of 4 steps", distilled)):
        yield exact(
            f"error on {name}",
            stage.errors(right, pairs)[0],
            pairs_shuffled=stage.errors(right, shuffled)[0],
            time_reversed=stage.errors(Formula(backwards), pairs)[0],
            without_reflow=stage.errors(wrong, pairs)[0],
        )
    for name, nfe in (("euler", 1), ("euler", 3), ("same_noise", 3)):
        sampling = replace(method, solver=name)
        yield exact(
            f"end of {nfe} steps" + ", same noise" * (name == "same_noise"),
            sampling.sample(right, z, nfe=nfe) - end,
            without_reflow=sampling.sample(wrong, z, nfe=nfe) - end,
        )


def _own(x: Tensor, t: Tensor) -> Tensor:
    """Return the velocity of the paths of normal data, at times t [N]."""
    t = t[:, None]
    return (x - NORMAL.x0(x, 1 - t, t)) / t


def _converted(schedule: AbstractSchedule, prediction: AbstractPrediction) -> Check:
    """The velocity of a teacher of another path, at init, is that of its data on the line.

    The ends of the line are beyond the noise levels of the teacher.
    """
    teacher = NORMAL.teacher(DDIM(), (schedule.noise,), schedule, prediction)
    t = torch.linspace(0.02, 0.98, len(NOISE), dtype=torch.float64, device="cpu")
    own, name = _own(NOISE, t), type(schedule).__name__
    found = velocity(teacher.net, on_path(teacher.denoiser), NOISE, t, {})
    x0, eps = teacher.denoiser(NOISE, schedule.times_of(t / (1 - t)))
    return exact(f"velocity of a converted {name}", found - own, not_rescaled=eps - x0 - own)
