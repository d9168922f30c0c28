"""Drifting: pull what a generator makes towards data and push it apart, until both are alike."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.methods.base import AbstractMethod, Progress
from ds.methods.denoising_student import DenoisingStudent
from ds.methods.neighbours import EMPTY, Features, Kernel, Memory, force, pixels
from ds.methods.proof import Check, Trial
from ds.methods.proofs import drifting as proof
from ds.models.teacher import Teacher
from ds.nets.blocks import without_autocast
from ds.pairs.sources import Batch
from ds.system import distributed
from ds.system.config import BY_CONTENT, Between, Natural, Positive, check

_BANDWIDTHS = {"laplace": (0.02, 0.05, 0.2), "gaussian": (0.05, 0.15, 0.5)}


@dataclass(frozen=True)
class Drifting(AbstractMethod):
    """Regress one-step samples on themselves, moved by a field that is 0 where they match data.

    The field pulls a sample x to real rows y and pushes it from other samples z. With affinities a,
    and sums over rows,

        force(x)  =  sum a(x, z) * sum a(x, y) y  -  sum a(x, y) * sum a(x, z) z

    The kernel "laplace" is that of practice: a = sqrt(softmax over y and z * softmax over x) of
    -|x - y| / tau. The forces of each tau are scaled to the root mean square 1, and summed. Deng et
    al. 2026, arXiv:2602.04770, Algorithm 2 and Eqs. 20 to 26.

    The kernel "gaussian" is that of theory: a = softmax of -|x - y|**2 / (2 * tau**2), over y and z
    apart. The force is then tau**2 times the difference of the scores of data and samples, both
    smoothed by tau. Lai et al. 2026, arXiv:2603.07514.

    A sample does not push itself. Rows with labels meet rows of their class alone. Rows are divided
    by S, the mean distance over the root of the dimension, and the loss is |x / S - sg(x / S +
    force)|**2. No teacher is needed: its network is only where the student starts.

    The loss compares all rows of a batch, so a batch needs many of each class, or a `memory` of
    real ones. The distances of pixels say little about large images. The authors compare features
    of a masked autoencoder, which is not public; here features are those of LPIPS, from its file.
    They train for a range of guidance scales, which the network is told; here there is one scale.
    """

    feeds: ClassVar = "images"
    coupled: ClassVar = True

    kernel: Kernel = "laplace"
    # each tau, as a share of the mean distance of rows; None: 0.02, 0.05 and 0.2 for laplace, 0.05,
    # 0.15 and 0.5 for gaussian
    bandwidths: tuple[Positive, ...] | None = None
    # scale of the guidance that is learnt: real rows of every class push too, with guidance - 1
    # times the weight of the samples; 1: none
    guidance: Annotated[float, Between(1, 1000)] = 1.0
    memory: Natural = 0  # real rows to keep, the batch's among them; at least a batch; 0: none
    # LPIPS weights, whose features are compared beside pixels
    features: Path | None = field(default=None, metadata=BY_CONTENT)
    # how the network makes a sample of the noise
    generator: DenoisingStudent = field(default_factory=DenoisingStudent)

    def __post_init__(self):
        check(self, "Drifting: ")
        if self.bandwidths == ():
            raise ValueError("Drifting: bandwidths is empty; give one or more, or None")
        if self.generator.loss_type != "l2":
            raise ValueError(
                f"Drifting: generator.loss_type is {self.generator.loss_type}, which is not used; "
                f"leave it out"
            )

    def on(self, teacher: Teacher) -> "Drifting":
        return replace(self, generator=self.generator.on(teacher))

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        modules = self.generator.init(teacher)
        if self.features:
            modules["features"] = Features(self.features)
        if self.memory:
            modules["memory"] = Memory(self.memory, teacher.shape)
        return modules

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        made = self.sample(modules["student"], batch.noise, cond=batch.cond).to(batch.x0)
        labels = batch.cond.get("label", torch.zeros_like(batch.index))
        labels = theirs = distributed.everyone(labels)
        real = distributed.everyone(batch.x0)
        if self.memory:
            keep = modules["student"].training
            real, theirs = modules["memory"](real, labels, progress.step, keep)
        pulls, pushes = (w.to(real) for w in self.weights(labels, theirs))
        seen = modules["features"] if self.features else pixels
        with torch.no_grad():
            real = seen(real)
        loss = made.new_zeros(())
        for x, y in zip(seen(made), real, strict=True):
            move, scale = self._move(x, y, (pulls, pushes))
            near = x / scale
            loss = loss + (near - (near.detach() + move)).square().mean()
        return loss

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # the forces are scaled to one size, however near the samples are to data

    @torch.no_grad()
    def _move(
        self, own: Tensor, real: Tensor, weights: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the forces on this process's samples, among those of all, and S."""
        x = distributed.everyone(own)
        away = torch.cat([x, real]) if self.guidance > 1 else x
        with without_autocast(x.device.type):
            moved, scale = force(x, real, away, weights, self.kernel, self._shares)
        mine = distributed.share(len(x))
        return moved[mine.start : mine.stop], scale

    def weights(self, labels: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much real rows pull samples, [N, M], and how much which rows push them.

        Samples have labels [N], real rows [M]. The samples push, [N, N]; with guidance, real rows
        after them, [N, N + M].
        """
        pulls = (labels[:, None] == theirs).float()
        pushes = (labels[:, None] == labels).float().fill_diagonal_(0)
        if self.guidance > 1:
            there = (theirs != EMPTY).float()
            others = (self.guidance - 1) * pushes.sum(1, keepdim=True)
            pushes = torch.cat([pushes, others * there / there.sum()], 1)
        return pulls, pushes

    @property
    def _shares(self) -> tuple[float, ...]:
        return self.bandwidths or _BANDWIDTHS[self.kernel]

    def times(self, nfe: int) -> Grid:
        return self.generator.times(nfe)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        return self.generator.sample(net, z, nfe=nfe, cond=cond)

    def trial(self) -> Trial:
        laplace = self.kernel == "laplace"
        return Trial(
            train={"batch_size": 256},
            steps=1500 if laplace else 3000,
            bars={1: 0.12 if laplace else 0.09},
            controls={"bandwidths much too wide": {"bandwidths": (5.0,)}},
        )

    def measure(self, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
        return proof.measure(self)

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
