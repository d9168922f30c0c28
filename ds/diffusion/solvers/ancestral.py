"""DDPM's own sampler: each step draws from the posterior of the next state, given x_t and x0."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.solvers.base import AbstractSolver, fresh_noise
from ds.system.config import check

_STREAM = 0x6E84B1D03F9C527A


class Posterior(NamedTuple):
    """q(x_s | x_t, x0), s < t: normal about x * x_t + x0 * x0 with the variance `small`.

    `large` is the variance of q(x_t | x_s). Ho et al. 2020, arXiv:2006.11239, Eq. 7, where they are
    beta-tilde and beta; on any path.
    """

    x: float
    x0: float
    small: float
    large: float

    @classmethod
    def between(cls, start: tuple[float, float], end: tuple[float, float]) -> "Posterior":
        """Return the posterior of a step between two levels, (alpha, sigma) each."""
        alpha, now, before = end[0], start[1] ** 2, end[1] ** 2
        kept = start[0] / alpha
        large = now - kept**2 * before  # the noise from s to t
        small = large * before / now
        return cls(kept * before / now, alpha * large / now, small, large)


@dataclass(frozen=True)
class Ancestral(AbstractSolver):
    """Draw x_s from a normal distribution about the mean of q(x_s | x_t, x0), at predicted x0.

    Its variance in a step from t to s is

        small       that of q(x_s | x_t, x0)
        large       that of q(x_t | x_s), which is beta on a table
        learned     between the two in logarithm, as a network of ds.predictions.LearnedVariance
                    says for each element

    On a subset of a table's steps these are the betas of the subset, as ADM respaces them. A
    classifier moves the mean by variance * scale * gradient. The step to the data adds no noise.
    Ho et al. 2020, arXiv:2006.11239, Algorithm 2; Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 15;
    Dhariwal & Nichol 2021, arXiv:2105.05233, Algorithm 1. Their samplers clip x0: so does
    ds.solvers.Clipped(Ancestral()).
    """

    order: ClassVar[int] = 1

    variance: Literal["learned", "small", "large"] = "small"  # of the noise that a step adds

    def __post_init__(self):
        check(self, "Ancestral: ")

    @property
    def stochastic(self) -> bool:
        return True

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: float | None,
        draws: Draws | None = None,
    ) -> tuple[Tensor, float]:
        known, (alpha, sigma) = denoiser.parts(x, t), denoiser.schedule.at(s)
        of_x, of_x0, small, large = Posterior.between(
            (float(known.alpha), float(known.sigma)), (alpha, sigma)
        )
        x = of_x * x + of_x0 * known.x0
        # In the step to the data there is no noise, and the smallest variance is the last one's.
        least = small or (large if state is None else state)
        if known.gradient is not None:
            x = x + self._variance(known.share, small, large, least) * known.gradient
        if sigma:
            deviation = self._variance(known.share, small, large, least) ** 0.5
            x = x + deviation * fresh_noise(draws, _STREAM, x, t)
        return x, small

    def _variance(
        self, share: Tensor | None, small: float, large: float, least: float
    ) -> float | Tensor:
        if self.variance == "small":
            return small
        if self.variance == "large":
            return large if small else least
        if share is None:
            raise ValueError(
                'Ancestral(variance="learned") needs a network that learned it, of the prediction '
                'LearnedVariance; use variance="small" or "large"'
            )
        return least * (large / least) ** share.to(torch.promote_types(share.dtype, torch.float32))
