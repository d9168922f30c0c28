"""Rectified flow and reflow: straight paths from noise to data, which one step can follow."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Velocity
from ds.diffusion.solvers import DDIM, integrate
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.flow.path import PATH, point
from ds.methods.proof import Check, Trial
from ds.methods.proofs import rectified_flow as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.pairs.sources import Batch
from ds.system.config import Count, Natural, Positive, check

_TIMES = 0x1F4C8A60B35D92E7  # the stream of the times


@dataclass(frozen=True)
class RectifiedFlow(AbstractMethod):
    """Regress the velocity noise - x0 of the straight line between data and noise.

    On data and independent noise this is flow matching, whose paths bend where lines cross. Each
    round of reflow then trains on pairs of noise and what the last stage made of it. Their lines
    hardly cross, so the paths become straight and a single Euler step follows them. Liu et al.
    2022, arXiv:2209.03003, Eq. 1 and Algorithm 1; our time grows with noise.

    With feeds = "pairs" the first stage is a reflow of the given teacher.
    """

    feeds: Literal["images", "pairs"] = "images"  # "pairs": straighten the teacher that is given
    reflow: Natural = 1  # rounds of training on pairs made by the stage before
    steps: Count = 100  # network calls with which a stage makes the pairs of the next
    nfe: Count = 1  # network calls of the model that is made in the end
    time_scale: Positive = 999.0  # the network is told this times the time, which is 0 to 1
    student: AbstractNetConfig | None = None  # the network to train; else a copy of the teacher's

    def __post_init__(self):
        check(self, "RectifiedFlow: ")

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        return nn.ModuleDict({"student": student_net(teacher, self.student)})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        return self.error(modules["student"], batch).square().mean()

    def error(self, net: nn.Module, batch: Batch) -> Tensor:
        """Return the predicted velocity minus the true one, at random times."""
        t = batch.draws.uniform(_TIMES)
        x = point(batch, t)
        told = (self.time_scale * t).to(x.dtype)
        return net(x, told, **batch.cond) - (batch.noise - batch.x0)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the network with what it was trained to predict."""
        return Denoiser(net, PATH, Velocity(self.time_scale))

    def times(self, nfe: int) -> Grid:
        return tuple(self.time_scale * t for t in grids.uniform(nfe, PATH))

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        denoiser = self.denoiser(net).given(**(cond or {}))
        return integrate(denoiser, DDIM(), grids.uniform(nfe, PATH), z)  # here Euler steps

    def result(self, net: nn.Module) -> Teacher:
        return Teacher(self.denoiser(net), DDIM(), grids.uniform(self.nfe, PATH))

    def stages(self) -> tuple[AbstractMethod, ...]:
        if not self.reflow:
            return (self,)
        first = replace(self, reflow=0, nfe=self.steps)
        again = replace(first, feeds="pairs", student=None)
        return (first, *[again] * (self.reflow - 1), replace(again, nfe=self.nfe))

    def trial(self) -> Trial:
        fitted = {"time_scale": 1.0}
        if self.feeds == "images" and not self.reflow:
            return Trial(fitted, bars={100: 0.05})
        wrong = {"before reflow": {"reflow": 0, "nfe": self.steps}} if self.reflow else {}
        return Trial(fitted, bars={1: 0.055, 100: 0.05}, agreement=0.97, controls=wrong)

    def measure(self, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
        return proof.measure(self, net, z)

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
