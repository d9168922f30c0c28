"""Noise schedules: alpha(t) and sigma(t) with x_t = alpha * x0 + sigma * eps.

Time is an integer index: 0 is the first, almost clean step, num_steps - 1 the noisiest one, and
DATA (-1) stands for the data itself, alpha = 1 and sigma = 0. Tables are float64; a schedule is
a frozen value without tensors, so it hashes, compares and prints.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
from torch import Tensor

from ds.system.config import Between, Positive, check

DATA = -1
MOST = 1_000_000  # indices that a schedule may have: known ones have 50 to 4,000


class AbstractSchedule(ABC):
    """A variance-preserving schedule over the indices 0 .. num_steps - 1."""

    num_steps: int

    @abstractmethod
    def alphas_bar(self) -> Tensor:
        """Return alpha(t)**2, DDPM's alpha-bar, for every index: float64 [num_steps], falling."""

    def at(self, t: int) -> tuple[float, float]:
        """Return (alpha, sigma) at index t, or (1, 0) at DATA, in float64.

        Plain numbers, so that a sampling loop that calls this never waits for a device.
        """
        self.check(t)
        return _pairs(self)[t] if t != DATA else (1.0, 0.0)

    def lam(self, t: int) -> float:
        """Return log(alpha / sigma) at index t, half the log-SNR: rising towards the data."""
        alpha, sigma = self.at(t)
        return math.log(alpha / sigma)

    def gather(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at the indices t [N], shaped to multiply `like` [N, ...].

        DATA is an index like any other. The indices are not checked.
        """
        abar = _table(self, like.device)[t - DATA].reshape(-1, *[1] * (like.dim() - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def check(self, *times: int) -> None:
        """Raise ValueError if an index is not one of this schedule's."""
        for t in times:
            if not DATA <= t < self.num_steps:
                raise ValueError(
                    f"schedule: t = {t} does not exist; {self} has the indices 0 to "
                    f"{self.num_steps - 1}"
                )


@dataclass(frozen=True)
class LinearBeta(AbstractSchedule):
    """Betas on a straight line, as in DDPM. Ho et al. 2020, arXiv:2006.11239, section 4."""

    num_steps: Annotated[int, Between(1, MOST)] = 1000
    beta_start: Positive = 1e-4
    beta_end: Positive = 0.02

    def __post_init__(self):
        check(self, "LinearBeta: ")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"LinearBeta: need 0 < beta_start <= beta_end < 1, not {self.beta_start} and "
                f"{self.beta_end}"
            )

    def alphas_bar(self) -> Tensor:
        betas = torch.linspace(
            self.beta_start, self.beta_end, self.num_steps, dtype=torch.float64, device="cpu"
        )
        return torch.cumprod(1 - betas, dim=0)  # Eq. 4


@torch.compiler.assume_constant_result  # else a compiled loss would make it again at every step
def _table(schedule: AbstractSchedule, device: torch.device) -> Tensor:
    return _made_table(schedule, device)


@cache
@torch.inference_mode(False)  # what is kept serves training as well
def _made_table(schedule: AbstractSchedule, device: torch.device) -> Tensor:
    # The row of DATA, before those of 0 and onwards.
    data = torch.ones(1, dtype=torch.float64, device="cpu")
    return torch.cat([data, schedule.alphas_bar()]).to(device)


@cache
def _pairs(schedule: AbstractSchedule) -> list[tuple[float, float]]:
    abar = schedule.alphas_bar()
    return list(zip(abar.sqrt().tolist(), (1 - abar).sqrt().tolist(), strict=True))
