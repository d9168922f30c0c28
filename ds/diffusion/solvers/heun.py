"""Heun's method, the sampler of EDM, with or without its noise."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.guidance import ratio_of
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import AbstractSchedule
from ds.diffusion.solvers.base import AbstractSolver, fresh_noise
from ds.system.config import NotNegative, Positive, check

_STREAM = 0x3D9A6F02C75E18B4


@dataclass(frozen=True)
class Heun(AbstractSolver):
    """Explicit trapezoid in sigma / alpha: two network calls a step, one in the step to the data.

    In y = x / alpha and r = sigma / alpha the ODE is dy/dr = eps (Song et al. 2020,
    arXiv:2010.02502, Eq. 14). Where alpha falls to 0, the rule is the same in the angle
    atan(sigma / alpha), which is finite at both ends. With churn, each step first adds noise, as
    far as the noisiest time of the schedule at most: EDM(120.0) lets a grid from 80 rise. A step
    multiplies the level by 1 + churn, by sqrt(2) at most.
    Karras et al. 2022, arXiv:2206.00364, Algorithms 1 and 2.
    """

    order: ClassVar[int] = 2

    churn: NotNegative = 0.0  # share of noise added before each step: EDM's S_churn / steps
    s_min: NotNegative = 0.0  # smallest sigma / alpha with churn, included
    s_max: Positive = 1e9  # largest sigma / alpha with churn, included
    s_noise: Positive = 1.0  # standard deviation of the added noise

    def __post_init__(self):
        check(self, "Heun: ")

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, None]:
        schedule = denoiser.schedule
        if self.churn:
            x, t = self._raised(schedule, x, t, draws)
        x0, slope = denoiser(x, t)
        if s == schedule.data:
            return x0, None  # the slope at sigma = 0 does not exist: Euler's step, as line 6 says
        if schedule.at(schedule.noise)[0] == 0:
            return _in_angle(denoiser, x, t, s, x0, slope), None
        alpha, sigma = schedule.at(t)
        alpha_s, sigma_s = schedule.at(s)
        distance = sigma_s / alpha_s - sigma / alpha
        guess = alpha_s * (x / alpha + distance * slope)
        slope = (slope + denoiser(guess, s).eps) / 2
        return alpha_s * (x / alpha + distance * slope), None

    def nfe(self, grid: Grid) -> int:
        return 2 * len(grid) - 1

    def _raised(
        self, schedule: AbstractSchedule, x: Tensor, t: float, draws: Draws | None
    ) -> tuple[Tensor, float]:
        """Add noise to x; return it and the time of its new level, at most the noisiest."""
        alpha, sigma = schedule.at(t)
        level = ratio_of(alpha, sigma)
        if not self.s_min <= level <= self.s_max:
            return x, t
        raised = level * (1 + min(self.churn, math.sqrt(2) - 1))
        later = min(max(schedule.time(-math.log(raised)), t), schedule.noise)
        raised = ratio_of(*schedule.at(later))
        z = fresh_noise(draws, _STREAM, x, t)
        y = x / alpha + self.s_noise * math.sqrt(raised**2 - level**2) * z
        return schedule.at(later)[0] * y, later


def _in_angle(denoiser: Denoiser, x: Tensor, t: float, s: float, x0: Tensor, eps: Tensor) -> Tensor:
    """Take Heun's step in the angle, over which u = x / hypot(alpha, sigma) changes by

    du/dangle = cos(angle) * eps - sin(angle) * x0.
    """
    (alpha, sigma), (alpha_s, sigma_s) = denoiser.schedule.at(t), denoiser.schedule.at(s)
    angle, angle_s = math.atan2(sigma, alpha), math.atan2(sigma_s, alpha_s)
    u, norm = x / math.hypot(alpha, sigma), math.hypot(alpha_s, sigma_s)
    slope = math.cos(angle) * eps - math.sin(angle) * x0
    x0, eps = denoiser(norm * (u + (angle_s - angle) * slope), s)
    slope = (slope + math.cos(angle_s) * eps - math.sin(angle_s) * x0) / 2
    return norm * (u + (angle_s - angle) * slope)
