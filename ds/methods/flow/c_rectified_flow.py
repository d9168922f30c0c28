"""c-rectified flow: a rectified flow that lowers a convex cost of transport."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.flow.path import point
from ds.methods.flow.rectified_flow import RectifiedFlow
from ds.methods.proof import Check, Trial
from ds.methods.proofs import c_rectified_flow as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.nets.potential import Cost, Potential, fenchel_young
from ds.pairs.sources import Batch
from ds.system.config import Count, Positive, check

_TIMES = 0x83D5E1F7240BC96A  # the stream of the times


@dataclass(frozen=True)
class CRectifiedFlow(AbstractMethod):
    """Regress noise - x0 with a velocity that comes from a potential: grad c*(grad f).

    Rectified flow lowers every convex cost of a coupling a little, and stops where lines no longer
    cross, such as at a rotation. Among velocities of this form it lowers the one cost E c(noise -
    x0) further, round by round, as far as optimal transport if all goes well, and keeps the
    marginal distributions. Liu 2022, arXiv:2209.14577. The loss is the Fenchel-Young one,

        c*(grad f) - <grad f, noise - x0> + c(noise - x0),

    at least 0, and 0 where the velocity is noise - x0. Ours is divided by the number of elements.
    Our time grows with noise, and so the velocity points to it. For the quadratic cost c* = c, and
    the loss is half the squared error of a gradient field. ds.nets.Potential has both costs.

    The paper's claim that only an optimal coupling stays as it is has a gap: where data come in
    parts that do not touch, others may stay too. Hertrich et al. 2025, arXiv:2505.19712, construct
    some. Data with full support, as a little noise added to images makes them, are on the safe
    side. A round learns from what the last one made, so errors add up; pair the noise with real
    images near x0 between rounds where that matters.

    The network is the student's, which a ds.nets.Potential differentiates in x: a call costs about
    three forwards, and training differentiates twice. The engine does not run it.
    """

    feeds: Literal["images", "pairs"] = "images"  # "pairs": start from a coupling that is given
    rounds: Count = 1  # rounds of training; from the second on, on pairs made by the last
    cost: Cost = "quadratic"  # c: half the square of the distance, or a quarter of its 4th power
    steps: Count = 100  # network calls with which a round makes the pairs of the next
    nfe: Count = 10  # network calls of the model that is made in the end
    time_scale: Positive = 999.0  # the network is told this times the time, which is 0 to 1
    # the network that the potential is made of; else a copy of the teacher's
    student: AbstractNetConfig | None = None

    def __post_init__(self):
        check(self, "CRectifiedFlow: ")

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        if isinstance(teacher.net, Potential):  # made by the round before
            teacher = teacher.using(teacher.net.net)
        return nn.ModuleDict({"student": Potential(student_net(teacher, self.student), self.cost)})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        t = batch.draws.uniform(_TIMES)
        x = point(batch, t)
        told = (self.time_scale * t).to(x.dtype)
        p = modules["student"](x, told, slope=True, **batch.cond)
        return fenchel_young(p, batch.noise - batch.x0, self.cost).mean()

    @property
    def _flow(self) -> RectifiedFlow:
        """The rectified flow that samples with the same velocity."""
        return RectifiedFlow(reflow=0, nfe=self.nfe, time_scale=self.time_scale)

    def times(self, nfe: int) -> Grid:
        return self._flow.times(nfe)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        return self._flow.sample(net, z, nfe=nfe, cond=cond)

    def result(self, net: nn.Module) -> Teacher:
        return self._flow.result(net)

    def stages(self) -> tuple[AbstractMethod, ...]:
        if self.rounds == 1:
            return (self,)
        first = replace(self, rounds=1, nfe=self.steps)
        again = replace(first, feeds="pairs", student=None)
        return (first, *[again] * (self.rounds - 2), replace(again, nfe=self.nfe))

    def trial(self) -> Trial:
        return Trial(
            {"feeds": "pairs", "rounds": 1, "time_scale": 1.0},
            steps=600,
            rows=proof.Rotated,
            controls={"rectified flow": RectifiedFlow("pairs", time_scale=1.0)},
        )

    def measure(self, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
        return proof.measure(self, net, z)

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
