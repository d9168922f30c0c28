"""DPM-Solver++: exponential integrators of the data prediction, multistep and singlestep.

With lam = log(alpha / sigma) and D the predicted x0, the ODE has the exact solution

    x_s = sigma_s / sigma_t x_t + sigma_s * integral of e^lam D dlam from lam_t to lam_s

(Lu et al. 2022, arXiv:2211.01095, Proposition 4.1). A solver replaces D by a polynomial in lam
through known values; the integrals of its terms are the phi functions below. In the step to the
data, where lam is infinite, that leaves D itself.
"""

from dataclasses import dataclass
from math import exp, expm1, isinf

from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import AbstractSchedule
from ds.diffusion.solvers.base import AbstractSolver, fresh_noise
from ds.system.config import NotNegative, check

_STREAM = 0x28D5F7A3916C0EB4

History = tuple[tuple[float, Tensor], ...]  # times and the x0 predicted there, the oldest first


@dataclass(frozen=True)
class DPMSolverPP(AbstractSolver):
    """Multistep DPM-Solver++, 2M or 3M: one network call a step, the last predictions remembered.

    The first steps are of the order that the history allows. With `lower_order_final` the step to
    index 0 of a table is of order 2 at most, as the authors do below 15 steps. The authors' third
    order, and that of diffusers, takes half of the second difference and so converges with order
    2; `as_released` does the same. With eta, order 2 solves the SDE: each step but that to the data
    adds noise. At eta = 1 this is "2M SDE", sde-dpmsolver++ in diffusers. Lu et al. 2022,
    arXiv:2211.01095, Algorithm 2 and section 5; the third order is in their code only.
    """

    order: int = 2  # 2 or 3
    lower_order_final: bool = False  # order 2 at most in the step to index 0 of a table
    as_released: bool = False  # order 3 as in the authors' code, which converges with order 2
    eta: NotNegative = 0.0  # of order 2: share of fresh noise, 0 for the ODE, 1 for the SDE

    def __post_init__(self):
        check_order(self, self.order)
        if self.eta and self.order != 2:
            raise ValueError(f"DPMSolverPP: eta is for order 2, not {self.order}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: History | None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, History]:
        x0 = denoiser(x, t).x0
        history = (*(state or ()), (t, x0))[-self.order :]
        if s == denoiser.schedule.data:
            return x0, history
        usable = history[-2:] if self.lower_order_final and s == 0 else history
        moved = self._extrapolate(denoiser.schedule, x, s, usable)
        if self.eta:
            schedule = denoiser.schedule
            fresh = -expm1(2 * self.eta * (schedule.lam(t) - schedule.lam(s)))
            z = fresh_noise(draws, _STREAM, x, t)
            moved = moved + schedule.at(s)[1] * fresh**0.5 * z
        return moved, history

    def _extrapolate(
        self, schedule: AbstractSchedule, x: Tensor, s: float, history: History
    ) -> Tensor:
        """Move x from the last time of the history to s with the polynomial through all of it."""
        (t, d0), *older = reversed(history)
        h = schedule.lam(s) - schedule.lam(t)
        phi1 = -expm1(-(1 + self.eta) * h)
        alpha_s, sigma_s = schedule.at(s)
        x = sigma_s / schedule.at(t)[1] * exp(-self.eta * h if self.eta else 0.0) * x
        if not older:
            return x + alpha_s * phi1 * d0  # DDIM
        r = [(schedule.lam(t) - schedule.lam(u)) / h for u, _ in older]
        slope = (d0 - older[0][1]) / r[0]  # in units of h, between the last two times
        if len(older) == 1:
            return x + alpha_s * phi1 * (d0 + slope / 2)  # Algorithm 2
        before = (older[0][1] - older[1][1]) / (r[1] - r[0])
        bend = (slope - before) / r[1]  # half the second derivative
        slope = slope + r[0] * bend  # at the last time
        phi2 = 1 - phi1 / h
        phi3 = (0.5 if self.as_released else 1.0) * (1 - 2 * phi2 / h)
        return x + alpha_s * (phi1 * d0 + phi2 * slope + phi3 * bend)


@dataclass(frozen=True)
class DPMSolverPPSinglestep(AbstractSolver):
    """Singlestep DPM-Solver++, 2S or 3S: every `order` steps start afresh, with no longer memory.

    The intermediate times are those of the grid, so that a step is one network call: of the three
    steps of a 3S group the first is of order 1, the second of order 2 and the third of order 3, all
    from the group's first x. A grid of `order` * k + 1 times ends with a whole group. Third order
    needs times nearly even in lam: the second intermediate one at 2/3. Lu et al. 2022,
    arXiv:2211.01095, Algorithm 1; the third order from arXiv:2206.00927, Algorithm 2.
    """

    order: int = 2  # 2 or 3

    def __post_init__(self):
        check_order(self, self.order)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: tuple[Tensor, History] | None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, tuple[Tensor, History] | None]:
        x0 = denoiser(x, t).x0
        if s == denoiser.schedule.data:
            return x0, None
        start, history = state or (x, ())
        history = (*history, (t, x0))
        moved = _from_start(denoiser.schedule, start, s, history)
        # Where alpha is 0, lam is infinite: a group starts at the next time.
        done = len(history) == self.order or isinf(denoiser.schedule.lam(t))
        return moved, None if done else (start, history)


def _from_start(schedule: AbstractSchedule, x: Tensor, s: float, history: History) -> Tensor:
    """Move x from the first time of the history to s; its last prediction gives the slope."""
    (t, d0), (u, d) = history[0], history[-1]
    h = schedule.lam(s) - schedule.lam(t)
    phi1 = -expm1(-h)
    alpha_s, sigma_s = schedule.at(s)
    x = sigma_s / schedule.at(t)[1] * x + alpha_s * phi1 * d0  # DDIM
    if len(history) == 1:
        return x
    slope = (d - d0) * (h / (schedule.lam(u) - schedule.lam(t)))
    return x + alpha_s * (phi1 / 2 if len(history) == 2 else 1 - phi1 / h) * slope


def check_order(solver: AbstractSolver, order: int) -> None:
    """Raise ValueError for an order that the solver does not have."""
    check(solver, f"{type(solver).__name__}: ")
    if order not in (2, 3):
        raise ValueError(f"{type(solver).__name__}: the order must be 2 or 3, not {order!r}")
