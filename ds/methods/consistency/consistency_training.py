"""Consistency training: a consistency model from data alone, without a teacher."""

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
from ds.methods.networks import follow, target_of
from ds.methods.proof import Check, Trial
from ds.methods.proofs.consistency import consistency_training as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.nets.lpips import LPIPS
from ds.pairs.sources import Batch
from ds.system.config import BY_CONTENT, Between, Natural, NotNegative, Positive, Share, check

_LEVELS = 0x59E2C7B31A8D604F  # the stream of the levels


@dataclass(frozen=True)
class ConsistencyTraining(AbstractMethod):
    """Train f(x, sigma) to be alike at two noise levels of one image and one noise.

    Given x_t, x_u = x0 + u * noise is on average Euler's step of the exact ODE, so no teacher is
    needed. The price is its variance, which grows with the number of levels N, while the error of
    the step falls. So N rises in the course of a run, and the target follows ever more slowly. Song
    et al. 2023, arXiv:2303.01469, Algorithm 3, Eq. 10 and appendix C.

    In mu the paper has N, and the released code the number of steps between the levels, N - 1.
    """

    feeds: ClassVar = "images"

    start_levels: Annotated[int, Between(2, 10_000)] = 2  # s0: noise levels at the start
    end_steps: Annotated[int, Between(1, 10_000)] = 150  # s1: steps between levels at the end
    target_decay: Share = 0.9  # mu0: of the target's average, where there are s0 steps
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    sigma_data: Positive = 0.5  # standard deviation of the data
    noise_scale: Positive = 0.25  # the network is told this times log(sigma)
    loss_type: Literal["l1", "l2", "huber"] = "l2"
    huber: NotNegative = 5.4e-4  # width of the Huber loss, times the root of the elements of a row
    # a file of LPIPS weights; the loss then is LPIPS alone, of images
    lpips: Path | None = field(default=None, metadata=BY_CONTENT)
    # the levels of a sample of as many calls, such as 0, 106; other numbers have even ones
    indices: tuple[Natural, ...] = ()
    clip: bool = False  # every sample is clipped to [-1, 1], also before noise is added to it again
    student: AbstractNetConfig | None = None  # the network to train; else a copy of the teacher's

    def __post_init__(self):
        check(self, "ConsistencyTraining: ")
        if self.start_levels > self.end_steps + 1:
            raise ValueError(
                f"ConsistencyTraining: start_levels ({self.start_levels}) must be at most "
                f"end_steps + 1 ({self.end_steps + 1})"
            )
        levels = self.indices, self.end_steps + 1, self.sigma_min, self.sigma_max
        check_levels("ConsistencyTraining", *levels)

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        student = start(teacher, self.student, self.noise_scale)
        lpips = {"lpips": LPIPS.load(self.lpips)} if self.lpips else {}
        return nn.ModuleDict({"student": student, "target": target_of(student), **lpips})

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the consistency function of a network: its x0 is the end of the ODE."""
        prediction = Bounded(self.sigma_data, self.noise_scale, self.sigma_min)
        return Denoiser(net, EDM(self.sigma_max), prediction)

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        steps = self.steps(progress, batch.x0.device)
        i = (batch.draws.uniform(_LEVELS) * steps).long()
        lpips = modules["lpips"] if self.lpips else None
        pair = self.ends(modules, batch, i, steps + 1)
        return distance(*pair, self.loss_type, self.huber, lpips)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # a network that maps everything to one point has the loss 0

    def steps(self, progress: Progress, device: torch.device | str = "cpu") -> Tensor:
        """Return N', the number of steps between levels, as a tensor: one graph for all N."""
        k = torch.full((), progress.step, dtype=torch.float64, device=device) / progress.total
        s0, s1 = self.start_levels, self.end_steps
        return ((k * ((s1 + 1) ** 2 - s0**2) + s0**2).sqrt() - 1).ceil().clamp(min=1)

    def decay(self, progress: Progress) -> float:
        """Return mu, the decay of the target in a step of the run."""
        return self.target_decay ** (self.start_levels / self.steps(progress).item())

    def ends(
        self, modules: nn.ModuleDict, batch: Batch, i: Tensor, count: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """Return f at levels i [N] of `count`, and its target, one level nearer to the data."""
        t, s = (karras(k, count, self.sigma_min, self.sigma_max) for k in (i, i + 1))
        nets = modules["student"], modules["target"]
        f, target = (self.denoiser(net).given(**batch.cond) for net in nets)
        return ends(f, noisy(batch, t), t, target, noisy(batch, s), s)

    def after_step(self, modules: nn.ModuleDict, progress: Progress) -> None:
        follow(modules["target"], modules["student"], self.decay(progress))

    def times(self, nfe: int) -> Grid:
        return tuple(map(self.denoiser(nn.Identity()).c_noise, self._visited(nfe)))

    def _visited(self, nfe: int) -> Grid:
        count = self.end_steps + 1
        return visited(nfe, self.indices, count, self.sigma_min, self.sigma_max)

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
            {"sigma_data": 0.95, "end_steps": 20},
            bars={1: 0.30, 2: 0.27},
            agreement=0.88,
            controls={"as many levels as for images": {"end_steps": 150}},
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
