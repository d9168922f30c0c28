"""Any solver with its predictions of x0 clipped, statically or to a quantile."""

from dataclasses import dataclass, field
from typing import Annotated, Any, cast

import torch
from torch import Tensor

from ds.diffusion.denoiser import Denoiser, Parts
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Estimate
from ds.diffusion.schedules import AbstractSchedule
from ds.diffusion.solvers.base import AbstractSolver
from ds.diffusion.solvers.ddim import DDIM
from ds.system.config import Between, Positive, check


@dataclass(frozen=True)
class Clipped(AbstractSolver):
    """A solver that sees each predicted x0 clipped.

    Without a quantile, x0 is clipped to [-limit, limit]: `clip_sample` of diffusers. With one, the
    threshold of a sample is that quantile of |x0| over its elements, at least `limit` and at most
    `most`; x0 is clipped to it and scaled back to `limit`: `thresholding` of diffusers, the
    "dynamic thresholding" of Saharia et al. 2022, arXiv:2205.11487, section 2.3.

    The predicted noise stays, as in diffusers' DDIM, or follows the clipped x0 with `rederive`.
    What is not finite is not clipped, so that it is seen in the samples.
    """

    solver: AbstractSolver = field(default_factory=DDIM)
    limit: Positive = 1.0  # largest |x0|
    quantile: Annotated[float, Between(0, 1, "(]")] | None = None  # of |x0|; None: static clipping
    most: Positive = 1.0  # largest threshold of a quantile
    rederive: bool = False  # derive the noise from x_t and the clipped x0

    def __post_init__(self):
        check(self, "Clipped: ")

    @property
    def order(self) -> int:
        return self.solver.order

    @property
    def stochastic(self) -> bool:
        return self.solver.stochastic

    def nfe(self, grid: Grid) -> int:
        return self.solver.nfe(grid)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: Any,
        draws: Draws | None = None,
    ) -> tuple[Tensor, Any]:
        clipping = cast(Denoiser, _Clipping(denoiser, self))
        return self.solver.step(clipping, x, t, s, state, draws)

    def clip(self, x0: Tensor) -> Tensor:
        """Return x0 [N, *shape] clipped."""
        if self.quantile is None:
            inside = x0.clamp(-self.limit, self.limit)
        else:
            sizes = x0.flatten(1).abs().to(torch.promote_types(x0.dtype, torch.float32))
            threshold = sizes.quantile(self.quantile, dim=1).clamp(self.limit, self.most)
            threshold = threshold.reshape(-1, *[1] * (x0.dim() - 1)).to(x0.dtype)
            inside = x0.clamp(-threshold, threshold) / threshold * self.limit
        return torch.where(x0.isfinite(), inside, x0)


@dataclass(frozen=True)
class _Clipping:
    """What a solver needs of a denoiser, with x0 clipped."""

    denoiser: Denoiser
    clipped: Clipped

    @property
    def schedule(self) -> AbstractSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: float) -> Estimate:
        return self.parts(x, t).estimate

    def parts(self, x: Tensor, t: float) -> Parts:
        """Return the parts with x0 clipped; a classifier's gradient comes after it, as in ADM."""
        found = self.denoiser.parts(x, t)
        x0 = self.clipped.clip(found.x0)
        eps = (x - found.alpha * x0) / found.sigma if self.clipped.rederive else found.eps
        return found._replace(x0=x0, eps=eps)
