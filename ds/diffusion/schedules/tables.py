"""Schedules of discrete steps: tables of betas, whose times are the indices 0 to num_steps - 1.

Index 0 is the first, almost clean step, and -1 is the data. Between indices, time is linear in
log alpha-bar, so that continuous solvers and noise levels between two steps have a meaning.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from ds.diffusion.schedules.base import AbstractSchedule, wide
from ds.system.config import Between, Positive, Share, check

MOST = 1_000_000  # indices that a schedule may have: known ones have 50 to 4,000
Steps = Annotated[int, Between(1, MOST)]
_LEAST = -100.0  # of log alpha-bar, where the last step of a table may leave no signal at all


class AbstractTable(AbstractSchedule):
    """A variance-preserving schedule given by its betas: alpha-bar is the product of 1 - beta."""

    data: ClassVar[int] = -1

    num_steps: int

    @abstractmethod
    def betas(self) -> Tensor:
        """Return the variance that each step adds, float64 [num_steps]."""

    @property
    def noise(self) -> int:
        return self.num_steps - 1

    def alphas_bar(self) -> Tensor:
        """Return alpha(t)**2 for every index: float64 [num_steps], falling. DDPM, Eq. 4."""
        return torch.cumprod(1 - self.betas(), dim=0)

    def at(self, t: float) -> tuple[float, float]:
        self.check(t)
        if t == int(t):
            return _pairs(self)[int(t) - self.data]
        log_abar = float(np.interp(t, *_knots(self)))
        return math.exp(log_abar / 2), math.sqrt(-math.expm1(log_abar))

    def time(self, lam: float) -> float:
        times, log_abar = _knots(self)
        return float(np.interp(-np.logaddexp(0, -2 * lam), log_abar[::-1], times[::-1]))

    def times_of(self, ratio: Tensor) -> Tensor:
        lost = -self._table(ratio.device).log().clamp(min=_LEAST)  # -log alpha-bar, which rises
        here = wide(ratio).square().log1p().clamp(max=lost[-1])
        above = torch.searchsorted(lost, here).clamp(1, self.num_steps)
        start, end = lost[above - 1], lost[above]
        return (self.data + above - 1 + (here - start) / (end - start)).clamp(min=0)

    def nearest(self, lam: np.ndarray) -> list[int]:
        """Return the indices whose log(alpha / sigma) is nearest to each of `lam`."""
        abar = self.alphas_bar().numpy()
        with np.errstate(divide="ignore"):
            known = np.log(abar / (1 - abar)) / 2
        found = np.interp(lam, known[::-1], np.arange(self.num_steps)[::-1])
        return found.round().astype(int).tolist()

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self._table(t.device)
        if not t.is_floating_point():
            abar = abar[t - self.data]
            return abar.sqrt(), (1 - abar).sqrt()
        t = wide(t)
        below = t.detach().floor().clamp(self.data, self.noise - 1).long()
        start, end = (abar[below - self.data + i].log().clamp(min=_LEAST) for i in (0, 1))
        log_abar = start + (end - start) * (t - below)
        return (log_abar / 2).exp(), (-log_abar.expm1()).sqrt()

    # A constant of a compiled loss, which would make it again at every step. It is a method because
    # torch 2.11 takes no frozen dataclass as the argument of such a function.
    def _table(self, device: torch.device) -> Tensor:
        return _table(self, device)

    # What torch.compiler.assume_constant_result does, which would import the compiler: seconds.
    _table._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]

    def prior(self, z: Tensor, t: float | None = None) -> Tensor:
        return z

    def _range(self) -> str:
        return f"the indices 0 to {self.noise}"


@dataclass(frozen=True)
class LinearBeta(AbstractTable):
    """Betas on a straight line, as in DDPM. Ho et al. 2020, arXiv:2006.11239, section 4."""

    num_steps: Steps = 1000
    beta_start: Positive = 1e-4
    beta_end: Positive = 0.02

    def __post_init__(self):
        _check_betas(self)

    def betas(self) -> Tensor:
        return _line(self.beta_start, self.beta_end, self.num_steps)


@dataclass(frozen=True)
class ScaledLinear(AbstractTable):
    """Square roots of betas on a straight line. Rombach et al. 2022, arXiv:2112.10752."""

    num_steps: Steps = 1000
    beta_start: Positive = 0.00085
    beta_end: Positive = 0.012

    def __post_init__(self):
        _check_betas(self)

    def betas(self) -> Tensor:
        return _line(self.beta_start**0.5, self.beta_end**0.5, self.num_steps) ** 2


@dataclass(frozen=True)
class Cosine(AbstractTable):
    """Alpha-bar as a squared cosine, each beta at most `max_beta`.

    Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17. `offset` is their s.
    """

    num_steps: Steps = 1000
    offset: Positive = 0.008
    max_beta: Share = 0.999

    def __post_init__(self):
        check(self, "Cosine: ")

    def betas(self) -> Tensor:
        t = _line(0, 1, self.num_steps + 1)
        abar = torch.cos((t + self.offset) / (1 + self.offset) * (math.pi / 2)).square()
        return (1 - abar[1:] / abar[:-1]).clamp(max=self.max_beta)


@dataclass(frozen=True)
class Sigmoid(AbstractTable):
    """Betas on a sigmoid of -6 to 6. Xu et al. 2022, arXiv:2203.02923 (GeoDiff), in its code."""

    num_steps: Steps = 1000
    beta_start: Positive = 1e-4
    beta_end: Positive = 0.02

    def __post_init__(self):
        _check_betas(self)

    def betas(self) -> Tensor:
        rise = _line(-6, 6, self.num_steps).sigmoid()
        return self.beta_start + (self.beta_end - self.beta_start) * rise


@dataclass(frozen=True)
class Table(AbstractTable):
    """Any betas, such as those of a checkpoint. A last beta of 1 leaves no signal at the end."""

    values: Annotated[tuple[Annotated[float, Between(0, 1, "(]")], ...], Between(1, MOST)]

    def __post_init__(self):
        check(self, "Table: ")
        if 1 in self.values[:-1]:
            raise ValueError("Table: only the last of the values may be 1")
        object.__setattr__(self, "values", tuple(map(float, self.values)))

    @property
    def num_steps(self) -> int:
        """How many indices there are."""
        return len(self.values)

    def betas(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64, device="cpu")


def zero_terminal_snr(schedule: AbstractTable) -> Table:
    """Return the schedule shifted and scaled so that alpha is the same at index 0, and 0 at last.

    Raises ValueError for a schedule of one step. Lin et al. 2023, arXiv:2305.08891, Algorithm 1.
    """
    if schedule.num_steps < 2:
        raise ValueError(f"zero_terminal_snr: needs 2 steps or more, not {schedule}")
    alpha = schedule.alphas_bar().sqrt()
    abar = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))).square()
    return Table(tuple((1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])).tolist()))


def _line(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def _check_betas(schedule: LinearBeta | ScaledLinear | Sigmoid) -> None:
    name, first, last = type(schedule).__name__, schedule.beta_start, schedule.beta_end
    check(schedule, f"{name}: ")
    if not 0 < first <= last < 1:
        raise ValueError(f"{name}: need 0 < beta_start <= beta_end < 1, not {first} and {last}")


@cache
@torch.inference_mode(False)  # what is kept serves training as well
def _table(schedule: AbstractTable, device: torch.device) -> Tensor:
    """Return alpha-bar of the data and then of every index, float64 [num_steps + 1]."""
    return torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), schedule.alphas_bar()]).to(
        device
    )


@cache
def _pairs(schedule: AbstractTable) -> list[tuple[float, float]]:
    """Return (alpha, sigma) of the data and then of every index."""
    abar = schedule.alphas_bar()
    return [(1.0, 0.0), *zip(abar.sqrt().tolist(), (1 - abar).sqrt().tolist(), strict=True)]


@cache
def _knots(schedule: AbstractTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the times -1 to num_steps - 1 and log alpha-bar there."""
    abar = _table(schedule, torch.device("cpu"))
    return np.arange(-1.0, schedule.num_steps), abar.log().clamp(min=_LEAST).numpy()
