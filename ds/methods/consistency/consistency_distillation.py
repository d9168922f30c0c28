"""Consistency distillation: map every point of a teacher's path to the same sample."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import EDM
from ds.diffusion.solvers.base import fresh_noise
from ds.methods import losses, times
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.flow.path import rowwise
from ds.methods.networks import SharedDropout, follow, target_of
from ds.methods.proof import Check, Trial
from ds.methods.proofs import consistency_distillation as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.pairs.sources import Batch
from ds.system.config import Between, Count, NotNegative, Positive, Share, check, require

_LEVELS, _FRESH = 0x3C75E1B8924DA60F, 0x74D2806BF5193CEA


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
    # of the average of the student that makes the targets; 0: the student itself, no gradient
    target_decay: Share = 0.0
    clip: bool = False  # every sample is clipped to [-1, 1], also before noise is added to it again
    student: AbstractNetConfig | None = None  # the network to train; else a copy of the teacher's

    def __post_init__(self):
        check(self, "ConsistencyDistillation: ")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"ConsistencyDistillation: sigma_min ({self.sigma_min}) must be below sigma_max "
                f"({self.sigma_max})"
            )

    def levels(self) -> Grid:
        """Return the noise levels, from sigma_max down to sigma_min. Karras et al. 2022, Eq. 5."""
        path, most, least = EDM(self.sigma_max), self.sigma_max, self.sigma_min
        return grids.karras(self.num_levels, path, top=most, bottom=least)

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        student = student_net(teacher, self.student)
        modules = {"student": student, "teacher": self.on_levels(teacher.denoiser)}
        if self.target_decay:
            modules["target"] = target_of(student)
        return nn.ModuleDict(modules)

    def on_levels(self, denoiser: Denoiser) -> nn.Module:
        """Return a frozen denoiser on the levels: teacher(x [N, *shape], i [N], cond) -> x0."""
        return _Teacher(denoiser, self.levels())

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        error = self.error(modules, batch, times.grid(batch.draws, _LEVELS, self.num_levels - 1))
        if self.loss_type == "huber":
            return losses.pseudo_huber(error, self.huber * error[0].numel() ** 0.5).mean()
        return losses.mean(error, self.loss_type)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # a network that maps everything to one point has the loss 0

    def error(self, modules: nn.ModuleDict, batch: Batch, i: Tensor) -> Tensor:
        """Return f at levels i [N] minus its target, f one step of the teacher nearer to data."""
        student, teacher = modules["student"], cast(_Teacher, modules["teacher"])
        target = modules["target"] if self.target_decay else student
        t, s = teacher.levels[i], teacher.levels[i + 1]
        x = batch.x0 + rowwise(t, batch.x0).to(batch.x0) * batch.noise
        with torch.no_grad():
            nearer = self._step(teacher, x, i, batch.cond)
        dropout = SharedDropout(student, target, device=x.device)
        with dropout:
            f = self.f(student, x, t, batch.cond)
        with dropout, torch.no_grad():
            wanted = self.f(target, nearer, s, batch.cond)
        return f - wanted

    def _step(self, teacher: Any, x: Tensor, i: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Follow the ODE dx/dt = (x - x0) / t from level i to the next."""
        t, s = (rowwise(teacher.levels[k], x).to(x) for k in (i, i + 1))
        slope = (x - teacher(x, i, cond)) / t
        end = x + (s - t) * slope
        if self.solver == "euler":
            return end
        return x + (s - t) / 2 * (slope + (end - teacher(end, i + 1, cond)) / s)

    def f(self, net: nn.Module, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Return the sample that x [N, *shape] at noise levels sigma [N] leads to."""
        level = rowwise(sigma, x).to(x)
        skip, out = self.weights(level)
        told = (self.noise_scale * sigma.log()).to(x.dtype)
        return skip * x + out * net(x / (level**2 + self.sigma_data**2).sqrt(), told, **cond)

    def weights(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of x and of the network in f: 1 and 0 at sigma_min."""
        data, above = self.sigma_data, level - self.sigma_min
        return data**2 / (above**2 + data**2), data * above / (level**2 + data**2).sqrt()

    def after_step(self, modules: nn.ModuleDict, progress: Progress) -> None:
        if self.target_decay:
            follow(modules["target"], modules["student"], self.target_decay)

    def times(self, nfe: int) -> Grid:
        return tuple(self.noise_scale * math.log(sigma) for sigma in self._visited(nfe))

    def _visited(self, nfe: int) -> Grid:
        """Return the noise levels at which a sample calls the network, spaced like the others."""
        require("ConsistencyDistillation", Count, nfe=nfe)
        return replace(self, num_levels=nfe + 1).levels()[:-1]

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """As in the base class; every call after the first adds noise before it. Algorithm 1."""
        x = torch.zeros_like(z)
        for k, sigma in enumerate(self._visited(nfe)):
            if k == 0:
                x = sigma * z
            else:
                x = x + math.sqrt(sigma**2 - self.sigma_min**2) * fresh_noise(
                    draws, _FRESH, z, sigma
                )
            x = self.f(net, x, z.new_full((len(z),), sigma), cond or {})
            x = x.clamp(-1, 1) if self.clip else x
        return x

    def trial(self) -> Trial:
        return Trial(
            {"sigma_data": 0.95, "target_decay": 0.95},
            bars={1: 0.07, 2: 0.07},
            agreement=0.97,
            controls={"a single step of the teacher": {"num_levels": 2}},
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)


class _Teacher(nn.Module):
    """A frozen denoiser on the noise levels of EDM: teacher(x [N, *shape], i [N], cond) -> x0."""

    levels: Tensor
    times: Tensor

    def __init__(self, denoiser: Denoiser, levels: Grid):
        super().__init__()
        self.net = copy.deepcopy(denoiser.net).requires_grad_(False)
        self.denoiser = replace(denoiser, net=self.net)
        times = [denoiser.schedule.time(-math.log(sigma)) for sigma in levels]
        for name, values in (("levels", levels), ("times", times)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor, i: Tensor, cond: dict[str, Tensor]) -> Tensor:
        t = self.times[i]
        denoiser = self.denoiser.given(**cond)
        return denoiser(denoiser.schedule.gather(t, x)[0] * x, t).x0
