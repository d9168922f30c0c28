"""What a solver is: a frozen value that takes one step from noise towards data."""

import math
import struct
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ds.diffusion.denoiser import Denoiser, Parts
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Estimate


class AbstractSolver(ABC):
    """A numerical method for the probability-flow ODE, or the SDE beside it, without state.

    `order` is the order of convergence of the endpoint in the step size. Tests measure it, and
    count the network calls.
    """

    order: int

    @abstractmethod
    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: Any,
        draws: Draws | None = None,
    ) -> tuple[Tensor, Any]:
        """Move x from time t to the smaller time s; return the new x and the new state.

        `state` is None at the first step and afterwards whatever the last step returned, which is
        where a multistep method keeps its history. A stochastic method takes its noise from
        `draws` and raises ValueError where there are none.
        """

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise, so that a sample needs `draws`."""
        return False

    def nfe(self, grid: Grid) -> int:
        """Return the number of network calls that a sample costs on a grid: one a time."""
        return len(grid)


def evaluations(denoiser: Denoiser, solver: AbstractSolver, grid: Grid) -> int:
    """Return how often a sample evaluates the network: a call of guidance may count twice."""
    if denoiser.guidance is None:
        return solver.nfe(grid)
    counter = _Counter(denoiser)
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64, device="cpu")  # DCW's bands are of pictures
    draws = Draws(0, torch.zeros(1, dtype=torch.int64, device="cpu"))
    integrate(cast(Denoiser, counter), solver, grid, x, draws=draws)
    return counter.count


class _Counter:
    """What a solver needs of a denoiser, where calls are counted and nothing is computed."""

    def __init__(self, denoiser: Denoiser):
        self.schedule, self.guidance, self.count = denoiser.schedule, denoiser.guidance, 0

    def __call__(self, x: Tensor, t: float) -> Estimate:
        return self.parts(x, t).estimate

    def parts(self, x: Tensor, t: float) -> Parts:
        """Count a call."""
        alpha, sigma = self.schedule.at(t)
        if self.guidance is not None:
            self.count += self.guidance.evaluations(sigma / alpha if alpha else math.inf)
        return Parts(x, x, alpha, sigma, x, None)


def integrate(
    denoiser: Denoiser,
    solver: AbstractSolver,
    grid: Grid,
    x: Tensor,
    *,
    progress: bool = False,
    draws: Draws | None = None,
) -> Tensor:
    """Move x [N, *shape] from time grid[0] through the grid to the data; return it there.

    Nothing in the loop waits for the device: times and coefficients are numbers of the host.
    Raises ValueError if the solver is stochastic and there are no draws.
    """
    state, times = None, (*grid, denoiser.schedule.data)
    for t, s in tqdm(list(pairwise(times)), disable=not progress, leave=False):
        x, state = solver.step(denoiser, x, t, s, state, draws)
    return x


def fresh_noise(draws: Draws | None, stream: int, x: Tensor, t: float) -> Tensor:
    """Return standard normal noise like x [N, *shape] that belongs to a solver's stream and time t.

    Raises ValueError without draws.
    """
    if draws is None:
        raise ValueError(
            "this solver adds noise at each step; pass draws=ds.Draws(seed, index), where index [N]"
            " numbers the samples"
        )
    (bits,) = struct.unpack("<Q", struct.pack("<d", t))
    return draws.normal(stream ^ bits, x.shape[1:]).to(x)
