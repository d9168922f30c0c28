"""MeanFlow: learn the average velocity between two times, so that one step covers them."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.methods import losses, times
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.derivatives import Way, along
from ds.methods.flow.path import PATH, jumps, point
from ds.methods.proof import Check, Trial
from ds.methods.proofs import mean_flow as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig, MLPConfig
from ds.pairs.sources import Batch
from ds.system.config import Between, NotNegative, Positive, Share, check

# Streams of random numbers: of two times, and of the choice to make them one.
_ONE, _OTHER, _EQUAL = 0x6B0D27F94E1CA385, 0x2E97B54A08F36DC1, 0x51A3E8D76C4F0B29


@dataclass(frozen=True)
class MeanFlow(AbstractMethod):
    """Learn u(x, t, h), the average velocity of the flow from time t back to r = t - h.

    Differentiating h * u = (integral of v from r to t) along the flow gives u = v - h * du/dt.
    The right side, with the network's own derivative and no gradient, is the target. The path is
    the straight line, v = noise - x0, and a step is x_r = x_t - h * u. Each row of the loss is
    divided by (|error|**2 + offset)**power. Geng et al. 2025, arXiv:2505.13447.

    The network is net(x, t, h=h). The derivative of its time embedding is part of the target, so
    the embedding's frequencies must be low: at most about 6 for times from 0 to 1.
    """

    feeds: ClassVar = "images"

    # 0: plain least squares, which data of few dimensions needs; above: large errors count less
    power: NotNegative = 0.75
    offset: Positive = 1e-3  # keeps the weight of small errors finite
    equal: Share = 0.25  # share of rows with h = 0, which learn the velocity itself
    # both times are sigmoids of normal numbers with this mean
    time_mean: Annotated[float, Between(-20, 20)] = -2.0
    time_std: Positive = 2.0
    # of the network: in forward mode, or by central differences, which have an error
    derivative: Way = "exact"
    # the network to train; else the teacher's, told h too
    student: AbstractNetConfig | None = None

    def __post_init__(self):
        check(self, "MeanFlow: ")

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        return nn.ModuleDict({"student": student_net(teacher, self.student, "h")})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        t, h = (time.to(batch.x0) for time in self._times(batch.draws))
        x, v = point(batch, t), batch.noise - batch.x0
        error = self.error(modules["student"], x, v, t, h, batch.cond)
        return losses.adaptive(error, self.power, self.offset).mean()

    def error(
        self, net: nn.Module, x: Tensor, v: Tensor, t: Tensor, h: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        """Return u minus its target at x [N, *shape] and t [N], where the flow has velocity v."""

        def call(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
            return net(x, t, h=h, **cond)

        # Along the flow dx = v dt. The other end of the step stays, so h grows as t does.
        one = torch.ones_like(t)
        u, du = along(call, (x, t, h), (v, one, one), net=net, way=self.derivative)
        return u - (v - h.reshape(-1, *[1] * (x.dim() - 1)) * du)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # the target moves with the network, so a small loss tells nothing

    def _times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return t and h = t - r, [N] each."""
        one, other = (
            times.logit_normal(draws, stream, self.time_mean, self.time_std)
            for stream in (_ONE, _OTHER)
        )
        t = torch.maximum(one, other)
        apart = draws.uniform(_EQUAL) >= self.equal
        return t, apart * (t - torch.minimum(one, other))

    def times(self, nfe: int) -> Grid:
        return grids.uniform(nfe, PATH)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        def u(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
            return net(x, t, h=h, **(cond or {}))

        return jumps(u, z, self.times(nfe))

    def trial(self) -> Trial:
        high = MLPConfig(conditions=("h",), frequencies=(64.0, 0.5))
        return Trial(
            {"power": 0.0, "time_mean": 0.0, "time_std": 1.7},
            net=MLPConfig(conditions=("h",)),
            bars={1: 0.13, 2: 0.13},
            agreement=0.93,
            controls={"high frequencies": {"student": high}},
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
