"""Improved consistency training (iCT): consistency training that needs no average of its target."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Bounded
from ds.diffusion.schedules import EDM
from ds.methods import losses, times
from ds.methods.base import AbstractMethod, Progress
from ds.methods.consistency.levels import disagreement, index, karras, noisy, sampled, start
from ds.methods.proof import Check, Trial
from ds.methods.proofs.consistency import improved_consistency_training as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.pairs.sources import Batch
from ds.system.config import Between, Count, Positive, check, require

_LEVELS = 0x6D31F0A85EC9274B  # the stream of the levels


@dataclass(frozen=True)
class ImprovedConsistencyTraining(AbstractMethod):
    """Train f(x, sigma) to be alike at two noise levels of one image and one noise.

    The target is the student itself, without gradient and with the same dropout. The number of
    levels doubles until it is large. Most rows have levels around exp(-1.1) = 0.33, and a row
    counts by the inverse of its step. The loss of a row is about the size of its error, all
    elements together. Song & Dhariwal 2023, arXiv:2310.14189, sections 3.1 to 3.5.

    The network must be told the level at low frequencies (section 3.1): an embedding that differs
    much between two neighbouring levels lets f differ as much. Fourier features of the scale 0.02,
    as in the paper, are ours of the scale 16 with `noise_scale` = 0.25 * 0.02 / 16.
    """

    feeds: ClassVar = "images"

    start_steps: Count = 10  # s0: steps between noise levels at the start; they double in the run
    end_steps: Annotated[int, Between(1, 100_000)] = 1280  # s1: steps between levels at the end
    # mean and standard deviation of the logarithm of a row's level
    log_sigma: tuple[Annotated[float, Between(-20, 20)], Positive] = (-1.1, 2.0)
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    sigma_data: Positive = 0.5  # standard deviation of the data
    noise_scale: Positive = 0.25  # the network is told this times log(sigma)
    # errors below this, times the root of the elements of a row, count by their square
    huber: Positive = 5.4e-4
    mid: Positive = 0.821  # level of the last of several calls; Karras' levels lead there
    student: AbstractNetConfig | None = None  # the network to train; else a copy of the teacher's

    def __post_init__(self):
        check(self, "ImprovedConsistencyTraining: ")
        if self.start_steps > self.end_steps:
            raise ValueError(
                f"ImprovedConsistencyTraining: start_steps ({self.start_steps}) must be at most "
                f"end_steps ({self.end_steps})"
            )
        if not self.sigma_min < self.mid < self.sigma_max:
            raise ValueError(
                f"ImprovedConsistencyTraining: sigma_min ({self.sigma_min}), mid ({self.mid}) and "
                f"sigma_max ({self.sigma_max}) must rise"
            )

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        return nn.ModuleDict({"student": start(teacher, self.student, self.noise_scale)})

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the consistency function of a network: its x0 is the end of the ODE."""
        prediction = Bounded(self.sigma_data, self.noise_scale, self.sigma_min)
        return Denoiser(net, EDM(self.sigma_max), prediction)

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        steps = self.steps(progress, batch.x0.device)
        i = self.drawn(batch.draws, steps)
        t, s = self.levels(i, steps), self.levels(i + 1, steps)
        error = self.error(modules["student"], batch, t, s)
        return (self.distance(error) / (t - s).to(error)).mean()  # the weight of section 3.1

    def steps(self, progress: Progress, device: torch.device | str = "cpu") -> Tensor:
        """Return N - 1, the number of steps between levels, as a tensor: one graph for all N.

        It doubles after each K' = total / (log2(s1 / s0) + 1) steps of the run. Section 3.4.
        """
        doublings = math.log2(self.end_steps // self.start_steps) + 1
        length = max(1, math.floor(progress.total / doublings))
        done = torch.full((), progress.step // length, dtype=torch.float64, device=device)
        return (self.start_steps * 2**done).clamp(max=self.end_steps)

    def drawn(self, draws: Draws, steps: Tensor) -> Tensor:
        """Return the level i of every row, int64 [N]; its target is at i + 1, nearer to the data.

        The step from i to i + 1 has the share of a log-normal density that lies between its levels:
        a difference of erf at their logarithms. Section 3.5.
        """
        ends = self.sigma_min, self.sigma_max
        sigma = times.cut_log_normal(draws, _LEVELS, *self.log_sigma, *ends)
        return index(sigma, steps + 1, *ends)

    def levels(self, i: Tensor, steps: Tensor) -> Tensor:
        """Return level i [N], float64 [N]: from sigma_max for i = 0 to sigma_min for i = steps."""
        return karras(i, steps + 1, self.sigma_min, self.sigma_max)

    def error(self, net: nn.Module, batch: Batch, t: Tensor, s: Tensor) -> Tensor:
        """Return f at levels t [N] minus f at s [N], without gradient, of the same rows."""
        f = self.denoiser(net).given(**batch.cond)
        return disagreement(f, noisy(batch, t), t, f, noisy(batch, s), s)

    def distance(self, error: Tensor) -> Tensor:
        """Return the pseudo-Huber loss of each row, [N]. Section 3.3."""
        return losses.pseudo_huber(error, self.huber * error[0].numel() ** 0.5)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # a network that maps everything to one point has the loss 0

    def times(self, nfe: int) -> Grid:
        return tuple(map(self.denoiser(nn.Identity()).c_noise, self._visited(nfe)))

    def _visited(self, nfe: int) -> Grid:
        """Return the noise levels at which a sample calls the network."""
        require("ImprovedConsistencyTraining", Count, nfe=nfe)
        if nfe == 1:
            return (self.sigma_max,)
        return grids.karras(nfe, EDM(self.sigma_max), top=self.sigma_max, bottom=self.mid)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        f = self.denoiser(net).given(**(cond or {}))
        return sampled(f, self._visited(nfe), z, draws, floor=self.sigma_min)

    def trial(self) -> Trial:
        # The width is then 0.042, about that of CIFAR-10's rows. Where it is much below the spread
        # of the targets, f tends to their median, and in the plane that is not their mean.
        fitted = {"sigma_data": 0.95, "huber": 0.03}
        return Trial(
            fitted,
            bars={1: 0.20, 2: 0.11},
            agreement=0.935,
            controls={"c_in without the root": proof.without_root(replace(self, **fitted))},
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
