"""MeanFlow: learn the average velocity between two times, so that one step covers them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.methods import losses, times
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.derivatives import Way, along
from ds.methods.flow.path import PATH, jumps, point, rowwise
from ds.methods.networks import untold
from ds.methods.proof import Check, Trial
from ds.methods.proofs import mean_flow as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig, MLPConfig
from ds.nets.base import NO_CLASS, told
from ds.pairs.sources import Batch
from ds.system.config import Between, NotNegative, Positive, Share, check

# Streams of random numbers: of two times, of the choice to make them one, and of labels left out.
_TIMES = 0x6B0D27F94E1CA385, 0x2E97B54A08F36DC1, 0x51A3E8D76C4F0B29
_LABEL = 0x70D9163BFA8245EC
Mean = Annotated[float, Between(-20, 20)]


@dataclass(frozen=True)
class MeanFlow(AbstractMethod):
    """Learn u(x, t, h), the average velocity of the flow from time t back to r = t - h.

    Differentiating h * u = (integral of v from r to t) along the flow gives u = v - h * du/dt.
    The right side, with the network's own derivative and no gradient, is the target. The path is
    the straight line, v = noise - x0, and a step is x_r = x_t - h * u. Each row of the loss is
    divided by (|error|**2 + offset)**power. Geng et al. 2025, arXiv:2505.13447.

    The network is net(x, t, h=h). The derivative of its time embedding is part of the target, so
    the embedding's frequencies must be low: at most about 6 for times from 0 to 1. A network with
    classes can learn the flow that guidance would follow; a step of it still takes one call.
    """

    feeds: ClassVar = "images"

    # 0: least squares; more: large errors count less; None: 0.75, or 0 for rows under 256 numbers
    power: NotNegative | None = None
    offset: Positive = 1e-3  # keeps the weight of small errors finite
    equal: Share = 0.25  # share of rows with h = 0, which learn the velocity itself
    # both times are sigmoids of normal numbers with this mean; the later one is t
    time_mean: Mean = -2.0
    time_std: Positive = 2.0
    # mean and std of a normal number of r's own; it is cut to t, so more rows have h = 0
    end_times: tuple[Mean, Positive] | None = None
    guidance: NotNegative = 1.0  # scale of the guidance that is learnt; 1: none
    kappa: Share = 0.0  # share of the network's own guided velocity in what it learns
    label_dropout: Share = 0.1  # share of rows that learn the flow of no class, for guidance
    # of the network: in forward mode, or by central differences, which have an error
    derivative: Way = "exact"
    student: AbstractNetConfig | None = None  # the network to train; else the teacher's, told h too

    def __post_init__(self):
        check(self, "MeanFlow: ")

    @property
    def guided(self) -> bool:
        """Whether the velocity to learn is another than that of the data."""
        return (self.guidance, self.kappa) != (1, 0)

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        student = student_net(teacher, self.student, "h")
        if self.guided and not told(student)[1]:
            raise ValueError(
                f"MeanFlow: guidance {self.guidance} and kappa {self.kappa} need a network with "
                f"classes, and this one has none; use guidance 1 and kappa 0"
            )
        return nn.ModuleDict({"student": student})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        return self.weighted(self.error(modules["student"], *self.rows(modules["student"], batch)))

    def weighted(self, error: Tensor) -> Tensor:
        """Return the loss of an error [N, *shape]. Eq. 22."""
        power = (0.75 if error[0].numel() >= 256 else 0.0) if self.power is None else self.power
        return losses.adaptive(error, power, self.offset).mean()

    def rows(self, net: nn.Module, batch: Batch) -> tuple[Any, ...]:
        """Return x, the velocity to learn there, t, h, and what the network is told besides."""
        start = self.time_mean, self.time_std
        pair = times.pair(batch.draws, _TIMES, self.equal, start, self.end_times)
        t, h = (time.to(batch.x0) for time in pair)
        x, v, cond = point(batch, t), batch.noise - batch.x0, batch.cond
        if not self.guided:
            return x, v, t, h, cond
        cond = untold(batch, _LABEL, self.label_dropout)
        none = {**cond, "label": torch.full_like(cond["label"], NO_CLASS)}
        with torch.no_grad():
            now, free = (net(x, t, h=torch.zeros_like(t), **c) for c in (cond, none))
        asked = rowwise(cond["label"] != NO_CLASS, x)
        return x, torch.where(asked, self.toward(v, now, free), v), t, h, cond

    def toward(self, v: Tensor, now: Tensor, free: Tensor) -> Tensor:
        """Return v of the guided flow from the data's, and u at h = 0 with a class and without."""
        omega = self.guidance * (1 - self.kappa)
        return omega * v + self.kappa * now + (1 - omega - self.kappa) * free  # Eq. 21

    def error(
        self, net: nn.Module, x: Tensor, v: Tensor, t: Tensor, h: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        """Return u minus its target at x [N, *shape] and t [N], where the flow has velocity v."""
        # Along the flow dx = v dt. The other end of the step stays, so h grows as t does.
        one = torch.ones_like(t)
        u, du = along(_u(net, cond), (x, t, h), (v, one, one), net=net, way=self.derivative)
        return u - (v - rowwise(h, x) * du)  # Eq. 10

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # the target moves with the network, so a small loss tells nothing

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
        return jumps(_u(net, cond or {}), z, self.times(nfe))

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


def _u(net: nn.Module, cond: dict[str, Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, t, h: net(x, t, h=h, **cond)
