"""Progressive distillation: halve the steps of a teacher again and again, until few are left."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import X0, AbstractPrediction, Eps, Rescaled, Velocity
from ds.diffusion.schedules import AbstractSchedule, Trig
from ds.diffusion.solvers import DDIM, integrate
from ds.methods import losses, times
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.denoising import Denoising
from ds.methods.flow.path import on_path, rowwise
from ds.methods.networks import Frozen
from ds.methods.proof import Check, Trial
from ds.methods.proofs import progressive_distillation as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.pairs.sources import Batch
from ds.system.config import Count, Positive, check, require

_STEPS = 0x2B86D0F1594CE73A  # the stream of the steps


@dataclass(frozen=True)
class ProgressiveDistillation(AbstractMethod):
    """Learn to do in one step of DDIM what the last stage does in two, at random steps.

    Each stage halves the steps, from `start_steps` of the teacher to `nfe`. Its student starts as a
    copy of its teacher, and is the teacher of the next. Salimans & Ho 2022, arXiv:2202.00512,
    Algorithm 2; each stage has a fresh optimiser, whose learning rate falls to 0, and no average.

    Steps are even in the time of `schedule`, to which a teacher of another one is rescaled. The
    default is the paper's, a cosine; theirs stops at sigma / alpha = exp(10). One step there ends
    at pure noise, where x0 must be predicted without a division by alpha. So a student of a teacher
    that predicts the noise starts with its weights, and predicts the velocity.

    A teacher from scratch: Denoising(Trig(), "x0", snr_weight=True), in many calls.
    """

    feeds: ClassVar = "images"
    train: ClassVar[Mapping[str, Any]] = {"lr_schedule": "linear", "ema_decay": 0.0}

    start_steps: Count = 32  # steps of the teacher; nfe times a power of two
    nfe: Count = 1  # steps of the last student
    schedule: AbstractSchedule = field(default_factory=Trig)  # in whose time steps are even
    # what the network predicts; None: what its teacher does, and x0 for a network of its own
    prediction: AbstractPrediction | None = None
    student: AbstractNetConfig | None = None  # the first network to train; else the teacher's
    last_length: Positive = 1.0  # length of the stages of 2 steps and of 1, beside the others'

    def __post_init__(self):
        check(self, "ProgressiveDistillation: ")
        halved = self.start_steps // self.nfe
        if halved < 2 or halved & (halved - 1) or self.start_steps % self.nfe:
            raise ValueError(
                f"ProgressiveDistillation: start_steps must be nfe times 2, 4, 8 or so on, not "
                f"{self.start_steps} with nfe {self.nfe}"
            )

    @property
    def length(self) -> float:
        return self.last_length if self.nfe <= 2 else 1.0

    def stages(self) -> tuple[AbstractMethod, ...]:
        twice = 2 * self.nfe
        if self.start_steps == twice:
            return (self,)
        earlier = replace(self, nfe=twice).stages()
        return *earlier, replace(self, start_steps=twice, student=None)

    def on(self, teacher: Teacher) -> "ProgressiveDistillation":
        if self.prediction:
            return self
        predicts = X0() if self.student else _undivided(on_path(teacher.denoiser, self.schedule))
        return replace(self, prediction=predicts)

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        frozen = Frozen(teacher.denoiser, self.schedule)
        return nn.ModuleDict({"student": student_net(teacher, self.student), "teacher": frozen})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        i = times.grid(batch.draws, _STEPS, self.nfe) + 1
        t = self.time(i, self.nfe)
        levels = alpha, sigma = self.schedule.gather(t, batch.x0)
        x = alpha * batch.x0 + sigma * batch.noise
        with torch.no_grad():
            wanted = self.target(cast(Frozen, modules["teacher"]), x, i, batch.cond)
        made = self.denoiser(modules["student"]).given(**batch.cond)(x, t.to(x)).x0
        return losses.truncated_snr(made - wanted, *levels).mean()

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # a stage is over where its learning rate has fallen to 0, and not before

    def target(self, teacher: Frozen, x: Tensor, i: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Return the x0 with which one step from x [N, *shape] does what two of the teacher do.

        The step is the i-th [N] from the data. Algorithm 2: x~ = (z'' - (sigma''/sigma) z) /
        (alpha'' - (sigma''/sigma) alpha), which is a mean of the teacher's two x0. Without the
        difference of z'' and z, nothing cancels where steps are small. At the data its weight is 1.
        """
        t, mid, s = (self.time(2 * i - k, 2 * self.nfe) for k in (0, 1, 2))
        first = teacher(x, t.to(x), cond)
        alpha, sigma = self.schedule.gather(mid, x)
        second = teacher(alpha * first.x0 + sigma * first.eps, mid.to(x), cond).x0
        return first.x0 + rowwise(self._weight(t, mid, s), x).to(x) * (second - first.x0)

    def _weight(self, t: Tensor, mid: Tensor, s: Tensor) -> Tensor:
        """Return what the step from mid to s adds to alpha / sigma, as a share of both, [N]."""
        (a, b), (a_mid, b_mid), (a_s, b_s) = (self.schedule.gather(u, u) for u in (t, mid, s))
        return (a_s * b_mid - b_s * a_mid) / (a_s * b - b_s * a) * (b / b_mid)

    def time(self, i: Tensor, count: int) -> Tensor:
        """Return the end far from the data of the i-th of `count` steps, float64 as i."""
        data, noise = self.schedule.data, self.schedule.noise
        return data + (noise - data) * (i.double() / count)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the network with what it was trained to predict."""
        return Denoiser(net, self.schedule, self.prediction or X0())

    def times(self, nfe: int) -> Grid:
        return tuple(map(self.denoiser(nn.Identity()).c_noise, self._grid(nfe)))

    def _grid(self, nfe: int) -> Grid:
        require("ProgressiveDistillation", Count, nfe=nfe)
        most = self.start_steps // 2  # of the first stage, if the method is not one stage alone
        if most % nfe:
            raise ValueError(f"ProgressiveDistillation: {most} steps do not make {nfe} calls")
        steps = torch.arange(nfe, 0, -1, dtype=torch.int64, device="cpu")
        return tuple(self.time(steps, nfe).tolist())

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        grid, denoiser = self._grid(nfe), self.denoiser(net).given(**(cond or {}))
        return integrate(denoiser, DDIM(), grid, self.schedule.prior(z, grid[0]))

    def result(self, net: nn.Module) -> Teacher:
        return Teacher(self.denoiser(net), DDIM(), self._grid(self.nfe))

    def trial(self) -> Trial:
        return Trial(
            {"start_steps": 32 * self.nfe},
            bars={self.nfe: 0.10},
            agreement=0.93,
            controls={"not distilled": Denoising(Trig(), "x0")},
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)


def _undivided(prediction: AbstractPrediction) -> AbstractPrediction:
    """Return the velocity in place of the noise, which says nothing of x0 where alpha is 0."""
    if isinstance(prediction, Rescaled):
        return replace(prediction, prediction=_undivided(prediction.prediction))
    return Velocity() if isinstance(prediction, Eps) else prediction
