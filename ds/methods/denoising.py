"""Denoising: how a teacher is trained in the first place."""

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Prediction, as_prediction
from ds.diffusion.schedules import AbstractTable, LinearBeta
from ds.diffusion.solvers import DDIM, integrate
from ds.methods.base import AbstractMethod, Progress
from ds.methods.proof import NORMAL, Check, Formula, Trial, exact
from ds.models.teacher import Teacher
from ds.nets import MLPConfig
from ds.pairs.sources import Batch
from ds.system.config import check

_TIMES = 0x7D3A59E2C1846BF0  # the stream of the times


@dataclass(frozen=True)
class Denoising(AbstractMethod):
    """Predict the noise that was added at a random time, or what else determines it.

    A teacher to start from must have the same schedule and prediction. Ho et al. 2020,
    arXiv:2006.11239, Eq. 14.
    """

    feeds: ClassVar = "images"

    schedule: AbstractTable = field(default_factory=LinearBeta)
    prediction: Prediction = "eps"  # what the network learns to predict

    def __post_init__(self):
        check(self, "Denoising: ")

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        there = teacher.denoiser.schedule, as_prediction(teacher.denoiser.prediction)
        if there != (self.schedule, as_prediction(self.prediction)):
            raise ValueError(
                f"Denoising: learns the prediction {self.prediction} on {self.schedule}; this "
                f"teacher has {there[1]} on {there[0]}; give Denoising the same"
            )
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

    def trial(self) -> Trial:
        """The network is told the indices of a table, as in DDPM."""
        return Trial(net=MLPConfig(frequencies=(1.0, 1e-3)), bars={100: 0.08})

    def identity(self) -> tuple[Check, ...]:
        """The loss has no slope at the best prediction of normal data, a linear map.

        Four rows with data and noise at plus and minus one deviation have the moments of all.
        """
        one = torch.tensor(
            [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64, device="cpu"
        )
        index = torch.arange(16, dtype=torch.int64, device="cpu").repeat_interleave(4)
        a, b = (one.repeat(16, 1)[:, i, None].expand(-1, 3) for i in (0, 1))
        rows = Batch(NORMAL.mean + NORMAL.std * a, b, index, Draws(0, index))

        def slope(gain: float = 1.0, late: int = 0) -> Tensor:
            off = torch.zeros(2, 3, dtype=torch.float64, device="cpu", requires_grad=True)

            def best(x: Tensor, t: Tensor) -> Tensor:
                levels = self.schedule.gather((t - late).clamp(min=0), x)
                x0, eps = NORMAL.x0(x, *levels), NORMAL.eps(x, *levels)
                target = self.denoiser(Formula(best)).target(x0, eps, (t - late).clamp(min=0))
                return gain * target + off[0] * x + off[1]

            modules = nn.ModuleDict({"student": Formula(best)})
            loss = self.loss(modules, rows, Progress(0, 1))
            return torch.autograd.grad(loss, off)[0]

        wrong = {"prediction_too_small": slope(0.9), "time_told_too_late": slope(late=100)}
        return (exact("slope of the loss at the best map", slope(), **wrong),)
