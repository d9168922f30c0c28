"""sCM: train a consistency function by its derivative along a flow, instead of by steps."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import AbstractPrediction, TrigFlow
from ds.diffusion.schedules import Trig
from ds.diffusion.solvers import Renoise, integrate
from ds.methods import losses, times
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.derivatives import Way, along
from ds.methods.flow.path import on_path, rowwise
from ds.methods.networks import Frozen, Weight
from ds.methods.proof import Check, Trial
from ds.methods.proofs.consistency import simplified_consistency_model as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig, MLPConfig
from ds.pairs.sources import Batch
from ds.system.config import Between, Count, Natural, Positive, check, require

_TIMES = 0x3DEC52C2AA768954  # the stream of the times


@dataclass(frozen=True)
class SimplifiedConsistencyModel(AbstractMethod):
    """Train f(x, t) to stay the same along a flow, so that it is the flow's end.

    On the arc x_t = cos(t) * x0 + sin(t) * sigma_data * eps, with F the velocity of ds.TrigFlow, f
    is cos(t) * x - sin(t) * sigma_data * F. The loss moves F by g = cos(t) * df/dt, where df/dt is
    f's derivative along dx/dt and has no gradient. At t = 0, f(x) = x by construction. sCD follows
    the flow of a teacher. sCT follows every row's own line of data and noise, whose mean is the
    data's flow. Lu & Song 2024, arXiv:2410.11081, Algorithm 1.

    While `warmup` lasts, even the right F has g other than 0. A run that is shorter than twice that
    warms up in its first half. g holds the derivative of the time embedding, whose frequencies must
    be low: at most about 6 for times from 0 to pi / 2. EDM's networks are told log(sigma) / 4,
    which is low enough, and DDPM's indices are not: convert the one, and not the other.
    """

    feeds: ClassVar = "images"

    # teacher: sCD, which follows the teacher's flow; data: sCT, which needs only its network
    flow: Literal["teacher", "data"] = "teacher"
    sigma_data: Positive = 0.5  # standard deviation of the data
    # mean and standard deviation of log(sigma_data * tan(t)), the noise level
    log_sigma: tuple[Annotated[float, Between(-20, 20)], Positive] = (-1.0, 1.4)
    normalize: bool = True  # replace g by g / (rms of g + 0.1), row by row
    learned_weight: bool = True  # learn how much each time counts; else all count alike
    warmup: Natural = 10_000  # steps in which the second half of g rises from 0
    sigma_max: Positive = 80.0  # noise level where sampling begins
    second: Annotated[float, Between(0.0, 1.5, "()")] = 1.1  # t of the second of two calls
    converted: bool = False  # begin as the teacher itself; else with its weights alone
    prediction: AbstractPrediction | None = None  # None: F, or what the teacher's is
    derivative: Way = "exact"  # of the network: in forward mode, or by central differences
    student: AbstractNetConfig | None = None  # the network to train; else a copy of the teacher's

    def __post_init__(self):
        check(self, "SimplifiedConsistencyModel: ")

    @property
    def path(self) -> Trig:
        """The arc from data to noise."""
        return Trig(self.sigma_data)

    def on(self, teacher: Teacher) -> "SimplifiedConsistencyModel":
        known = self.prediction or not self.converted
        return self if known else replace(self, prediction=on_path(teacher.denoiser, self.path))

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        if self.on(teacher) != self:
            raise ValueError("SimplifiedConsistencyModel: converts; use method.on(teacher)")
        weight = {"weight": Weight()} if self.learned_weight else {}
        frozen = {"teacher": Frozen(teacher.denoiser, self.path)} if self.flow == "teacher" else {}
        return nn.ModuleDict({"student": student_net(teacher, self.student), **weight, **frozen})

    def denoiser(self, net: nn.Module) -> Denoiser:
        """Return the consistency function of a network: its x0 is the end of the flow."""
        return Denoiser(net, self.path, self.prediction or TrigFlow(self.sigma_data))

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        x, t, slope = self.rows(modules, batch)
        F, dF = self.velocity(modules["student"], x, t, slope, batch.cond)
        g = self.tangent(F.detach(), dF, x, t, slope, self.ramp(progress, t))
        if self.normalize:
            g = g / (rowwise(losses.squares(g) / g[0].numel(), g).sqrt() + 0.1)
        size = losses.squares(F - F.detach() - g) / g[0].numel()  # F moves to F + g as it is now
        w = modules["weight"](t) if self.learned_weight else torch.zeros_like(size)
        return (w.exp() * size - w).mean()  # Eq. 8

    def rows(self, modules: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return x of every row, its time in float64 [N], and dx/dt there."""
        level = times.log_normal(batch.draws, _TIMES, *self.log_sigma)
        t = self.path.times_of(level)  # float32 near pi / 2 would leave cos(t) few digits
        alpha, sigma = self.path.gather(t, batch.x0)
        x0, eps = batch.x0, batch.noise
        x = alpha * x0 + sigma * eps
        if self.flow == "teacher":
            with torch.no_grad():
                x0, eps = modules["teacher"](x, t, batch.cond)
        return x, t, self.slope(x0, eps, t)

    def slope(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return dx/dt = cos(t) * sigma_data * eps - sin(t) * x0, [N, *shape]."""
        alpha, sigma = self.path.gather(t, x0)
        return self.sigma_data * alpha * eps - sigma / self.sigma_data * x0

    def velocity(
        self, net: nn.Module, x: Tensor, t: Tensor, slope: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return F and cos(t) * sin(t) * dF/dt, [N, *shape] each, where dx/dt is `slope`.

        The product is small where dF/dt is large, near the noise: section 4.1.
        """
        denoiser = self.denoiser(net).given(**cond)

        def F(x: Tensor, t: Tensor) -> Tensor:
            x0, eps = denoiser(x, t)
            return self.slope(x0, eps, t) / self.sigma_data

        rate = t.cos() * t.sin()
        tangents = rowwise(rate, x).to(x) * slope, rate
        return along(F, (x, t), tangents, net=net, way=self.derivative)

    def tangent(
        self, F: Tensor, dF: Tensor, x: Tensor, t: Tensor, slope: Tensor, r: Tensor
    ) -> Tensor:
        """Return g = cos(t) * df/dt by what `velocity` says; r [N] is 1 in the end. Algorithm 1."""
        cos, sin, r = (rowwise(number, x).to(x) for number in (t.cos(), t.sin(), r))
        data = self.sigma_data
        return -(cos**2) * (data * F - slope) - r * (cos * sin * x + data * dF)

    def ramp(self, progress: Progress, t: Tensor) -> Tensor:
        """Return how far the warm-up is, from 0 to 1, for every row, [N]."""
        steps = min(self.warmup, progress.total // 2)
        done = torch.full_like(
            t, progress.step if steps else 1
        )  # a tensor: one graph for all steps
        return (done / max(steps, 1)).clamp(max=1)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # the loss is |g| whatever the network, so it tells nothing

    def times(self, nfe: int) -> Grid:
        return tuple(map(self.denoiser(nn.Identity()).c_noise, self.visited(nfe)))

    def visited(self, nfe: int) -> Grid:
        """Return the times at which a sample calls the network."""
        require("SimplifiedConsistencyModel", Count, nfe=nfe)
        first = math.atan(self.sigma_max / self.sigma_data)
        even = tuple(first * (1 - i / nfe) for i in range(nfe))
        return (first, self.second) if nfe == 2 else even

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        f, grid = self.denoiser(net).given(**(cond or {})), self.visited(nfe)
        return integrate(f, Renoise(), grid, self.path.prior(z, grid[0]), draws=draws)

    def trial(self) -> Trial:
        fitted = {"sigma_data": 0.95, "warmup": 500, "normalize": False, "learned_weight": False}
        wrong = {"high frequencies": {"student": MLPConfig(frequencies=(64.0, 0.5))}}
        sCD, sCT = ({1: 0.08, 2: 0.08}, 0.97), ({1: 0.4, 2: 0.2}, 0.8)
        bars, agree = sCD if self.flow == "teacher" else sCT
        return Trial(fitted, steps=3000, bars=bars, agreement=agree, controls=wrong)

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
