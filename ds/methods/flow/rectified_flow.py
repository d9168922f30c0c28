"""Rectified flow and reflow: straight paths from noise to data, which one step can follow."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import AbstractPrediction, Velocity
from ds.diffusion.solvers import DDIM, SameNoise, integrate
from ds.methods import losses, times
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.flow.path import PATH, errors, on_path
from ds.methods.proof import Check, Trial
from ds.methods.proofs import rectified_flow as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.nets.lpips import LPIPS
from ds.pairs.sources import Batch
from ds.system.config import BY_CONTENT, Count, Natural, Positive, Share, check

_SOLVERS = {"euler": DDIM(), "same_noise": SameNoise()}
_TIMES = 0x1F4C8A60B35D92E7  # the stream of the times


@dataclass(frozen=True)
class RectifiedFlow(AbstractMethod):
    """Regress the velocity noise - x0 of the straight line between data and noise.

    On data and independent noise this is flow matching, whose paths bend where lines cross. Reflow
    trains on pairs of noise and what the last stage made of it. Their lines hardly cross, so paths
    are straight, and one Euler step follows. Liu et al. 2022, arXiv:2209.03003, Eq. 1, Algorithm 1.

    A last stage may distil k steps, at the times j / k alone. With k = 1 it is DenoisingStudent.
    2-RF++, arXiv:2405.20320, reflows a `converted` EDM teacher: `two_ended`, pseudo_huber, lpips.
    """

    feeds: Literal["images", "pairs"] = "images"  # "pairs": straighten the teacher that is given
    reflow: Natural = 1  # rounds of training on pairs made by the model before
    reflow_ema: Share = 0.0  # on pairs, in place of train.ema_decay; 0: as that says
    distil: bool = False  # learn at last to take each of the nfe steps in a call of its own
    steps: Count = 100  # network calls with which a stage makes the pairs of the next
    nfe: Count = 1  # network calls of the model that is made in the end
    time_scale: Positive = 999.0  # the network is told this times the time, which is 0 to 1
    converted: bool = False  # begin as the teacher's own flow; else with its weights alone
    prediction: AbstractPrediction | None = None  # None: the velocity, or what the teacher's is
    two_ended: bool = False  # have more of the times near both ends; else all equally often
    loss_type: Literal["l1", "l2", "pseudo_huber"] = "l2"  # on pairs; images have l2
    lpips: Path | None = field(default=None, metadata=BY_CONTENT)  # LPIPS weights, to use on pairs
    solver: Literal["euler", "same_noise"] = "euler"  # same_noise goes back to the first noise
    student: AbstractNetConfig | None = None  # the network to train; else a copy of the teacher's

    def __post_init__(self):
        check(self, "RectifiedFlow: ")

    def on(self, teacher: Teacher) -> "RectifiedFlow":
        known = self.prediction or not self.converted
        return self if known else replace(self, prediction=on_path(teacher.denoiser))

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        if self.on(teacher) != self:
            raise ValueError("RectifiedFlow: converts a teacher; use method.on(teacher)")
        lpips = {"lpips": LPIPS.load(self.lpips)} if self.lpips and self.feeds == "pairs" else {}
        return nn.ModuleDict({"student": student_net(teacher, self.student), **lpips})

    @property
    def train(self) -> dict[str, float]:
        return {"ema_decay": self.reflow_ema} if self.feeds == "pairs" and self.reflow_ema else {}

    @property
    def _last(self) -> bool:  # the stage that distils
        return self.feeds == "pairs" and self.distil and not self.reflow

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        error, made, t = self.errors(modules["student"], batch)
        if self.feeds == "images":
            return losses.mean(error, "l2")  # whose minimum is the mean velocity
        if self._last:
            loss = losses.mean((made - batch.x0) / t, self.loss_type)
        elif self.loss_type == "pseudo_huber":
            loss = ((1 - t.flatten()) * losses.relative_huber(error)).mean()
        else:
            loss = losses.mean(error, self.loss_type)
        if not self.lpips:
            return loss
        alike = (modules["lpips"](made, batch.x0) / t.flatten()).mean()
        return alike if self._last else loss + alike

    def errors(self, net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return ds.methods.flow.path.errors at the random times of a batch."""
        t = batch.draws.uniform(_TIMES)
        if self._last:
            t = (times.grid(batch.draws, _TIMES, self.nfe) + 1).double() / self.nfe
        elif self.two_ended:
            t = times.two_ended(batch.draws, _TIMES)
        return errors(net, self.prediction or self.time_scale, batch, t)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the network with what it was trained to predict."""
        return Denoiser(net, PATH, self.prediction or Velocity(self.time_scale))

    def times(self, nfe: int) -> grids.Grid:
        return tuple(map(self.denoiser(nn.Identity()).c_noise, self._grid(nfe)))

    def _grid(self, nfe: int) -> grids.Grid:
        grid = grids.uniform(nfe, PATH)
        if self._last and self.nfe % nfe:
            raise ValueError(f"RectifiedFlow: {self.nfe} distilled steps do not make {nfe} calls")
        return grid

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
        return integrate(denoiser, _SOLVERS[self.solver], self._grid(nfe), z)

    def result(self, net: nn.Module) -> Teacher:
        return Teacher(self.denoiser(net), _SOLVERS[self.solver], self._grid(self.nfe))

    def stages(self) -> tuple[AbstractMethod, ...]:
        flow = [replace(self, reflow=0, distil=False)] * (self.feeds == "images")
        again = [replace(self, feeds="pairs", reflow=1, distil=False)] * self.reflow
        last = [replace(self, feeds="pairs", reflow=0)] * self.distil
        *made, end = [*flow, *again, *last] or [self]
        first, *rest = *(replace(stage, nfe=self.steps) for stage in made), end
        return first, *(replace(stage, student=None) for stage in rest)

    def trial(self) -> Trial:
        fitted, bars = {"time_scale": 1.0}, {1: 0.055, 100: 0.05}
        if self.feeds == "images" and not self.reflow:
            return Trial(fitted, bars={100: 0.05})
        if self.feeds == "pairs":
            return Trial(fitted, bars={1: 0.05} if self._last else bars, agreement=0.97)
        fitted["distil"], bent = True, {"reflow": 0, "distil": False, "nfe": self.steps}
        return Trial(fitted, bars={1: 0.05}, agreement=0.97, controls={"before reflow": bent})

    def measure(self, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
        return proof.measure(self, net, z)

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
