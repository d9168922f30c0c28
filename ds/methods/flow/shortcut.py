"""Shortcut models: tell the network the size of its step, and teach a step to be its two halves."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.grids import Grid
from ds.diffusion.guidance import ClassifierFree
from ds.diffusion.noise import Draws
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.flow.path import PATH, jumps, point, rowwise
from ds.methods.networks import follow, target_of, untold
from ds.methods.proof import Check, Misuse, Trial
from ds.methods.proofs import shortcut as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig, MLPConfig
from ds.pairs.sources import Batch
from ds.system.config import Between, Count, Positive, Share, check

_TIMES, _UNTOLD = 0x4E83B0D9C71F562A, 0x68F1A53D07E2C49B  # streams: times, labels left out
_GUIDED = ClassifierFree(None)  # made here, since torch.compile cannot trace its checks


@dataclass(frozen=True)
class Shortcut(AbstractMethod):
    """Learn s(x, t, d), the average velocity of the flow from time t to t - d.

    The network is net(x, time_scale * t, level=log2(1 / d)), for d = 1, 1/2, ... 1/steps. The
    smallest step learns the velocity noise - x0 of the straight path. A larger one learns the mean
    of two steps of half its size, taken by a slow average of the student. The times of a row are
    multiples of its d. Frans et al. 2024, arXiv:2410.12557, Eq. 3 to 5; our time grows with noise.

    Every `bootstrap_every`-th draw of a run learns a larger step, of each size in turn, so that a
    batch may be cut anywhere. A row costs 1 + 2 / bootstrap_every calls, with guidance 1 + 4 / it.
    The released code repeats a batch's first images for larger steps, leaves 1e-5 of the noise in
    x0, and samples with the network that learns, not its average. Its networks divide logits of
    attention by the width of a head, not the root of it, and embed times from 0 to 1 as they are
    (time_scale = 1): their weights in an ordinary transformer without both draw noise.
    """

    feeds: ClassVar = "images"

    steps: Annotated[int, Between(2, 2**20)] = 128  # of the smallest size; a power of two
    bootstrap_every: Count = 8  # one draw in so many learns a larger step than the smallest
    target_decay: Share = 0.999  # of the average of the student that takes the two half steps
    clip: Positive = 4.0  # what half steps lead to, and their mean, is cut to +- this
    # of classifier-free guidance, which larger steps learn; 1: none
    guidance: Annotated[float, Between(0, 1e6)] = 1.0
    label_dropout: Share = 0.1  # share of labels that rows of the smallest step are not told
    time_scale: Positive = 999.0  # the network is told this times the time, which is 0 to 1
    student: AbstractNetConfig | None = None  # the network to train; else the teacher's, told more

    def __post_init__(self):
        check(self, "Shortcut: ")
        self._level(self.steps)

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        student = student_net(teacher, self.student, "level")
        return nn.ModuleDict({"student": student, "target": target_of(student)})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        return self.error(modules["student"], modules["target"], batch).square().mean()

    def error(self, student: nn.Module, target: nn.Module, batch: Batch) -> Tensor:
        """Return the predicted velocity of each row minus its target. Eq. 5, Algorithm 1."""
        rows, level = self._allotted(batch.draws.index)
        d = torch.exp2(-level.double())
        t = d * (1 + (batch.draws.uniform(_TIMES) / d).floor())  # d, 2 d, ... 1
        larger, x, v = level < self._level(self.steps), point(batch, t), batch.noise - batch.x0
        some = {name: value[rows] for name, value in batch.cond.items()}
        halves = self.halves(target, x[rows], t[rows], level[rows], **some)
        wanted = torch.where(rowwise(larger[rows], x), halves, v[rows])
        cond = untold(batch, _UNTOLD, self.label_dropout, ~larger)
        return self.s(student, x, t, level=level, **cond) - v.index_copy(0, rows, wanted)

    def _allotted(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of N rows, numbered in sequence, may learn larger steps, and all levels."""
        every, finest = self.bootstrap_every, self._level(self.steps)
        own = torch.where(number % every == 0, number // every % finest, finest)
        rows = (own == finest).int().argsort(stable=True)[: -(-len(number) // every)]
        return rows, torch.full_like(own, finest).index_copy(0, rows, own[rows])

    @torch.no_grad()
    def halves(self, net: nn.Module, x: Tensor, t: Tensor, level: Tensor, **cond: Any) -> Tensor:
        """Return the mean velocity of two steps of half the size. Eq. 3 and 4."""
        half = torch.exp2(-1 - level.double())
        first = self.guided(net, x, t, level + 1, **cond)
        x = (x - rowwise(half.to(x.dtype), x) * first).clamp(-self.clip, self.clip)
        second = self.guided(net, x, t - half, level + 1, **cond)
        return ((first + second) / 2).clamp(-self.clip, self.clip)

    def guided(self, net: nn.Module, x: Tensor, t: Tensor, level: Tensor, **cond: Any) -> Tensor:
        """Return s, drawn towards the label where the step is the smallest."""
        if self.guidance == 1:
            return self.s(net, x, t, level=level, **cond)
        scale = torch.where(level == self._level(self.steps), self.guidance, 1.0)
        call: Any = partial(self.s, net)
        told = {**cond, "level": level, "guidance": scale}
        return _GUIDED.out(call, x, t, told, 1.0)

    def s(self, net: nn.Module, x: Tensor, t: Tensor, *, level: Tensor, **cond: Tensor) -> Tensor:
        """Return the average velocity from x [N, *shape] at t [N] over steps of `2**-level`."""
        return net(x, (self.time_scale * t).to(x.dtype), level=level.to(x.dtype), **cond)

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> None:
        return None  # the target moves with the network, so a small loss tells nothing

    def after_step(self, modules: nn.ModuleDict, progress: Progress) -> None:
        follow(modules["target"], modules["student"], self.target_decay)

    def times(self, nfe: int) -> Grid:
        grid, _ = grids.uniform(nfe, PATH), self._level(nfe)
        return tuple(self.time_scale * t for t in grid)

    def _level(self, steps: int) -> int:
        """Return log2(1 / d) for so many steps of size d; raise ValueError if it is no size."""
        if steps > self.steps or steps & (steps - 1):
            raise ValueError(f"Shortcut: takes a power of two up to {self.steps}, not {steps}")
        return steps.bit_length() - 1

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
            return self.guided(net, x, t, torch.full_like(t, self._level(nfe)), **(cond or {}))

        return jumps(u, z, grids.uniform(nfe, PATH))

    def trial(self) -> Trial:
        return Trial(
            {"steps": 32, "bootstrap_every": 4, "target_decay": 0.98, "time_scale": 1.0},
            MLPConfig(conditions=("level",)),
            steps=4000,
            bars={32: 0.045, 4: 0.07, 2: 0.105, 1: 0.11},
            misused={"step size zeroed": Misuse(partial(proof.always, level=5), 0.5)},
        )

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)
