"""The sampler of consistency models: denoise, then add fresh noise up to the next level."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.solvers.base import AbstractSolver, fresh_noise
from ds.system.config import NotNegative, check

_STREAM = 0x74D2806BF5193CEA


@dataclass(frozen=True)
class Renoise(AbstractSolver):
    """Take the denoiser's x0 for data, and a fresh sample of q(x_s | x0) for the next state.

    It is for networks whose x0 is a sample. A denoiser's is the mean of many, so its samples come
    out too much alike. x0 counts as having the noise level `floor`. One call needs no draws. Song
    et al. 2023, arXiv:2303.01469, Algorithm 1, where `floor` is the smallest noise level.
    """

    order: ClassVar[int] = 0

    floor: NotNegative = 0.0

    def __post_init__(self):
        check(self, "Renoise: ")

    @property
    def stochastic(self) -> bool:
        return True

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, None]:
        x0 = denoiser(x, t).x0
        if s == denoiser.schedule.data:
            return x0, None
        alpha, sigma = denoiser.schedule.at(s)
        added = math.sqrt(sigma**2 - (alpha * self.floor) ** 2)
        return alpha * x0 + added * fresh_noise(draws, _STREAM, x, s), None
