"""Consistency distillation: map every point of a teacher's path to the same sample."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Bounded
from ds.diffusion.schedules import EDM
from ds.methods import times
from ds.methods.base import AbstractMethod, Progress
from ds.methods.consistency.levels import (
    check_levels,
    distance,
    ends,
    karras,
    noisy,
    sampled,
    start,
    visited,
)
from ds.methods.flow.path import rowwise
from ds.methods.networks import Frozen, follow, target_of
from ds.methods.proof import Check, Trial
from ds.methods.proofs.consistency import consistency_distillation as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.nets.lpips import LPIPS
from ds.pairs.sources import Batch
from ds.system.config import BY_CONTENT, Between, Natural, NotNegative, Positive, Share, check

_LEVELS = 0x3C75E1B8924DA60F  # the stream of the levels


@dataclass(frozen=True)
class ConsistencyDistillation(AbstractMethod):
    """Train f(x, sigma) to be alike at both ends of one step of the teacher's ODE.

    At sigma_min, f(x) = x by construction, so agreement from step to step makes f the endpoint of
    the ODE. Noise levels are those of EDM, alpha = 1 and sigma = t; a teacher on any other schedule
    is rescaled to them. Song et al. 2023, arXiv:2303.01469, Algorithm 2, Eq. 7 and appendix C.
    """

    feeds: ClassVar = "images"

    num_levels: Annotated[int, Between(2, 10_000)] = 18  # noise levels between which f must agree
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    sigma_data: Positive = 0.5  # standard deviation of the data
    noise_scale: Positive = 0.25  # the network is told this times log(sigma)
    solver: Literal["heun", "euler"] = "heun"  # of the step along the teacher's ODE
    loss_type: Literal["l1", "l2", "huber"] = "l2"
    huber: NotNegative = 5.4e-4  # width of the Huber loss, times the root of the elements of a row
    # a file of LPIPS weights; the loss then is LPIPS alone, of images
    lpips: Path | None = field(default=None, metadata=BY_CONTENT)
    # of the average of the student that makes the targets; 0: the student itself, no gradient
    target_decay: Share = 0.0
    # the levels of a sample of as many calls, such as 0, 22; other numbers have even ones
    indices: tuple[Natural, ...] = ()
    clip: bool = False  # every sample is clipped to [-1, 1], also before noise is added to it again
    student: AbstractNetConfig | None = None  # the network to train; else a copy of the teacher's

    def __post_init__(self):
        check(self, "ConsistencyDistillation: ")
        levels = self.indices, self.num_levels, self.sigma_min, self.sigma_max
        check_levels("ConsistencyDistillation", *levels)

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        student = start(teacher, self.student, self.noise_scale)
        modules = {"student": student, "teacher": Frozen(teacher.denoiser, self.path)}
        if self.target_decay:
            modules["target"] = target_of(student)
        if self.lpips:
            modules["lpips"] = LPIPS.load(self.lpips)
        return nn.ModuleDict(modules)

    @property
    def path(self) -> EDM:
        """The path of the noise levels."""
        return EDM(self.sigma_max)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the consistency function of a network: its x0 is the end of the ODE."""
        prediction = Bounded(self.sigma_data, self.noise_scale, self.sigma_min)
        return Denoiser(net, self.path, prediction)

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        pair = self.ends(modules, batch, times.grid(batch.draws, _LEVELS, self.num_levels - 1))
        lpips = modules["lpips"] if self.lpips else None
        return distance(*pair, self.loss_type, self.huber, lpips)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # a network that maps everything to one point has the loss 0

    def ends(self, modules: nn.ModuleDict, batch: Batch, i: Tensor) -> tuple[Tensor, Tensor]:
        """Return f at levels i [N], and its target, f one step of the teacher nearer to data."""
        t, s = (karras(k, self.num_levels, self.sigma_min, self.sigma_max) for k in (i, i + 1))
        x = noisy(batch, t)
        nets = modules["student"], modules["target" if self.target_decay else "student"]
        f, target = (self.denoiser(net).given(**batch.cond) for net in nets)
        nearer = self.step(modules["teacher"], x, t, s, batch.cond)
        return ends(f, x, t, target, nearer, s)

    @torch.no_grad()
    def step(
        self, teacher: nn.Module, x: Tensor, t: Tensor, s: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        """Follow the teacher's ODE dx/dt = eps from levels t [N] to s [N]. Eq. 6."""
        h, slope = rowwise(s - t, x).to(x), teacher(x, t, cond).eps
        end = x + h * slope
        if self.solver == "euler":
            return end
        return x + h / 2 * (slope + teacher(end, s, cond).eps)

    def after_step(self, modules: nn.ModuleDict, progress: Progress) -> None:
        if self.target_decay:
            follow(modules["target"], modules["student"], self.target_decay)  # Eq. 8

    def times(self, nfe: int) -> Grid:
        return tuple(map(self.denoiser(nn.Identity()).c_noise, self._visited(nfe)))

    def _visited(self, nfe: int) -> Grid:
        return visited(nfe, self.indices, self.num_levels, self.sigma_min, self.sigma_max)

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
        return sampled(f, self._visited(nfe), z, draws, floor=self.sigma_min, clip=self.clip)

    def trial(self) -> Trial:
        return Trial(
            {"sigma_data": 0.95, "target_decay": 0.95},
            bars={1: 0.07, 2: 0.07},
            agreement=0.97,
            controls={"a single step of the teacher": {"num_levels": 2}},
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
