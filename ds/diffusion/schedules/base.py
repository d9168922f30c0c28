"""What a noise schedule is: a path x_t = alpha(t) * x0 + sigma(t) * eps from data to noise."""

import math
from abc import ABC, abstractmethod
from numbers import Real

import torch
from torch import Tensor


class AbstractSchedule(ABC):
    """A frozen value without tensors, so it hashes, compares and prints. Time grows with noise.

    `data` is the time at which alpha = 1 and sigma = 0, `noise` the last and noisiest time. Every
    real t between the two is a time.
    """

    data: float
    noise: float

    @abstractmethod
    def at(self, t: float) -> tuple[float, float]:
        """Return (alpha, sigma) at time t in float64. Raise ValueError as `check` does.

        They are plain numbers, so a sampling loop never waits for a device.
        """

    @abstractmethod
    def time(self, lam: float) -> float:
        """Return the time at which log(alpha / sigma) is `lam`, the inverse of `lam`."""

    @abstractmethod
    def times_of(self, ratio: Tensor) -> Tensor:
        """Return the times at which sigma / alpha is `ratio` [N], float64, at most `noise`.

        A table, whose networks know no time before its index 0, has none before that.
        """

    @abstractmethod
    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at times t [N], float64, differentiable in t."""

    def lam(self, t: float) -> float:
        """Return log(alpha / sigma) at time t, half the log-SNR: infinite where either is 0."""
        alpha, sigma = self.at(t)
        if alpha > 0 and sigma > 0:
            return math.log(alpha / sigma)
        return -math.inf if sigma > 0 else math.inf

    def gather(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at times t [N], shaped and typed to multiply `like` [N, ...].

        They are differentiable in t. The times are not checked, so that no device is waited for.
        """
        shape = (-1, *[1] * (like.dim() - 1))
        alpha, sigma = self._levels(t.to(like.device))
        return alpha.reshape(shape).to(like.dtype), sigma.reshape(shape).to(like.dtype)

    def prior(self, z: Tensor, t: float | None = None) -> Tensor:
        """Return the state at time t, `noise` by default, that the noise z [N, *shape] stands for.

        That is sigma(t) * z. A table, whose sigma is nearly 1 there, takes z as it is.
        """
        return self.at(self.noise if t is None else t)[1] * z

    def check(self, *times: float) -> None:
        """Raise ValueError for what is not a time of this schedule."""
        for t in times:
            if not isinstance(t, Real) or not self.data <= t <= self.noise:
                raise ValueError(f"schedule: t = {t!r} does not exist; {self} has {self._range()}")

    def _range(self) -> str:
        return f"the times {self.data:g} to {self.noise:g}"


def wide(t: Tensor) -> Tensor:
    """Return times in float64, the precision of schedules."""
    return t.to(torch.float64)
