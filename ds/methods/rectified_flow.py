"""Rectified flow and reflow: straight paths from noise to data, which one step can follow."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Velocity
from ds.diffusion.schedules import Linear
from ds.diffusion.solvers import DDIM, integrate
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.proof import NORMAL, Check, Formula, Trial, exact, normal_pairs
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.pairs.sources import Batch
from ds.system.config import Count, Natural, Positive, check

_TIMES = 0x1F4C8A60B35D92E7  # the stream of the times

_PATH = Linear()


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
        return self._error(modules["student"], batch).square().mean()

    def _error(self, net: nn.Module, batch: Batch) -> Tensor:
        """Return the predicted velocity minus the true one, at random times."""
        t = batch.draws.uniform(_TIMES)
        alpha, sigma = _PATH.gather(t, batch.x0)
        x = alpha * batch.x0 + sigma * batch.noise
        told = (self.time_scale * t).to(x.dtype)
        return net(x, told, **batch.cond) - (batch.noise - batch.x0)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the network with what it was trained to predict."""
        return Denoiser(net, _PATH, Velocity(self.time_scale))

    def times(self, nfe: int) -> Grid:
        return tuple(self.time_scale * t for t in grids.uniform(nfe, _PATH))

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
        return integrate(denoiser, DDIM(), grids.uniform(nfe, _PATH), z)  # here Euler steps

    def result(self, net: nn.Module) -> Teacher:
        return Teacher(self.denoiser(net), DDIM(), grids.uniform(self.nfe, _PATH))

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
        """Check, after reflow, how far velocities are from constant. Liu et al. 2022, Eq. 8."""
        if self.feeds == "images":
            return ()
        x, velocities = z, []
        for t, s in pairwise((*grids.uniform(50, _PATH), _PATH.data)):
            velocities.append(net(x, x.new_full((len(x),), self.time_scale * t)))
            x = x + (s - t) * velocities[-1]
        bend = torch.stack(velocities).var(0, correction=0).flatten(1).sum(1).mean()
        return (Check("bend of the paths", float(bend), 0.002),)

    def identity(self) -> tuple[Check, ...]:
        """With straight paths from noise to the ODE's end, loss and any number of steps are exact.

        The control is the velocity of the data's own paths, before reflow.
        """
        pairs = normal_pairs()
        end, z = pairs.x0, pairs.noise

        def straight(x: Tensor, told: Tensor) -> Tensor:
            t = told[:, None] / self.time_scale
            start = (x - (1 - t) * NORMAL.mean) / ((1 - t) * NORMAL.std + t)
            return start - NORMAL.endpoint(start, 0, 1)

        def bent(x: Tensor, told: Tensor) -> Tensor:
            t = told[:, None] / self.time_scale
            return (x - NORMAL.x0(x, 1 - t, t)) / t

        def backwards(x: Tensor, told: Tensor) -> Tensor:
            return straight(x, self.time_scale - told)

        right, wrong = Formula(straight), Formula(bent)
        own = exact(
            "error on straight pairs",
            self._error(right, pairs),
            pairs_shuffled=self._error(right, pairs._replace(x0=end.roll(1, 0))),
            time_reversed=self._error(Formula(backwards), pairs),
            without_reflow=self._error(wrong, pairs),
        )
        samples = (
            exact(
                f"end of {nfe} steps",
                self.sample(right, z, nfe=nfe) - end,
                without_reflow=self.sample(wrong, z, nfe=nfe) - end,
            )
            for nfe in (1, 3)
        )
        return own, *samples
