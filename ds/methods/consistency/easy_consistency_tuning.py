"""Easy consistency tuning: turn a denoiser into a consistency function, by ever smaller steps."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import AbstractPrediction, Preconditioned
from ds.diffusion.schedules import EDM
from ds.diffusion.solvers import Renoise
from ds.methods import losses, times
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.consistency.levels import ends, noisy, sampled
from ds.methods.flow.path import on_path, rowwise
from ds.methods.networks import Frozen
from ds.methods.proof import Check, Trial
from ds.methods.proofs.consistency import easy_consistency_tuning as proof
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.pairs.sources import Batch
from ds.system.config import Between, Count, Natural, NotNegative, Positive, check, require

_LEVELS, _EDGE = 0x2B97D4E0853FA61C, 0x6E14C85BF2709D3A  # streams: of levels, of the rows at `edge`
_PATH, _LEAST = EDM(), 1e-6  # the network is told this level where the target is the image itself


@dataclass(frozen=True)
class EasyConsistencyTuning(AbstractMethod):
    """Train a denoiser D to say at a level t what it says at r, which comes ever nearer to t.

    Both see one image with one noise. Where r = 0 the target is the image itself, and the loss that
    of diffusion. Stages have equal length, and that of number k, from 0 on, has

        r = max(0, t * (1 - (1 + 8 * sigmoid(-t)) / ratio**(k + 1)))

    so the first denoises below t = 1.95, and in the last of 8, r / t is 0.98 or more. The student
    begins as the teacher's denoiser. Levels are EDM's, alpha = 1 and sigma = t, and x0 is not bound
    to x at a smallest one. Geng et al. 2024, arXiv:2406.14548.

    With `truncate`, a second run trains a copy of the result above that level alone. Below it the
    result itself gives the targets; no sample goes there. Lee et al. 2024, arXiv:2410.14895.
    """

    feeds: ClassVar = "images"

    num_stages: Annotated[int, Between(1, 100)] = 8  # of equal length
    ratio: Annotated[float, Between(1, 1e6)] = 2.0  # of a stage's t - r to the next one's; 1: r = 0
    most: Annotated[float, Between(0, 1, "()")] = 0.999  # of r / t
    pretrain: Natural = 0  # stages of r = 0 before, for a network that does not denoise yet
    log_sigma: tuple[float, Positive] = (-1.1, 2.0)  # mean and standard deviation of log(t)
    sigma_data: Positive = 0.5  # standard deviation of the data
    # norm: the size of a row's error, as in the paper; squared: its square, with EDM's weights,
    # whose minimum is a mean in few dimensions too; None: squared for rows under 256 numbers
    loss_type: Literal["norm", "squared"] | None = None
    width: Positive = 1e-8  # of the norm, which is a square below; so small, it keeps slopes finite
    # of the norm: step is 1 / (t - r), output is (t**2 + sigma_data**2) / (t * sigma_data)**2
    weight: Literal["step", "output"] = "step"
    mid: tuple[Positive, ...] = (0.821,)  # levels between calls; other numbers have Karras' levels
    truncate: NotNegative = 0.0  # level above which a second run learns alone; 0: there is none
    edge: Annotated[float, Between(0, 1, "()")] = 0.25  # share of its rows that are at that level
    edge_weight: NotNegative = 0.1  # of the mean loss of these, beside that of the others
    second: bool = False  # be that second run: the teacher is a consistency function
    prediction: AbstractPrediction | None = None  # None: a copy has its teacher's, others EDM's
    student: AbstractNetConfig | None = None  # a fresh network to train; else the teacher's

    def __post_init__(self):
        check(self, "EasyConsistencyTuning: ")
        levels = _PATH.noise, *self.mid
        if [*levels] != sorted({*levels}, reverse=True) or levels[-1] < self.truncate:
            least, most = self.truncate, _PATH.noise
            raise ValueError(
                f"EasyConsistencyTuning: mid {self.mid} must fall within {least}, {most}"
            )

    def on(self, teacher: Teacher) -> "EasyConsistencyTuning":
        known = self.prediction or self.student
        return self if known else replace(self, prediction=on_path(teacher.denoiser, _PATH))

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        frozen = {"teacher": Frozen(teacher.denoiser, _PATH)} if self.second else {}
        return nn.ModuleDict({"student": student_net(teacher, self.student), **frozen})

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the consistency function of a network, its x0."""
        return Denoiser(net, _PATH, self.prediction or Preconditioned(self.sigma_data))

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        t, part = self.levels(batch.draws)
        r = self.lower(t, self.stage(progress))
        return (self.weighted(self.error(modules, batch, t, r), t, r) * part).mean()

    def levels(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return noise levels t, float64 [N], and how much rows count, float32 [N]."""
        if not self.second:
            t = times.log_normal(draws, _LEVELS, *self.log_sigma).clamp(max=_PATH.noise)
            return t.double(), torch.ones_like(t)
        t = times.late(draws, _LEVELS, self.truncate, _PATH.noise)
        at = draws.uniform(_EDGE) < self.edge
        part = torch.where(at, self.edge_weight / self.edge, 1 / (1 - self.edge))
        return t.masked_fill(at, self.truncate), part.float()

    def stage(self, progress: Progress) -> int:
        """Return the stage of a step; those that only denoise are below 0."""
        if self.second:
            return self.num_stages - 1
        count = self.pretrain + self.num_stages
        return min(progress.step * count // progress.total, count - 1) - self.pretrain

    def lower(self, t: Tensor, stage: int) -> Tensor:
        """Return the level r of the target of levels t [N], [N]."""
        step = self.ratio ** -(torch.full_like(t, stage) + 1)  # a tensor: one graph for all stages
        r = t * (1 - (1 + 8 * torch.sigmoid(-t)) * step)
        return torch.minimum(r, self.most * t).clamp(min=0)

    def error(self, modules: nn.ModuleDict, batch: Batch, t: Tensor, r: Tensor) -> Tensor:
        """Return D at levels t [N] minus its target, which is D at r [N], or the image."""
        d, s = self.denoiser(modules["student"]).given(**batch.cond), r.clamp(min=_LEAST)
        x, nearer = noisy(batch, t), noisy(batch, s)
        made, target = ends(d, x, t, d, nearer, s)
        if self.second:
            with torch.no_grad():
                first = modules["teacher"](nearer, s, batch.cond).x0
            target = torch.where(rowwise(r < self.truncate, x), first, target)
        return made - torch.where(rowwise(r > 0, x), target, batch.x0)

    def weighted(self, error: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Return the loss of each row, [N], of an error [N, *shape]."""
        output, few = t**-2 + self.sigma_data**-2, error[0].numel() < 256
        if self.loss_type == "squared" or (few and not self.loss_type):
            return losses.squares(error) * (output * t / (t - r)).to(error)
        weight = output if self.weight == "output" else 1 / (t - r)
        return losses.pseudo_huber(error, self.width) * weight.to(error)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # the target moves with the network, so a small loss tells nothing

    def times(self, nfe: int) -> Grid:
        return tuple(map(self.denoiser(nn.Identity()).c_noise, self._grid(nfe)))

    def _grid(self, nfe: int) -> Grid:
        require("EasyConsistencyTuning", Count, nfe=nfe)
        if nfe == len(self.mid) + 1:
            return _PATH.noise, *self.mid
        return grids.karras(nfe + 1, _PATH, bottom=self.truncate or grids.SMALLEST)[:-1]

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
        return sampled(f, self._grid(nfe), z, draws, floor=0.0)

    def result(self, net: nn.Module) -> Student | Teacher:
        if self.truncate and not self.second:
            return Teacher(self.denoiser(net), Renoise(), self._grid(1))
        return Student(net, self)

    def stages(self) -> tuple[AbstractMethod, ...]:
        if self.second or not self.truncate:
            return (self,)
        return self, replace(self, second=True, prediction=None, student=None)

    def trial(self) -> Trial:
        fitted, wrong = {"sigma_data": 0.95, "pretrain": 4}, {"denoising alone": {"ratio": 1.0}}
        return Trial(fitted, steps=9000, bars={1: 0.12, 2: 0.09}, agreement=0.95, controls=wrong)

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
