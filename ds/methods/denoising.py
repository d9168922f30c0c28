"""Denoising: how a teacher is trained in the first place."""

import copy
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Prediction
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM, integrate
from ds.methods.base import AbstractMethod, Progress
from ds.models.teacher import Teacher
from ds.pairs.sources import Batch
from ds.system.config import check

_TIMES = 0x7D3A59E2C1846BF0  # the stream of the times


@dataclass(frozen=True)
class Denoising(AbstractMethod):
    """Predict the noise that was added at a random time.

    Ho et al. 2020, arXiv:2006.11239, Eq. 14.
    """

    feeds: ClassVar = "images"

    schedule: LinearBeta = field(default_factory=LinearBeta)
    prediction: Prediction = "eps"

    def __post_init__(self):
        check(self, "Denoising: ")

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        return nn.ModuleDict({"student": copy.deepcopy(teacher.net).requires_grad_(True)})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        x0, eps = batch.x0, batch.noise
        t = (batch.draws.uniform(_TIMES) * self.schedule.num_steps).long()
        alpha, sigma = self.schedule.gather(t, x0)
        target = self.denoiser(modules["student"]).target(x0, eps, t)
        return (modules["student"](alpha * x0 + sigma * eps, t) - target).square().mean()

    def times(self, nfe: int) -> Grid:
        return grids.uniform(nfe, self.schedule)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 20,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        return integrate(self.denoiser(net), DDIM(), self.times(nfe), z)

    def result(self, net: nn.Module) -> Teacher:
        return Teacher(self.denoiser(net), DDIM(), self.times(20))

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the network with what it was trained to predict."""
        return Denoiser(net, self.schedule, self.prediction)
