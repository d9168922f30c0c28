"""The proof of Shortcut."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact, normal_pairs


def identity(method: Any) -> tuple[Check, ...]:
    """With the average velocity of normal data, two half steps are a step, and samples are exact.

    With that of straight pairs, the errors of all rows vanish: of small steps and of large ones.
    """
    scale = method.time_scale

    def s(x: Tensor, told: Tensor, level: Tensor) -> Tensor:
        t, d = told[:, None] / scale, torch.exp2(-level)[:, None]
        return (x - NORMAL.flow(x, (1 - t, t), (1 - t + d, t - d))) / d

    def velocity(x: Tensor, told: Tensor, level: Tensor) -> Tensor:
        t = told[:, None] / scale
        return (x - NORMAL.x0(x, 1 - t, t)) / t

    def straight(x: Tensor, told: Tensor, level: Tensor) -> Tensor:
        t = told[:, None] / scale
        start = (x - (1 - t) * NORMAL.mean) / ((1 - t) * NORMAL.std + t)
        return start - NORMAL.endpoint(start, 0, 1)

    x, number = NOISE, torch.arange(len(NOISE), dtype=torch.int64, device="cpu")
    level = number % 4
    t = torch.exp2(-level.double()) * (1 + number % torch.exp2(level.double()))

    def halves(net: Callable[..., Tensor]) -> Tensor:
        step = method.s(Formula(s), x, t, level=level)
        return method.halves(Formula(net), x, t, level) - step

    pairs, end = normal_pairs(), NORMAL.endpoint(x, 0, 1)
    shuffled = pairs._replace(x0=end.roll(1, 0))
    own = exact(
        "two half steps minus the step",
        halves(s),
        time_not_advanced=halves(_stuck(s, 1)),
        state_not_advanced=halves(_stuck(s, 0)),
    )
    error = exact(
        "error on straight pairs",
        method.error(Formula(straight), Formula(straight), pairs),
        pairs_shuffled=method.error(Formula(straight), Formula(straight), shuffled),
        half_steps_of_the_data=method.error(Formula(straight), Formula(velocity), pairs),
    )
    samples = (
        exact(
            f"end of {nfe} steps",
            method.sample(Formula(s), x, nfe=nfe) - end,
            velocity_alone=method.sample(Formula(velocity), x, nfe=nfe) - end,
        )
        for nfe in (1, 4)
    )
    return own, error, *samples


def always(net: nn.Module, level: int) -> nn.Module:
    """Return a network that takes every step for one of size 2**-level."""

    def call(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return net(x, t, **{**cond, "level": torch.full_like(cond["level"], level)})

    return Formula(call)


def _stuck(net: Callable[..., Tensor], place: int) -> Callable[..., Tensor]:
    """Return a network that is told at every call what argument `place` was at the first."""
    first: list[Tensor] = []

    def call(*args: Tensor, **cond: Tensor) -> Tensor:
        first.append(args[place])
        return net(*args[:place], first[0], *args[place + 1 :], **cond)

    return call
