"""Discrete MeanFlow: average velocities by ever smaller steps, and a derivative only at last."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.methods.base import AbstractMethod, Progress
from ds.methods.flow.mean_flow import MeanFlow
from ds.methods.flow.path import rowwise
from ds.methods.flow.rectified_flow import RectifiedFlow
from ds.methods.proof import Check, Trial
from ds.methods.proofs import discrete_mean_flow as proof
from ds.models.teacher import Teacher
from ds.nets import MLPConfig
from ds.pairs.sources import Batch
from ds.system.config import Between, check


@dataclass(frozen=True)
class DiscreteMeanFlow(AbstractMethod):
    """Learn average velocities from steps that shrink, then as MeanFlow does.

    The run is cut into stages of equal length. The first learns the velocity of the flow, or goes
    on with a teacher that knows it: one of RectifiedFlow with time_scale 1. Stage i from 1 on takes
    a step d = h / ratio**i along the flow, and adds what u says of the rest: its target, without
    gradient, is (d * v + h * u(x - d * v, t - d, h - d)) / (d + h) (Eq. 5). The last stage is
    MeanFlow, the limit of small steps, and the only one that differentiates the network. The weight
    of the data in a target falls with d, so too many stages learn little. Hsu & Wood 2026,
    arXiv:2604.08837.

    That the stages are 6 and the ratio is 2 is our choice: the paper's values are not known here.
    """

    feeds: ClassVar = "images"

    # the last stage; the others share its times, weights and guidance
    last: MeanFlow = field(default_factory=MeanFlow)
    num_stages: Annotated[int, Between(2, 100)] = 6  # of equal length
    ratio: Annotated[float, Between(1, 1e6, "(]")] = 2.0  # by which steps shrink in each stage
    # steps are shares of h in the time t, or in the noise level t / (1 - t), as in the best runs of
    # the paper
    even_in: Literal["time", "sigma"] = "time"

    def __post_init__(self):
        check(self, "DiscreteMeanFlow: ")

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        return self.last.init(teacher)

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        stage = progress.step * self.num_stages // progress.total
        if stage >= self.num_stages - 1:
            return self.last.loss(modules, batch, progress)
        net = modules["student"]
        x, v, t, h, cond = self.last.rows(net, batch)
        if stage == 0:
            return self.last.weighted(net(x, t, h=h, **cond) - v)
        return self.last.weighted(self.error(net, x, v, t, h, cond, self.share(t, h, stage)))

    def share(self, t: Tensor, h: Tensor, stage: int) -> Tensor:
        """Return the step of a stage as a share of h, [N]."""
        share = self.ratio ** -torch.full_like(t, stage)  # a tensor: one graph for all stages
        if self.even_in == "time":
            return share
        level = 1 - t  # in the noise level, where a step ends at sigma - share * (sigma - sigma_r)
        return share * level / ((1 - share) * (level + h) + share * level)

    def error(
        self,
        net: nn.Module,
        x: Tensor,
        v: Tensor,
        t: Tensor,
        h: Tensor,
        cond: dict[str, Tensor],
        share: Tensor,
    ) -> Tensor:
        """Return u minus its target at x [N, *shape] and t [N], by a step of a share [N] of h."""
        d, part = share * h, rowwise(share, x)
        with torch.no_grad():
            left = net(x - rowwise(d, x) * v, t - d, h=h - d, **cond)
        return net(x, t, h=h, **cond) - (part * v + left) / (part + 1)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # as for MeanFlow

    def times(self, nfe: int) -> Grid:
        return self.last.times(nfe)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        return self.last.sample(net, z, nfe=nfe, cond=cond)

    def trial(self) -> Trial:
        fitted = MeanFlow(power=0.0, time_mean=0.0, time_std=1.7)
        return Trial(
            {"last": fitted},
            net=MLPConfig(conditions=("h",)),
            bars={1: 0.15, 2: 0.10},
            steps=4000,
            controls={"flow alone": RectifiedFlow(reflow=0, time_scale=1.0, student=MLPConfig())},
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
