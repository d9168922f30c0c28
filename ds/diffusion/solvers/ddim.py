"""DDIM, the deterministic sampler of the paper, and its stochastic relatives up to DDPM's."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.solvers.base import AbstractSolver, fresh_noise
from ds.system.config import NotNegative, check

_STREAM = 0x5B1F3C9D84A27E63


@dataclass(frozen=True)
class DDIM(AbstractSolver):
    """Denoise, then add noise up to the next level; x0 is not clipped.

    With eta = 0 the noise is the predicted one, and the sampler is deterministic. Up to eta = 1,
    where it samples DDPM's posterior, a growing part of it is fresh. Song et al. 2020,
    arXiv:2010.02502, Eq. 12 and 16.
    """

    order: ClassVar[int] = 1

    eta: NotNegative = 0.0  # share of fresh noise: 0 is deterministic, 1 is DDPM

    def __post_init__(self):
        check(self, "DDIM: ")
        if self.eta > 1:
            raise ValueError(f"DDIM: eta must be at most 1, not {self.eta}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

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
        x0, eps = denoiser(x, t)
        alpha, sigma = schedule.at(s)
        if not self.eta or not sigma:
            return alpha * x0 + sigma * eps, None
        # The part of sigma**2 that x_t says nothing of, 1 - SNR(t) / SNR(s).
        fresh = sigma * self.eta * math.sqrt(-math.expm1(2 * (schedule.lam(t) - schedule.lam(s))))
        kept = math.sqrt(sigma**2 - fresh**2)
        return alpha * x0 + kept * eps + fresh * fresh_noise(draws, _STREAM, x, t), None


@dataclass(frozen=True)
class DDIMToFirst(AbstractSolver):
    """DDIM that ends at the noise level of a table's index 0, and not at the data.

    This is diffusers' DDIM with `set_alpha_to_one: false`. The sample keeps the noise of index 0. A
    schedule in continuous time has no such level: there it is DDIM.
    """

    order: ClassVar[int] = 1

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, None]:
        return DDIM().step(denoiser, x, t, max(s, 0), state, draws)
