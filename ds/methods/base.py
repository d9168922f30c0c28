"""What a distillation method is: how to start, what to minimise, how to sample the result."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser


class AbstractMethod(ABC):
    """A frozen dataclass of hyperparameters; the tensors live in the modules it creates.

    `feeds` says what a batch holds. Both kinds have "x0" and "noise", float32 [N, *shape]: with
    "pairs" x0 is what the teacher made of that noise, with "images" x0 is data and the noise is
    fresh. "index", int64 [N], is that of the noise: of a pair, or of a draw that no step repeats.
    """

    feeds: ClassVar[Literal["pairs", "images"]]

    @abstractmethod
    def init(self, teacher: Denoiser) -> nn.ModuleDict:
        """Create the modules to train; "student" is the one that is averaged, judged and kept.

        The teacher is left as it is. Modules that must not learn have requires_grad off.
        """

    @abstractmethod
    def loss(self, modules: nn.ModuleDict, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the loss of a batch, a scalar, the mean over its rows.

        What is random about a row is a function of `step` and its "index": then a batch has the
        loss of its parts together, however many processes share it. With runtime.compile this
        becomes one graph, which holds nothing but what torch.compile sees through.
        """

    @abstractmethod
    def sample(self, net: nn.Module, z: Tensor, nfe: int = 1) -> Tensor:
        """Turn noise [N, *shape] into samples with nfe calls of the trained network."""

    def after_step(self, modules: nn.ModuleDict, step: int) -> None:  # noqa: B027
        """Do what follows an optimiser step, such as moving a target network; here nothing.

        The student is left as it is: the step has moved its average already.
        """
