"""Denoising Student: the method of the paper."""

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import MOST
from ds.methods.base import AbstractMethod, Progress
from ds.methods.proof import NORMAL, Check, Formula, Trial, exact, normal_pairs
from ds.models.teacher import Teacher
from ds.pairs.sources import Batch
from ds.system.config import Between, check


@dataclass(frozen=True)
class DenoisingStudent(AbstractMethod):
    """Regress the endpoint of a deterministic sampler on its noise, in one network call.

    student(x_T) = x_T - net(x_T, t), and net starts with the teacher's weights. The difference
    x_T - x0 is a target of ordinary size; x0 itself would need the noise prediction divided by
    alpha_T = 1/157. Luhman & Luhman 2021, arXiv:2101.02388, section 3.

    The loss is the mean over elements. The paper's is the sum over the elements of an image, and
    Adam takes the same steps for both.
    """

    feeds: ClassVar = "pairs"

    loss_type: Literal["l1", "l2"] = "l2"
    # the time the network is told; the last index of the schedule, which the teacher may not visit
    t: Annotated[int, Between(0, MOST - 1)] = 999

    def __post_init__(self):
        check(self, "DenoisingStudent: ")

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        teacher.denoiser.schedule.check(self.t)
        return nn.ModuleDict({"student": copy.deepcopy(teacher.net).requires_grad_(True)})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        error = self.sample(modules["student"], batch.noise) - batch.x0
        return error.abs().mean() if self.loss_type == "l1" else error.square().mean()

    def times(self, nfe: int) -> Grid:
        if nfe != 1:
            raise ValueError(f"DenoisingStudent: makes an image in 1 network call, not {nfe}")
        return (self.t,)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        (t,) = self.times(nfe)
        return z - net(z, torch.full((z.shape[0],), t, dtype=torch.int64, device=z.device))

    def trial(self) -> Trial:
        return Trial(bars={1: 0.07}, agreement=0.97)

    def identity(self) -> tuple[Check, ...]:
        """With the way to the ODE's end as the network, the loss of the ODE's pairs vanishes."""
        pairs, moved = normal_pairs(), normal_pairs().x0.roll(1, 0)

        def loss(pairs: Batch, sign: float = 1.0) -> Tensor:
            net = Formula(lambda z, t: sign * (z - NORMAL.endpoint(z, 0, 1)))
            return self.loss(nn.ModuleDict({"student": net}), pairs, Progress(0, 1))

        wrong = {"pairs_shuffled": loss(pairs._replace(x0=moved)), "way_reversed": loss(pairs, -1)}
        return (exact("loss of the ODE's pairs", loss(pairs), **wrong),)
