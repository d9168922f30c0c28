"""rCM: a continuous consistency model whose samples a teacher and a critic judge besides."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ds.analytic import GaussianMixture
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.methods import losses
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.consistency import distribution_matching as matching
from ds.methods.consistency.simplified_consistency_model import SimplifiedConsistencyModel
from ds.methods.flow.path import rowwise
from ds.methods.proof import Check, Trial
from ds.methods.proofs.consistency import regularized_consistency_model as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig
from ds.pairs.sources import Batch
from ds.system.config import Between, Count, NotNegative, Positive, check


@dataclass(frozen=True)
class RegularizedConsistencyModel(AbstractMethod):
    """Distil by sCM, and move samples of the student to where the teacher finds them likelier.

    sCM alone keeps every mode of the data and blurs fine detail. The second part, that of DMD, is
    sharp, and drops modes when it is alone. It draws samples G of the student by up to `rollout`
    calls, adds noise to them at a random time, and moves G against

        (x0 that the critic sees - x0 that the teacher sees) / mean |G - x0 that the teacher sees|

    which is the gradient of KL(student, data) at that noise, but for a positive factor. The critic
    is a denoiser of the student's samples, and learns in turns of its own. Zheng et al. 2025,
    arXiv:2510.08431; where the paper does not say, as in the authors' code.

    Not here: their attention kernels with derivatives, video networks, and rows that are masked
    where they are not finite; the Trainer stops there.
    """

    feeds: ClassVar = "images"

    # the first part, which distils the teacher's flow; a learned weight is not used here
    consistency: SimplifiedConsistencyModel = field(
        default_factory=lambda: SimplifiedConsistencyModel(log_sigma=(-0.8, 1.6), warmup=0)
    )
    # what the warm-up ratio r multiplies in g: all of the second half, or x alone, and then also
    # sin(t) in the first, as in the code; at r = 1 both are the same
    warmup_form: Literal["paper", "code"] = "paper"
    consistency_weight: NotNegative = 100.0  # of the first part; 0: DMD alone
    score_weight: NotNegative = 1.0  # of the second part, once the warm-up is over; 0: sCM alone
    rollout: Annotated[int, Between(1, 16)] = 4  # most calls by which samples to judge are drawn
    critic_turns: Count = 4  # optimiser steps of the critic before each of the student
    # mean and std of the log noise level of what is judged, and at further calls of a roll-out
    critic_log_sigma: tuple[Annotated[float, Between(-20, 20)], Positive] = (0.0, 1.6)
    # the network to train, and that of the critic; else copies of the teacher's
    student: AbstractNetConfig | None = None

    def __post_init__(self):
        check(self, "RegularizedConsistencyModel: ")
        if self.consistency.student is not None:
            raise ValueError(
                f"RegularizedConsistencyModel: consistency.student is {self.consistency.student}, "
                f"which is not used; set `student` itself"
            )
        if self.consistency.flow != "teacher":
            raise ValueError(
                f"RegularizedConsistencyModel: consistency.flow is {self.consistency.flow!r}, but "
                f"a teacher judges the samples; set it to 'teacher'"
            )
        if not self.consistency_weight and not self.score_weight:
            raise ValueError(
                "RegularizedConsistencyModel: consistency_weight and score_weight are both 0, so "
                "nothing would be learnt; set one of them above 0"
            )

    @property
    def turns(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("critic",) * self.critic_turns * (self.score_weight > 0) + ("student",)

    def on(self, teacher: Teacher) -> "RegularizedConsistencyModel":
        return replace(self, consistency=self.consistency.on(teacher))

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        sCM = replace(self.consistency, student=self.student, learned_weight=False)
        modules = sCM.init(teacher)
        if self.score_weight:
            modules["critic"] = student_net(teacher, self.student)
        return modules

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        t, eps = matching.level(batch, self.consistency.path, self.critic_log_sigma)
        if progress.turn == "critic":
            with torch.no_grad():
                made = self.drawn(modules["student"], batch)
            return matching.criticism(self.told(modules["critic"], batch), made, t, eps).mean()
        loss, r = torch.zeros_like(t), self.consistency.ramp(progress, t)
        if self.consistency_weight:
            loss = loss + self.consistency_weight * self.inconsistency(modules, batch, r)
        if self.score_weight:
            made = self.drawn(modules["student"], batch)
            teacher = partial(modules["teacher"], cond=batch.cond)
            found = matching.moved(made, t, eps, teacher, self.told(modules["critic"], batch))
            loss = loss + self.score_weight * (r == 1) * found
        return loss.mean()

    def told(self, net: nn.Module, batch: Batch) -> Denoiser:
        """Return a student's consistency function, or a critic's denoiser, for a batch."""
        return self.consistency.denoiser(net).given(**batch.cond)

    def drawn(self, net: nn.Module, batch: Batch) -> Tensor:
        """Return samples of the student, to be judged."""
        return matching.drawn(self.told(net, batch), batch, self.rollout, self.critic_log_sigma)

    def inconsistency(self, modules: Any, batch: Batch, r: Tensor) -> Tensor:
        """Return |F - (F + g / (|g| + 0.1))|**2 of every row, [N], r [N] of the warm-up done.

        |g| is over all elements, as in the code. That of sCM is the root of their mean square.
        """
        x, t, slope = self.consistency.rows(modules, batch)
        F, dF = self.consistency.velocity(modules["student"], x, t, slope, batch.cond)
        g = self.tangent(F.detach(), dF, x, t, slope, r)
        if self.consistency.normalize:
            g = g / (rowwise(losses.squares(g), g).sqrt() + 0.1)
        return losses.squares(F - F.detach() - g)

    def tangent(
        self, F: Tensor, dF: Tensor, x: Tensor, t: Tensor, slope: Tensor, r: Tensor
    ) -> Tensor:
        """Return g as SimplifiedConsistencyModel.tangent does, or in the form of the code."""
        if self.warmup_form == "paper":
            return self.consistency.tangent(F, dF, x, t, slope, r)
        cos, sin, r = (rowwise(number, x).to(x) for number in (t.cos(), t.sin(), r))
        data = self.consistency.sigma_data
        first = cos * (1 - (r * sin) ** 2).clamp(min=0).sqrt() * (data * F - slope)
        return -first - (r * cos * sin * x + data * dF)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # as for sCM, and the critic moves with the student

    def times(self, nfe: int) -> Grid:
        return self.consistency.times(nfe)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        return self.consistency.sample(net, z, nfe=nfe, cond=cond, draws=draws)

    def trial(self) -> Trial:
        """One mode is rare. The run is short: later sCM blurs less than the critic's errors do."""
        rare = GaussianMixture(weights=(0.30, 0.20, 0.20, 0.15, 0.13, 0.02))
        parts = {"consistency_weight": 10.0, "critic_turns": 2, "rollout": 1}
        sCM = replace(self.consistency, sigma_data=0.95, normalize=False)
        return Trial(
            {**parts, "consistency": sCM, "critic_log_sigma": (-1.0, 1.4)},
            bars={1: 0.15},
            agreement=0.9,
            steps=400,
            controls={"DMD alone": {"consistency_weight": 0.0}},
            rivals={"sCM alone": {"score_weight": 0.0}},
            data=rare,
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)

    def measure(self, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
        return proof.measure(self, net, z)
