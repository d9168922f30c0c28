"""What a network predicts about x_t = alpha * x0 + sigma * eps, and what it is fed.

A prediction is a frozen value. Its time input is part of a checkpoint's format: a network that
was trained on log(sigma) / 4 answers nonsense to sigma.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ds.diffusion.schedules import AbstractSchedule
from ds.system.config import Positive, check

Prediction = Literal["eps", "x0", "v", "preconditioned"]  # the short names that Denoiser takes
Level = float | Tensor  # alpha or sigma: a number for all samples, or a tensor that broadcasts


class Estimate(NamedTuple):
    """What a denoiser says about x_t = alpha * x0 + sigma * eps, both shaped like x_t.

    Both are given because deriving one from the other divides by alpha or by sigma, and each of
    them is nearly zero at one end of the schedule.
    """

    x0: Tensor
    eps: Tensor


class AbstractPrediction(ABC):
    """The meaning of a network's output, and the inputs it needs.

    `needs_signal` tells whether x0 is unknown where alpha is 0.
    """

    needs_signal: ClassVar[bool] = False

    def inputs(self, x: Tensor, t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        """Return what the network is fed for x_t [N, *shape] and times t [N]: by default both."""
        return x, t

    @abstractmethod
    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        """Return x0 and eps, given x_t and the network's output."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Return what the network should have predicted, shaped like x0."""

    def check(self, schedule: AbstractSchedule) -> None:  # noqa: B027
        """Raise ValueError for a schedule on which the prediction has no meaning."""


@dataclass(frozen=True)
class Eps(AbstractPrediction):
    """The noise. Ho et al. 2020, arXiv:2006.11239. It says nothing of x0 where alpha is 0."""

    needs_signal: ClassVar[bool] = True

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        return Estimate((x - sigma * out) / alpha, out)

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        return eps


@dataclass(frozen=True)
class Score(AbstractPrediction):
    """sigma times the score, minus the noise, of x_t / alpha; fed log(sigma / alpha / 2).

    It says nothing of x0 where alpha is 0. Karras et al. 2022, arXiv:2206.00364, Table 1, "VE".
    """

    needs_signal: ClassVar[bool] = True

    def inputs(self, x: Tensor, t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        return x / alpha, (_each(sigma, x) / _each(alpha, x) / 2).log()

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        return Estimate((x + sigma * out) / alpha, -out)

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        return -eps


@dataclass(frozen=True)
class X0(AbstractPrediction):
    """The clean image. It says nothing of the noise where sigma is 0."""

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        return Estimate(out, (x - alpha * out) / sigma)

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        return x0


@dataclass(frozen=True)
class V(AbstractPrediction):
    """v = alpha * eps - sigma * x0, for schedules with alpha**2 + sigma**2 = 1.

    Salimans & Ho 2022, arXiv:2202.00512, Eq. 11.
    """

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        return Estimate(alpha * x - sigma * out, sigma * x + alpha * out)

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        return alpha * eps - sigma * x0

    def check(self, schedule: AbstractSchedule) -> None:
        alpha, sigma = schedule.at((schedule.data + schedule.noise) / 2)
        if abs(alpha**2 + sigma**2 - 1) > 1e-9:
            raise ValueError(
                f"prediction V needs alpha**2 + sigma**2 = 1, which {schedule} does not keep; "
                f"use Velocity() or TrigFlow()"
            )


@dataclass(frozen=True)
class Velocity(AbstractPrediction):
    """The velocity eps - x0 of the straight path, fed time_scale * t.

    It determines x0 and eps on every schedule. Liu et al. 2022, arXiv:2209.03003, Eq. 1, with time
    running towards noise; their networks are fed 999 * t.
    """

    time_scale: Positive = 1.0

    def __post_init__(self):
        check(self, "Velocity: ")

    def inputs(self, x: Tensor, t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        return x, self.time_scale * t

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        total = alpha + sigma
        return Estimate((x - sigma * out) / total, (x + alpha * out) / total)

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        return eps - x0


@dataclass(frozen=True)
class Preconditioned(AbstractPrediction):
    """EDM's preconditioning: the network's input and target have variance 1 at every noise level.

    sigma_data is the standard deviation of the data. The network is fed
    noise_scale * log(sigma / alpha). Karras et al. 2022, arXiv:2206.00364, Eq. 7 and Table 1.
    """

    needs_signal: ClassVar[bool] = True

    sigma_data: Positive = 0.5
    noise_scale: Positive = 0.25

    def __post_init__(self):
        check(self, "Preconditioned: ")

    def inputs(self, x: Tensor, t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        return _unit(x, alpha, sigma, self.sigma_data), self.noise_scale * _log(sigma, alpha, x)

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        return _rotated(x, out, alpha, sigma, self.sigma_data)

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        a = alpha * self.sigma_data
        return (sigma / self.sigma_data * x0 - a * eps) / _norm(a, sigma)


@dataclass(frozen=True)
class Bounded(AbstractPrediction):
    """EDM's preconditioning, moved so that x0 is x_t / alpha itself, to the bit, at sigma_min.

    A network fed as for `Preconditioned` then has nothing to learn at that noise level, sigma /
    alpha: so begins a consistency function. There is no target there. Song et al. 2023,
    arXiv:2303.01469, appendix C.
    """

    needs_signal: ClassVar[bool] = True

    sigma_data: Positive = 0.5
    noise_scale: Positive = 0.25
    sigma_min: Positive = 0.002

    def __post_init__(self):
        check(self, "Bounded: ")

    def inputs(self, x: Tensor, t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        return _unit(x, alpha, sigma, self.sigma_data), self.noise_scale * _log(sigma, alpha, x)

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        y, level = x / alpha, sigma / alpha
        skip, gain = self._weights(level)
        x0 = skip * y + gain * out
        return Estimate(x0, (y - x0) / level)

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        level = sigma / alpha
        skip, gain = self._weights(level)
        return (x0 - skip * (x0 + level * eps)) / gain

    def _weights(self, level: Level) -> tuple[Level, Level]:
        """Return the weights of x_t / alpha and of the output in x0: 1 and 0 at sigma_min."""
        data, above = self.sigma_data, level - self.sigma_min
        return data**2 / (above**2 + data**2), data * above / _norm(level, data)


@dataclass(frozen=True)
class TrigFlow(AbstractPrediction):
    """The velocity F on the arc from data to noise, fed the angle t = atan(sigma / sigma_data).

    On ds.schedule.Trig(sigma_data) the ODE is dx/dt = sigma_data * F(x / sigma_data, t); any other
    schedule is rescaled to it. F is minus the output of `Preconditioned`. Lu & Song 2024,
    arXiv:2410.11081, Eq. 5.
    """

    sigma_data: Positive = 1.0

    def __post_init__(self):
        check(self, "TrigFlow: ")

    def inputs(self, x: Tensor, t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        angle = torch.atan2(_each(sigma, x), _each(alpha, x) * self.sigma_data)
        return _unit(x, alpha, sigma, self.sigma_data), angle

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        return _rotated(x, -out, alpha, sigma, self.sigma_data)

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        a = alpha * self.sigma_data
        return (a * eps - sigma / self.sigma_data * x0) / _norm(a, sigma)


@dataclass(frozen=True)
class LearnedVariance(AbstractPrediction):
    """A network of twice the channels: a prediction, then where the variance of a step lies.

    The second half is v in [-1, 1], element by element. The log variance of an ancestral step is
    (v + 1) / 2 of the way from that of the posterior, the smallest, to log beta, the largest; only
    ds.solvers.Ancestral reads it. The target is that of the first half. Nichol & Dhariwal 2021,
    arXiv:2102.09672, Eq. 15; the range of v is that of their code, and of ADM.
    """

    prediction: AbstractPrediction = field(default_factory=Eps)

    def __post_init__(self):
        check(self, "LearnedVariance: ")
        if isinstance(self.prediction, LearnedVariance):
            raise ValueError("LearnedVariance: its prediction has a learned variance already")

    @property
    def needs_signal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.prediction.needs_signal

    def inputs(self, x: Tensor, t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        return self.prediction.inputs(x, t, alpha, sigma)

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        return self.prediction.estimate(x, out[:, : x.shape[1]], alpha, sigma)

    def share(self, out: Tensor) -> Tensor:
        """Return how far each log variance is from the smallest, 0, to the largest, 1."""
        return (out[:, out.shape[1] // 2 :] + 1) / 2

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        return self.prediction.target(x0, eps, alpha, sigma)

    def check(self, schedule: AbstractSchedule) -> None:
        self.prediction.check(schedule)


@dataclass(frozen=True)
class Rescaled(AbstractPrediction):
    """A network that knows one schedule, on any other: x and the time become those that it knows.

    E[x0 | x_t] depends on x_t / alpha and sigma / alpha alone. The network is asked at the time of
    `schedule` with this sigma / alpha, and at the nearest one that it knows where there is none:
    beyond the last noise, and before index 0 of a table. `prediction` is what it returns there.

        Denoiser(net, Linear(), Rescaled(EDM(), Preconditioned()))   EDM as a rectified flow
        Denoiser(net, EDM(), Rescaled(Linear(), Velocity()))         a rectified flow as EDM

    On the straight line EDM is fed x / (1 - t) and sigma = t / (1 - t), and its velocity is
    (x - D) / t. Lee et al. 2024, arXiv:2405.20320, section 4.2.
    """

    schedule: AbstractSchedule
    prediction: AbstractPrediction

    def __post_init__(self):
        check(self, "Rescaled: ")
        self.prediction.check(self.schedule)

    def inputs(self, x: Tensor, t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        x, t, *levels = self.there(x, alpha, sigma)
        return self.prediction.inputs(x, t, *levels)

    def estimate(self, x: Tensor, out: Tensor, alpha: Level, sigma: Level) -> Estimate:
        x, _, *levels = self.there(x, alpha, sigma)
        return self.prediction.estimate(x, out, *levels)

    def target(self, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
        _, _, *levels = self.there(x0, alpha, sigma)
        return self.prediction.target(x0, eps, *levels)

    def there(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Level, Level]:
        """Return x_t, times [N], alpha and sigma on the network's own schedule."""
        # Trig's last time in float32 is a little more than pi / 2, and its cosine below 0.
        t = self.schedule.times_of(_each(sigma, x) / _each(alpha, x).clamp(min=0))
        there = self.schedule.gather(t, x)
        return x * (_norm(*there) / _norm(alpha, sigma)), t.to(time_dtype(x)), *there


def _rotated(x: Tensor, out: Tensor, alpha: Level, sigma: Level, sigma_data: float) -> Estimate:
    """Return the estimate of a preconditioned output, without dividing by alpha or sigma.

    With u = x / norm of unit variance, x0 / sigma_data and eps are a rotation of u and the output.
    """
    a = alpha * sigma_data
    norm = _norm(a, sigma)
    cos, sin, u = a / norm, sigma / norm, x / norm
    return Estimate(sigma_data * (cos * u + sin * out), sin * u - cos * out)


def _norm(a: Level, b: Level) -> Level:
    return (a * a + b * b) ** 0.5


def _unit(x: Tensor, alpha: Level, sigma: Level, sigma_data: float) -> Tensor:
    """Return x_t of data of a deviation, scaled to variance 1."""
    return x / _norm(alpha * sigma_data, sigma)


def _log(sigma: Level, alpha: Level, x: Tensor) -> Tensor:
    """Return log(sigma / alpha) of each sample, [N]."""
    return (_each(sigma, x) / _each(alpha, x)).log()


def _each(level: Level, x: Tensor) -> Tensor:
    """Return alpha or sigma as one number a sample, [N]."""
    if isinstance(level, Tensor):
        return level.reshape(-1)
    return torch.full((x.shape[0],), level, dtype=time_dtype(x), device=x.device)


def time_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of real times for a state x: float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def as_prediction(prediction: AbstractPrediction | str) -> AbstractPrediction:
    """Return the prediction of a short name, such as "eps"; a prediction is returned as is.

    Raises ValueError for anything else.
    """
    if isinstance(prediction, AbstractPrediction):
        return prediction
    if not isinstance(prediction, str) or prediction not in _NAMES:
        raise ValueError(
            f"prediction must be one of {', '.join(_NAMES)}, or a value of ds.predictions such as "
            f"Velocity(), not {prediction!r}"
        )
    return _NAMES[prediction]


_NAMES = {"eps": Eps(), "x0": X0(), "v": V(), "preconditioned": Preconditioned()}
