"""Schedules in continuous time: EDM, VP, the straight line of rectified flow, TrigFlow's arc."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ds.diffusion.schedules.base import AbstractSchedule, wide
from ds.system.config import Positive, check


@dataclass(frozen=True)
class EDM(AbstractSchedule):
    """The noise level itself is the time: alpha = 1 and sigma = t, from 0 to sigma_max.

    Karras et al. 2022, arXiv:2206.00364, Table 1; "variance exploding".
    """

    data: ClassVar[float] = 0.0

    sigma_max: Positive = 80.0

    def __post_init__(self):
        check(self, "EDM: ")

    @property
    def noise(self) -> float:
        return self.sigma_max

    def at(self, t: float) -> tuple[float, float]:
        self.check(t)
        return 1.0, float(t)

    def time(self, lam: float) -> float:
        return math.exp(-lam)

    def times_of(self, ratio: Tensor) -> Tensor:
        return wide(ratio).clamp(max=self.noise)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = wide(t)
        return t.new_ones(t.shape), t


@dataclass(frozen=True)
class VP(AbstractSchedule):
    """DDPM's linear betas in the limit of many steps, told in steps: from 0 to `last`.

    With u = t / last, -2 log(alpha) = beta_d * u**2 / 2 + beta_min * u, and sigma**2 is
    1 - alpha**2. Song et al. 2021, arXiv:2011.13456, Eq. 29; Karras et al. 2022, arXiv:2206.00364,
    Table 1, whose networks are told t.
    """

    data: ClassVar[float] = 0.0

    beta_min: Positive = 0.1
    beta_d: Positive = 19.9
    last: Positive = 999.0

    def __post_init__(self):
        check(self, "VP: ")

    @property
    def noise(self) -> float:
        return self.last

    def at(self, t: float) -> tuple[float, float]:
        self.check(t)
        u = float(t) / self.last
        lost = self.beta_d * u * u / 2 + self.beta_min * u
        return math.exp(-lost / 2), math.sqrt(-math.expm1(-lost))

    def time(self, lam: float) -> float:
        lost = float(np.logaddexp(0, -2 * lam))
        root = math.sqrt(self.beta_min**2 + 2 * self.beta_d * lost)
        return self.last * 2 * lost / (root + self.beta_min)

    def times_of(self, ratio: Tensor) -> Tensor:
        lost = wide(ratio).square().log1p().clamp(max=self.beta_d / 2 + self.beta_min)
        root = (self.beta_min**2 + 2 * self.beta_d * lost).sqrt()
        return self.last * 2 * lost / (root + self.beta_min)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u = wide(t) / self.last
        lost = self.beta_d * u * u / 2 + self.beta_min * u
        return (-lost / 2).exp(), (-(-lost).expm1()).sqrt()


@dataclass(frozen=True)
class Linear(AbstractSchedule):
    """The straight line from data to noise: alpha = 1 - t and sigma = t, from 0 to 1.

    Liu et al. 2022, arXiv:2209.03003, whose time runs the other way.
    """

    data: ClassVar[float] = 0.0
    noise: ClassVar[float] = 1.0

    def at(self, t: float) -> tuple[float, float]:
        self.check(t)
        return 1.0 - float(t), float(t)

    def time(self, lam: float) -> float:
        ratio = math.exp(-abs(lam))  # of the smaller of alpha and sigma to the larger
        return (ratio if lam > 0 else 1.0) / (1.0 + ratio)

    def times_of(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / wide(ratio))

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = wide(t)
        return 1 - t, t


@dataclass(frozen=True)
class Trig(AbstractSchedule):
    """A quarter of a circle: alpha = cos t and sigma = sigma_data * sin t, from 0 to pi / 2.

    With sigma_data = 1 it preserves variance, and it is the cosine schedule of log-SNR
    -2 log tan t. Lu & Song 2024, arXiv:2410.11081, section 3, has the deviation of the data there.
    """

    data: ClassVar[float] = 0.0
    noise: ClassVar[float] = math.pi / 2

    sigma_data: Positive = 1.0

    def __post_init__(self):
        check(self, "Trig: ")

    def at(self, t: float) -> tuple[float, float]:
        self.check(t)
        # The cosine of the float64 nearest to pi / 2 is not 0.
        alpha = 0.0 if t == self.noise else math.cos(t)
        return alpha, self.sigma_data * math.sin(t)

    def time(self, lam: float) -> float:
        return math.atan2(math.exp(-lam / 2), self.sigma_data * math.exp(lam / 2))

    def times_of(self, ratio: Tensor) -> Tensor:
        return (wide(ratio) / self.sigma_data).atan()

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = wide(t)
        return t.cos(), self.sigma_data * t.sin()
