"""What a distillation method is: what to train, what to minimise, how to sample the result.

A method is a frozen dataclass of hyperparameters in a file of its own in this folder. The tensors
live in the modules that `init` creates. The Trainer calls a method in this order:

    for stage in method.stages():             each starts from the result of the last one
        stage = stage.on(teacher)             (by ds.Stages; a Trainer takes the method as it is)
        config = TrainConfig.of(stage)        with stage.train, and stage.length as many epochs
        modules = stage.init(teacher)
        for step in range(total):
            for turn in stage.turns:          a batch for each turn
                stage.loss(modules, batch, progress).backward()
                (the optimiser of modules[turn] takes a step)
                stage.after_step(modules, progress)
        teacher = stage.result(best average of modules["student"])
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import LearnedVariance
from ds.methods.proof import Check, Trial
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.nets import MLP, AbstractNetConfig
from ds.nets.base import told
from ds.pairs.sources import Batch

Feed = Literal["pairs", "images", "noise", "trajectories"]


class Progress(NamedTuple):
    """How far a run is: `step` steps of `total` are done, and it is the turn of modules[turn]."""

    step: int
    total: int
    turn: str = "student"


class AbstractMethod(ABC):
    """Hyperparameters, and the functions that the Trainer and the Sampler call.

    `feeds` says what `x0` of a ds.pairs.sources.Batch is:

        pairs           what the teacher made of the noise
        images          data; the noise is fresh at every draw
        noise           nothing, [N, 0]; the noise is fresh at every draw
        trajectories    the states of a teacher on its way from the noise

    `turns` names the modules that take an optimiser step, in order, in each step of the run. A name
    may come more than once. Trainable modules that it does not name learn with "student".

    The loss of a `coupled` method mixes the rows of a batch. It takes those of other processes from
    ds.system.distributed.everyone, and the Trainer refuses to cut the rows of a process.
    """

    feeds: ClassVar[Feed]
    turns: ClassVar[tuple[str, ...]] = ("student",)
    coupled: ClassVar[bool] = False

    @property
    def train(self) -> Mapping[str, Any]:
        """The settings that a run of this stage must have, as fields of ds.TrainConfig.

        They take the place of those that are given.
        """
        return {}

    @property
    def length(self) -> float:
        """How many times as long as it is told this stage trains."""
        return 1

    def on(self, teacher: Teacher) -> "AbstractMethod":
        """Return the method with what it takes from a teacher filled in, such as its last time."""
        return self

    @abstractmethod
    def init(self, teacher: Teacher) -> nn.ModuleDict:
        """Create the modules of a run, and leave the teacher as it is.

        "student" is averaged, scored and kept. Modules that do not learn have requires_grad off
        and no dropout, except "target": it follows the student and has the student's dropout.
        """

    @abstractmethod
    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        """Return the loss of modules[progress.turn], a scalar: the mean over the rows of a batch.

        Networks are told `batch.cond`. What is random about a row comes from `batch.draws`. The
        loss of a batch is then that of its parts together, however many processes share it. With
        runtime.compile this becomes one graph, so it holds only what torch.compile can trace.
        """

    def score(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor | None:
        """Return what the best average has the least of, on held-out rows; here the loss.

        "student" is the average. Return None where no number tells: the last average is the best.
        """
        return self.loss(modules, batch, progress)

    def after_step(self, modules: nn.ModuleDict, progress: Progress) -> None:  # noqa: B027
        """Act after an optimiser step, for example move a target network; here do nothing.

        Leave the student as it is: its average has moved already.
        """

    @abstractmethod
    def times(self, nfe: int) -> Grid:
        """Return what `sample` tells the network as its times, as engines need them.

        Raises ValueError for a number of calls that the method cannot do.
        """

    @abstractmethod
    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Turn noise [N, *shape] into samples with nfe calls of the trained network.

        `cond` goes to the network. A method that adds noise on its way takes it from `draws`.
        """

    def result(self, net: nn.Module) -> Student | Teacher:
        """Return what a stage hands to the next, and the last one to people."""
        return Student(net, self)

    def stages(self) -> "tuple[AbstractMethod, ...]":
        """Return the methods to train one after the other, each from the result of the last.

        A later stage that feeds "pairs" is trained on pairs made by that result.
        """
        return (self,)

    def identity(self) -> tuple[Check, ...]:
        """Return checks in float64 of the method's formulas, with the exact map as its network.

        Each takes milliseconds and brings controls: the same figure of something that is wrong.
        """
        return ()

    def trial(self) -> Trial:
        """Return the small training by which ds.verify judges the method."""
        return Trial()

    def measure(self, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
        """Return checks of a trained network, beside the distances that every method is held to.

        `z` [N, *shape] is the noise to sample from. ds.verify calls it without gradients, and adds
        the figures of the trial's controls to checks that have none. A control that is another
        method comes as `self`, so use what both have.
        """
        return ()


def student_net(teacher: Teacher, config: AbstractNetConfig | None, *conditions: str) -> nn.Module:
    """Return the network that is to learn: a fresh one of `config`, else a copy of the teacher's.

    A copy takes `conditions`, and what the teacher takes: one that is guided by a scale which it is
    told, or towards a class by a classifier, has a student that is told as much. A network that
    does not take all of that is built anew, with the weights that it has. So is one with a learned
    variance, which a student leaves out. Raises ValueError for a teacher's network that cannot be
    built so.
    """
    if config is not None:
        return built(config)
    if isinstance(teacher.denoiser.prediction, LearnedVariance):
        teacher = teacher.using(mean_half(teacher.net))
    own, takes = getattr(teacher.net, "config", None), told(teacher.net)[0]
    lacks = [name for name in (*conditions, *teacher.takes) if name not in takes]
    if not lacks:
        return copy.deepcopy(teacher.net).requires_grad_(True)
    if not isinstance(own, AbstractNetConfig):
        raise ValueError(
            f"the student takes {', '.join(lacks)}, which the teacher's network "
            f"({type(teacher.net).__name__}) does not; set `student` to the configuration of a "
            f"network that does"
        )
    numbers = (*own.conditions, *(name for name in lacks if name != "label"))
    changes: dict[str, Any] = {"conditions": numbers}
    if "label" in lacks:
        changes["classes"] = teacher.classes
    return _told_more(teacher.net, replace(cast(Any, own), **changes))


def _told_more(net: nn.Module, config: Any) -> nn.Module:
    """Return a network of `config`, which is told more, and makes nothing of that at first."""
    weights = net.weights_for(config) if isinstance(net, MLP) else net.state_dict()
    more = built(config).to(next(net.parameters()))
    new = {name: torch.zeros_like(w) for name, w in more.state_dict().items()}
    for name, w in weights.items():
        new[name][tuple(map(slice, w.shape))] = w  # convolutions of a context have more inputs
    more.load_state_dict(new)
    return more


def mean_half(net: nn.Module) -> nn.Module:
    """Return a network of a learned variance without it: the first half of its last convolution.

    Raises ValueError for a network that its configuration cannot rebuild with as many channels as
    it takes.
    """
    own = getattr(net, "config", None)
    if not isinstance(own, AbstractNetConfig) or not hasattr(own, "out_channels"):
        raise ValueError(
            f"the student of a learned variance leaves it out, which this {type(net).__name__} "
            f"cannot; set `student` to the configuration of a network without it"
        )
    half, weights = built(replace(cast(Any, own), out_channels=None)), net.state_dict()
    like = half.state_dict()
    half.load_state_dict({name: w[: len(like[name])] for name, w in weights.items()})
    return half.to(next(net.parameters())).train(net.training)


def built(config: AbstractNetConfig, seed: int = 0) -> nn.Module:
    """Build a network whose fresh weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build()
