"""DDIM, the deterministic sampler of the paper."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.solvers.base import AbstractSolver


@dataclass(frozen=True)
class DDIM(AbstractSolver):
    """Denoise, then renoise to the next level with the same noise (eta = 0); x0 is not clipped.

    Song et al. 2020, arXiv:2010.02502, Eq. 12 with sigma_t = 0.
    """

    order: ClassVar[int] = 1

    def step(
        self, denoiser: Denoiser, x: Tensor, t: int, s: int, state: None
    ) -> tuple[Tensor, None]:
        x0, eps = denoiser(x, t)
        alpha, sigma = denoiser.schedule.at(s)
        return alpha * x0 + sigma * eps, None
