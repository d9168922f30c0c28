"""What data with known answers offers: score, denoiser and sampling endpoint as closed forms.

For x_t = alpha * x0 + sigma * eps with data that is Gaussian, or a mixture of Gaussians, the best
possible predictions E[x0 | x_t] and E[eps | x_t] are formulas in x_t, alpha and sigma, so they hold
on every schedule. Such a teacher is exact, needs no training and runs on any machine, so a solver
or a distillation method can be held against the truth:

    data = ds.analytic.GaussianMixture()
    teacher = data.teacher(ds.solvers.DDIM(), ds.grids.quadratic(100))
    images = teacher.sample(noise)              # what the solver makes of the noise
    exact = data.endpoint(noise, alpha, sigma)  # what the ODE makes of it
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.predictions import (
    AbstractPrediction,
    Bounded,
    Eps,
    LearnedVariance,
    Level,
    Preconditioned,
    Score,
    TrigFlow,
    Velocity,
    as_prediction,
)
from ds.diffusion.schedules import AbstractSchedule, LinearBeta
from ds.diffusion.solvers import AbstractSolver
from ds.models.teacher import Teacher

Levels = tuple[Level, Level]  # alpha and sigma


class AbstractData(ABC):
    """A distribution of data with closed forms at every noise level.

    alpha and sigma are numbers, or tensors that broadcast against x [N, *shape], in which case
    results are differentiable in them. Everything is computed in the dtype of x.
    """

    shape: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        """The number of classes of the data; 0: it has none."""
        return 0

    @abstractmethod
    def sample(self, seed: int, indices: Iterable[int]) -> Tensor:
        """Draw exact samples, float32 [N, *shape]; row n depends on (seed, indices[n]) alone."""

    @abstractmethod
    def eps(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Return E[eps | x], the best noise prediction, shaped like x."""

    @abstractmethod
    def x0(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Return E[x0 | x], the best guess of the data, shaped like x."""

    @abstractmethod
    def flow(self, x: Tensor, start: Levels, end: Levels) -> Tensor:
        """Follow the probability-flow ODE from x at the levels `start` to the levels `end`.

        `start` and `end` are (alpha, sigma), such as schedule.at(t); sigma may be 0 at the end.
        """

    def endpoint(self, x: Tensor, alpha: Level, sigma: Level, **cond: Any) -> Tensor:
        """Follow the probability-flow ODE from x at (alpha, sigma) to the data, shaped like x."""
        return self.flow(x, (alpha, sigma), (1.0, 0.0), **cond)

    def score(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Return the gradient of the log density of x_t, -E[eps | x] / sigma."""
        return -self.eps(x, alpha, sigma) / sigma

    def teacher(
        self,
        solver: AbstractSolver,
        grid: Grid,
        schedule: AbstractSchedule | None = None,
        prediction: AbstractPrediction | str | None = None,
        *,
        conditional: bool = False,
    ) -> Teacher:
        """Return a teacher whose network is the exact prediction under `schedule`.

        By default that is LinearBeta, and the noise; on a schedule whose alpha falls to 0, where
        the noise says nothing of x0, it is the velocity. A `conditional` teacher is asked for a
        class of the data. Raises ValueError if the data has none, and for a learned variance.
        """
        if conditional and not self.num_classes:
            raise ValueError(f"teacher: {self} has no classes; leave `conditional` out")
        if isinstance(prediction, LearnedVariance):
            raise ValueError(
                f"teacher: exact predictions have no learned variance; use {prediction.prediction}"
            )
        schedule = schedule or LinearBeta()
        if prediction is None:
            prediction = Eps() if schedule.at(schedule.noise)[0] > 0 else Velocity()
        classes = self.num_classes if conditional else 0
        net = ExactNet(self, schedule, as_prediction(prediction), classes)
        return Teacher(Denoiser(net, schedule, net.prediction), solver, grid)


class ExactNet(nn.Module):
    """An exact prediction in the shape of a network: net(x [N, *shape], c_noise [N], **cond).

    A conditional one says how many `classes` there are, and that it takes "label".
    """

    def __init__(
        self,
        config: AbstractData,
        schedule: AbstractSchedule,
        prediction: AbstractPrediction,
        classes: int = 0,
    ):
        super().__init__()
        self.config, self.schedule, self.prediction = config, schedule, prediction
        self.classes, self.takes = classes, ("label",) if classes else ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.config.shape

    def forward(self, x: Tensor, c_noise: Tensor, **cond: Any) -> Tensor:
        x, alpha, sigma = self._state(x, c_noise)
        eps = self.config.eps(x, alpha, sigma, **cond)
        if self.prediction == Eps():
            return eps
        return self.prediction.target(self.config.x0(x, alpha, sigma, **cond), eps, alpha, sigma)

    def _state(self, x: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t, alpha and sigma, given the inputs that the prediction made of them."""
        p, c = self.prediction, c_noise.reshape(-1, *[1] * (x.dim() - 1))
        if isinstance(p, Preconditioned | Bounded):
            sigma = (c / p.noise_scale).exp().to(x.dtype)
            return x * (sigma**2 + p.sigma_data**2).sqrt(), sigma.new_ones(sigma.shape), sigma
        if isinstance(p, Score):
            sigma = (2 * c.exp()).to(x.dtype)
            return x, sigma.new_ones(sigma.shape), sigma
        if isinstance(p, TrigFlow):
            return x * p.sigma_data, c.cos().to(x.dtype), (p.sigma_data * c.sin()).to(x.dtype)
        t = c_noise / p.time_scale if isinstance(p, Velocity) else c_noise
        return x, *self.schedule.gather(t, x)
