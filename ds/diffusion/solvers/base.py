"""What a solver is: a frozen value that takes one step down the probability-flow ODE."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid


class AbstractSolver(ABC):
    """A numerical method for the probability-flow ODE, without state of its own.

    `order` is the order of convergence of the endpoint in the step size. Tests measure it, and
    count the network calls.
    """

    order: int

    @abstractmethod
    def step(self, denoiser: Denoiser, x: Tensor, t: int, s: int, state: Any) -> tuple[Tensor, Any]:
        """Move x from time t to the smaller time s; return the new x and the new state.

        `state` is None at the first step and afterwards whatever the last step returned, which is
        where a multistep method keeps its history.
        """

    def nfe(self, grid: Grid) -> int:
        """Return the number of network calls that a sample costs on a grid: one a time."""
        return len(grid)
