"""Denoising: how a teacher is trained in the first place."""

import copy
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser, Prediction
from ds.diffusion.noise import uniform
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM
from ds.methods.base import AbstractMethod
from ds.models.teacher import integrate
from ds.system.config import check

_TIMES = 0x7D3A59E2C1846BF0  # the seed of the times, which no source is likely to have


@dataclass(frozen=True)
class Denoising(AbstractMethod):
    """Predict what noise was added at a random time.

    Ho et al. 2020, arXiv:2006.11239, Eq. 14.
    """

    feeds: ClassVar = "images"

    schedule: LinearBeta = field(default_factory=LinearBeta)
    prediction: Prediction = "eps"

    def __post_init__(self):
        check(self, "Denoising: ")

    def init(self, teacher: Denoiser) -> nn.ModuleDict:
        return nn.ModuleDict({"student": copy.deepcopy(teacher.net).requires_grad_(True)})

    def loss(self, modules: nn.ModuleDict, batch: dict[str, Tensor], step: int) -> Tensor:
        x0, eps = batch["x0"], batch["noise"]
        t = (uniform(_TIMES, batch["index"]) * self.schedule.num_steps).long()
        alpha, sigma = self.schedule.gather(t, x0)
        target = self.denoiser(modules["student"]).target(x0, eps, t)
        return (modules["student"](alpha * x0 + sigma * eps, t) - target).square().mean()

    def sample(self, net: nn.Module, z: Tensor, nfe: int = 20) -> Tensor:
        grid = grids.uniform(nfe, num_steps=self.schedule.num_steps)
        return integrate(self.denoiser(net), DDIM(), grid, z)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the network with what it was trained to predict."""
        return Denoiser(net, self.schedule, self.prediction)
