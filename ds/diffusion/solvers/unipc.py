"""UniPC: a polynomial predicts the next x; with the prediction made there, it corrects the last."""

from dataclasses import dataclass
from math import expm1, factorial, isfinite
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import AbstractSchedule
from ds.diffusion.solvers.base import AbstractSolver
from ds.diffusion.solvers.dpm_solver_pp import History, check_order


class _State(NamedTuple):
    x: Tensor  # at the last time of the history, corrected
    history: History
    used: int  # how many of its predictions the last step used


@dataclass(frozen=True)
class UniPC(AbstractSolver):
    """UniPC-p of the data prediction, variant bh2: order p + 1 for one network call a step.

    The prediction at the next x, needed there anyway, corrects the step that led to it. The first
    steps are of the order that the history allows. With `lower_order_final` the step to index 0 of
    a table uses two predictions at most. The step to the data is x0 itself. Zhao et al. 2023,
    arXiv:2302.04867, section 3 and its algorithms for data prediction.
    """

    tag: ClassVar[str] = "unipc"

    p: int = 2  # predictions that a step uses: 2 or 3
    lower_order_final: bool = True  # 2 at most in the step to index 0 of a table

    def __post_init__(self):
        check_order(self, self.p)

    @property
    def order(self) -> int:
        return self.p + 1

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: _State | None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, _State | None]:
        schedule = denoiser.schedule
        x0 = denoiser(x, t).x0
        if s == schedule.data:
            return x0, state
        history: History = ((t, x0),)
        if state:
            x = _move(schedule, state.x, t, state.history[-state.used :], x0)
            history = (*state.history, (t, x0))[-self.p :]
        used = min(len(history), 2 if self.lower_order_final and s == 0 else self.p)
        return _move(schedule, x, s, history[-used:]), _State(x, history, used)


def _move(
    schedule: AbstractSchedule, x: Tensor, s: float, history: History, at_s: Tensor | None = None
) -> Tensor:
    """Move x from the last time of the history to s; at_s, the x0 predicted there, corrects."""
    (t, d0), *earlier = reversed(history)
    older = [(schedule.lam(u), d) for u, d in earlier]
    h = schedule.lam(s) - schedule.lam(t)
    # A time of infinite lam, where alpha is 0, is too far away to say anything.
    points = [((lam - schedule.lam(t)) / h, d) for lam, d in older if isfinite(lam)]
    if at_s is not None:
        points.append((1.0, at_s))
    alpha_s, sigma_s = schedule.at(s)
    moved = sigma_s / schedule.at(t)[1] * x - alpha_s * expm1(-h) * d0
    for (r, d), weight in zip(points, _weights(h, [r for r, _ in points]), strict=True):
        moved = moved - alpha_s * weight / r * (d - d0)
    return moved


def _weights(h: float, r: list[float]) -> list[float]:
    """Solve for the weights a_p B(h) of the differences at the places r."""
    if len(r) == 1:
        return [expm1(-h) / 2]  # any B(h) / 2 = h / 2 + O(h^2) keeps the order; this is "bh2"
    phi, right = expm1(-h), []
    for k in range(1, len(r) + 1):
        phi = phi / -h - 1 / factorial(k)
        right.append(phi * factorial(k))
    return np.linalg.solve(np.vander(r, increasing=True).T, right).tolist()
