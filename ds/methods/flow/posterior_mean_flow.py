"""Conditional MeanFlow posterior sampler (after STMD): draw from p(x0 | x_t), step by step.

After "Stochastic Transition-Map Distillation" (STMD), Rapakoulias et al., arXiv:2605.07661, whose
code and constants are not public. From what is said of it come the conditional MeanFlow between
noise and x0, the network's conditions (s - r, s, t), the posterior of DDPM between draws, and
training without a teacher. Ours are the densities of the times and the power of the loss, which are
MeanFlow's, the straight path of x_t, and the scale of what the network is shown of x_t.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.solvers.ancestral import Posterior
from ds.diffusion.solvers.base import fresh_noise
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.flow.mean_flow import MeanFlow
from ds.methods.flow.path import PATH, point
from ds.methods.proof import Check, Misuse, Trial
from ds.methods.proofs import posterior_mean_flow as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig, MLPConfig
from ds.pairs.sources import Batch
from ds.system.config import Count, check, require

# Streams of random numbers: of outer times and their noise, and of noise in sampling.
_TIME, _NOISE = 0x35D0A4C81FB96E27, 0x6C1E7B93D52A08F4
_INNER, _BETWEEN = 0x19F86D3EA7045CB2, 0x7AB25C0E94D3618F
TOLD = ("h", "outer", "context")


@dataclass(frozen=True)
class PosteriorMeanFlow(AbstractMethod):
    """Learn the flow from noise to x0 given a noisy x_t: it draws from p(x0 | x_t), for every t.

    The inner flow is MeanFlow on y_s = (1 - s) * x0 + s * z. Its network is told the outer time t
    and x_t = (1 - t) * x0 + t * noise, both of which stay as y moves:

        u(y_s, s, h = s - r | t, x_t)  =  (z - x0) - h * du/ds      along (z - x0, 1, 1)

    A sample takes outer steps from t = 1 to 0. Each draws x0 by `inner` calls, from fresh noise,
    and then x_t' from the normal q(x_t' | x_t, x0), as DDPM does; the last returns x0. Where the
    draws are exact, so are samples in any number of steps. With up to `inner` calls there is one
    outer step, MeanFlow's own, which adds no noise to z; more need `draws`.

    The posterior depends on x_t by (1 - t) / t**2 * x_t alone. So the context is (1 - t) * x_t, in
    which nothing is lost before t = 1, where x_t says nothing and the context is 0.
    """

    feeds: ClassVar = "images"

    # the inner flow: its times, its loss and its derivative
    flow: MeanFlow = field(default_factory=MeanFlow)
    inner: Count = 2  # network calls for a draw of x0
    # the network to train, told h, outer and context; else the teacher's, told these too
    student: AbstractNetConfig | None = None

    def __post_init__(self):
        check(self, "PosteriorMeanFlow: ")
        if self.flow.student is not None:
            raise ValueError(
                f"PosteriorMeanFlow: flow.student is {self.flow.student}, which is not used; set "
                f"`student` itself"
            )

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        return self.flow.init(teacher.using(student_net(teacher, self.student, *TOLD)))

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        draws, shape = batch.draws, batch.x0.shape[1:]
        t = draws.uniform(_TIME).to(batch.x0)
        # batch.noise is the inner z. The noise of x_t is another, or it would tell z.
        x = point(batch._replace(noise=draws.normal(_NOISE, shape).to(batch.x0)), t)
        told = batch._replace(cond={**batch.cond, **self.told(x, t)})
        return self.flow.loss(modules, told, progress)

    def told(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return what the network is told of x_t [N, *shape] at outer times t [N]."""
        return {"outer": t, "context": PATH.gather(t, x)[0] * x}

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # as MeanFlow's, the target moves with the network

    def split(self, nfe: int) -> tuple[int, int]:
        """Return the outer steps of a sample and the calls in each."""
        require("PosteriorMeanFlow", Count, nfe=nfe)
        if nfe > self.inner and nfe % self.inner:
            raise ValueError(
                f"PosteriorMeanFlow: nfe is {nfe}; accepted are up to {self.inner} calls, and "
                f"multiples of {self.inner}, which are `inner`"
            )
        inner = min(nfe, self.inner)
        return nfe // inner, inner

    def times(self, nfe: int) -> Grid:
        outer, inner = self.split(nfe)
        return self.flow.times(inner) * outer

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        outer, inner = self.split(nfe)
        x = x0 = z
        for t, s in pairwise((*grids.uniform(outer, PATH), PATH.data)):
            fresh = z if t == PATH.noise else fresh_noise(draws, _INNER, z, t)
            x0 = self.draw(net, x, t, fresh, inner, cond or {})
            if s > PATH.data:
                q = Posterior.between(PATH.at(t), PATH.at(s))
                noise = fresh_noise(draws, _BETWEEN, z, t)
                x = q.x * x + q.x0 * x0 + q.small**0.5 * noise
        return x0

    def draw(
        self, net: nn.Module, x: Tensor, t: float, z: Tensor, calls: int, cond: dict[str, Tensor]
    ) -> Tensor:
        """Return draws from p(x0 | x_t), x_t = x [N, *shape], one for each noise z [N, *shape]."""
        told = self.told(x, x.new_full((x.shape[0],), t))
        return self.flow.sample(net, z, nfe=calls, cond={**cond, **told})

    def trial(self) -> Trial:
        return Trial(
            {"flow": MeanFlow(time_mean=0.0, time_std=1.7)},
            net=MLPConfig(conditions=TOLD),
            steps=4000,
            bars={4: 0.09},
            misused={"h zeroed": Misuse(proof.without_h, least=0.2)},
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)

    def measure(self, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
        return proof.measure(self, net, z)
