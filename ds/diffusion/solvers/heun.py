"""Heun's method, the sampler of EDM without its noise."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.schedules import DATA
from ds.diffusion.solvers.base import AbstractSolver


@dataclass(frozen=True)
class Heun(AbstractSolver):
    """Explicit trapezoid in sigma / alpha: two network calls a step, one in the step to the data.

    In y = x / alpha and r = sigma / alpha the ODE is dy/dr = eps (Song et al. 2020,
    arXiv:2010.02502, Eq. 14). Karras et al. 2022, arXiv:2206.00364, Algorithm 1.
    """

    order: ClassVar[int] = 2

    def step(
        self, denoiser: Denoiser, x: Tensor, t: int, s: int, state: None
    ) -> tuple[Tensor, None]:
        alpha, sigma = denoiser.schedule.at(t)
        alpha_s, sigma_s = denoiser.schedule.at(s)
        x0, slope = denoiser(x, t)
        if s == DATA:
            return x0, None  # the slope at sigma = 0 does not exist: Euler's step, as line 6 says
        distance = sigma_s / alpha_s - sigma / alpha
        guess = alpha_s * (x / alpha + distance * slope)
        slope = (slope + denoiser(guess, s).eps) / 2
        return alpha_s * (x / alpha + distance * slope), None

    def nfe(self, grid: Grid) -> int:
        return 2 * len(grid) - 1
