"""A sampler for straight paths that goes back to the first noise at each step."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.solvers.base import AbstractSolver


@dataclass(frozen=True)
class SameNoise(AbstractSolver):
    """Denoise, then add the noise that the sample began with, up to the next level.

    On a straight path from noise to data that is the path itself, whatever error the network made
    at the steps before. On others it does not converge to the ODE, so it has no order. Lee et al.
    2024, arXiv:2405.20320, in whose code it is the sampler "new".
    """

    order: ClassVar[int] = 0

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: Tensor | None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take the noise from the first x, which is all noise, and keep it as the state."""
        (_, now), (alpha, sigma) = denoiser.schedule.at(t), denoiser.schedule.at(s)
        z = x / now if state is None else state
        return alpha * denoiser(x, t).x0 + sigma * z, z
