"""The proof of MeanFlow."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact


def identity(method: Any) -> tuple[Check, ...]:
    """With the average velocity of normal data, u is its own target, and samples are exact."""

    def level(t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t[:, None], t[:, None]

    def u(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return (x - NORMAL.flow(x, level(t), level(t - h))) / h[:, None]

    def v(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return (x - NORMAL.x0(x, *level(t))) / t[:, None]

    def error(net: Callable[..., Tensor]) -> Tensor:
        return method.error(Formula(net), x, v(x, t, h), t, h, {})

    x, even = NOISE, torch.linspace(0, 1, len(NOISE), dtype=torch.float64, device="cpu")
    t = 0.2 + 0.75 * even
    h = t * (0.1 + 0.8 * even.roll(11))
    end = NORMAL.endpoint(x, 0, 1)
    own = exact(
        "u minus its target",
        error(u),
        sign_of_derivative_flipped=2 * (u(x, t, h) - v(x, t, h)) - error(u),
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
    return own, *samples
