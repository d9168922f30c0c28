"""Denoising: how a teacher is trained in the first place."""

import copy
import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Prediction, as_prediction
from ds.diffusion.schedules import EDM, AbstractTable, LinearBeta, Trig
from ds.diffusion.solvers import DDIM, AbstractSolver, Heun, integrate
from ds.methods import losses, times
from ds.methods.base import AbstractMethod, Progress
from ds.methods.networks import untold
from ds.methods.proof import Check, Trial
from ds.methods.proofs import denoising as proof
from ds.models.teacher import Teacher
from ds.nets import MLPConfig
from ds.pairs.sources import Batch
from ds.system.config import Positive, Share, check

# Streams of random numbers: of the times, and of the labels that are left out.
_TIMES, _UNTOLD = 0x7D3A59E2C1846BF0, 0x35C0A97E14F2D86B
_LEAST = math.atan(math.exp(-10))  # of the times on an arc


@dataclass(frozen=True)
class Denoising(AbstractMethod):
    """Predict the noise that was added at a random time, or what else determines it.

    A teacher to start from must have the same schedule and prediction. The steps of a table come
    equally often. Ho et al. 2020, arXiv:2006.11239, Eq. 14.

    On ds.schedule.EDM() with the prediction "preconditioned" this is the loss of Karras et al.
    2022, arXiv:2206.00364, Eq. 8: log(sigma) is normal, and the squared error of what the network
    itself returns is that of x0 with the weight (sigma**2 + sigma_data**2) / (sigma *
    sigma_data)**2. It is the mean over elements, and theirs the sum, for which Adam takes the same
    steps.

    Denoising(Trig(), "x0", snr_weight=True) makes the teachers of progressive distillation. Their
    times are even from sigma / alpha = exp(-10) to exp(10). Salimans & Ho 2022, arXiv:2202.00512,
    Eq. 9 and appendix B.
    """

    feeds: ClassVar = "images"

    schedule: AbstractTable | EDM | Trig = field(default_factory=LinearBeta)
    prediction: Prediction = "eps"  # what the network learns to predict
    # mean and standard deviation of log(sigma) on the path of EDM, Table 1
    log_sigma: tuple[float, Positive] = (-1.2, 1.2)
    # share of the labels that the network is not told, so that it can be guided; without classes
    # nothing is drawn
    label_dropout: Share = 0.1
    # minimise the larger of the errors of x0 and of the noise; else that of what is predicted
    snr_weight: bool = False

    def __post_init__(self):
        check(self, "Denoising: ")
        prediction = as_prediction(self.prediction)
        prediction.check(self.schedule)
        if isinstance(self.schedule, Trig) and prediction.needs_signal:
            raise ValueError(
                f"Denoising: {prediction} says nothing of x0 at the end of {self.schedule}, where "
                f"alpha is 0; predict x0 or v"
            )

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        there = teacher.denoiser.schedule, as_prediction(teacher.denoiser.prediction)
        if there != (self.schedule, as_prediction(self.prediction)):
            raise ValueError(
                f"Denoising: learns the prediction {self.prediction} on {self.schedule}; this "
                f"teacher has {there[1]} on {there[0]}; give Denoising the same"
            )
        return nn.ModuleDict({"student": copy.deepcopy(teacher.net).requires_grad_(True)})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        prediction, x0, eps = as_prediction(self.prediction), batch.x0, batch.noise
        t = self._drawn(batch.draws)
        levels = alpha, sigma = self.schedule.gather(t, x0)
        x, c_noise = prediction.inputs(alpha * x0 + sigma * eps, t, *levels)
        cond = untold(batch, _UNTOLD, self.label_dropout)
        out = modules["student"](x, c_noise, **cond)
        if self.snr_weight:
            made = prediction.estimate(alpha * x0 + sigma * eps, out, *levels).x0
            return losses.truncated_snr(made - x0, *levels).mean()
        return (out - prediction.target(x0, eps, *levels)).square().mean()

    def _drawn(self, draws: Draws) -> Tensor:
        """Return the times of a batch, [N]."""
        if isinstance(self.schedule, AbstractTable):
            return times.grid(draws, _TIMES, self.schedule.num_steps)
        if isinstance(self.schedule, Trig):
            even = draws.uniform(_TIMES).float()
            return _LEAST + (self.schedule.noise - 2 * _LEAST) * even
        return times.log_normal(draws, _TIMES, *self.log_sigma).clamp(max=self.schedule.noise)

    def times(self, nfe: int) -> Grid:
        grid = self._way(nfe)[1]
        if isinstance(self.schedule, AbstractTable):
            return grid
        return tuple(map(self.denoiser(nn.Identity()).c_noise, grid))

    def _way(self, nfe: int) -> tuple[AbstractSolver, Grid]:
        """Return a solver and a grid that take at most nfe calls."""
        if isinstance(self.schedule, EDM):
            return Heun(), grids.karras((nfe + 1) // 2, self.schedule)
        return DDIM(), grids.uniform(nfe, self.schedule)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 20,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Sample with DDIM, on the path of EDM with Heun in at most nfe calls."""
        (solver, grid), denoiser = self._way(nfe), self.denoiser(net).given(**(cond or {}))
        return integrate(denoiser, solver, grid, self.schedule.prior(z, grid[0]))

    def result(self, net: nn.Module) -> Teacher:
        """Return a teacher of DDIM in 20 steps, on the path of EDM of Heun in 18."""
        calls = 35 if isinstance(self.schedule, EDM) else 20
        return Teacher(self.denoiser(net), *self._way(calls))

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the network with what it was trained to predict."""
        return Denoiser(net, self.schedule, self.prediction)

    def trial(self) -> Trial:
        """The network is told the indices of a table, as in DDPM, or a logarithm, as in EDM."""
        if isinstance(self.schedule, AbstractTable):
            return Trial(net=MLPConfig(frequencies=(1.0, 1e-3)), bars={100: 0.08})
        return Trial(bars={35: 0.08})

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
