"""What a solver is: a frozen value that takes one step down the probability-flow ODE."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ds.denoiser import Denoiser


class AbstractSolver(ABC):
    """A numerical method for the probability-flow ODE, without state of its own.

    `order` is the order of convergence of the endpoint in the step size, `nfe_per_step` the number
    of network calls a step makes. Tests measure both.
    """

    order: ClassVar[int]
    nfe_per_step: ClassVar[int]

    @abstractmethod
    def step(self, denoiser: Denoiser, x: Tensor, t: int, s: int, state: Any) -> tuple[Tensor, Any]:
        """Move x from time t to the smaller time s; return the new x and the new state.

        `state` is None at the first step and afterwards whatever the last step returned, which is
        where a multistep method keeps its history.
        """
