"""Teachers with known answers: data whose score, denoiser and sampling endpoint are closed forms.

For x_t = alpha * x0 + sigma * eps with data that is Gaussian, or a mixture of Gaussians, the best
possible noise prediction E[eps | x_t] is a formula. Such a teacher is exact, needs no training and
runs on any machine, so a solver or a distillation method can be held against the truth:

    data = ds.analytic.GaussianMixture()
    teacher = data.teacher(ds.solvers.DDIM(), ds.grids.quadratic(100))
    images = teacher.sample(noise)              # what the solver makes of the noise
    exact = data.endpoint(noise, alpha, sigma)  # what the ODE makes of it
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.noise import noise
from ds.diffusion.schedules import AbstractSchedule, LinearBeta
from ds.diffusion.solvers import AbstractSolver
from ds.models.teacher import Teacher


class AbstractData(ABC):
    """A distribution of data with a closed-form score at every noise level.

    alpha and sigma are numbers, or tensors that broadcast against x [N, *shape]. Everything is
    computed in the dtype of x.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def sample(self, seed: int, indices: Iterable[int]) -> Tensor:
        """Draw exact samples, float32 [N, *shape]; row n depends on (seed, indices[n]) alone."""

    @abstractmethod
    def eps(self, x: Tensor, alpha, sigma) -> Tensor:
        """Return E[eps | x], the best noise prediction, shaped like x."""

    @abstractmethod
    def endpoint(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Follow the probability-flow ODE from x at (alpha, sigma) to the data, shaped like x."""

    def score(self, x: Tensor, alpha, sigma) -> Tensor:
        """Return the gradient of the log density of x_t, -E[eps | x] / sigma."""
        return -self.eps(x, alpha, sigma) / sigma

    def teacher(
        self, solver: AbstractSolver, grid: Grid, schedule: AbstractSchedule | None = None
    ) -> Teacher:
        """Return a teacher whose network is the exact noise prediction under `schedule`."""
        schedule = schedule or LinearBeta()
        return Teacher(Denoiser(ExactNet(self, schedule), schedule), solver, grid)


class ExactNet(nn.Module):
    """The exact noise prediction in the shape of a network: net(x [N, *shape], t [N])."""

    def __init__(self, config: AbstractData, schedule: AbstractSchedule):
        super().__init__()
        self.config = config
        self.schedule = schedule

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.config.shape

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.config.eps(x, *self.schedule.gather(t, x))


@dataclass(frozen=True)
class Gaussian(AbstractData):
    """Independent elements N(mean, std**2): every solver step is an affine map."""

    mean: float = 0.1
    std: float = 0.15
    shape: tuple[int, ...] = (1, 8, 8)

    def sample(self, seed: int, indices: Iterable[int]) -> Tensor:
        return self.mean + self.std * noise(seed, indices, self.shape)

    def eps(self, x: Tensor, alpha, sigma) -> Tensor:
        variance = alpha**2 * self.std**2 + sigma**2
        return sigma * (x - alpha * self.mean) / variance

    def endpoint(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        deviation = math.sqrt(alpha**2 * self.std**2 + sigma**2)
        return self.mean + self.std * (x - alpha * self.mean) / deviation


@dataclass(frozen=True)
class GaussianField(AbstractData):
    """A stationary Gaussian random field on a torus, C = 1, with a power-law spectrum.

    Fourier modes are independent: mode k has the variance proportional to (1 + |k|)**-power, scaled
    so that a pixel has the variance std**2.
    """

    size: int = 16
    power: float = 2.0
    std: float = 0.5

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image."""
        return (1, self.size, self.size)

    def spectrum(self, like: Tensor) -> Tensor:
        """Return the variance of each mode of the orthonormal FFT, [size, size]."""
        k = torch.fft.fftfreq(self.size, 1 / self.size, device=like.device, dtype=like.dtype)
        power = (1 + (k[:, None] ** 2 + k[None, :] ** 2).sqrt()) ** -self.power
        return self.std**2 * power / power.mean()

    def sample(self, seed: int, indices: Iterable[int]) -> Tensor:
        white = noise(seed, indices, self.shape)
        return self._filter(white, self.spectrum(white).sqrt())

    def eps(self, x: Tensor, alpha, sigma) -> Tensor:
        return self._filter(x, sigma / (alpha**2 * self.spectrum(x) + sigma**2))

    def endpoint(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        spectrum = self.spectrum(x)
        return self._filter(x, (spectrum / (alpha**2 * spectrum + sigma**2)).sqrt())

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x, norm="ortho") * gain, norm="ortho").real


@dataclass(frozen=True)
class GaussianMixture(AbstractData):
    """Round Gaussians of one width in the plane, of unequal weight.

    The weights differ because a symmetric mixture hides errors in the mass of its modes.
    """

    means: tuple[tuple[float, ...], ...] = (
        (1.3, 0.2), (0.4, 1.2), (-0.9, 1.0), (-1.4, -0.3), (-0.3, -1.2), (1.0, -1.0),
    )  # fmt: skip
    weights: tuple[float, ...] = (0.30, 0.20, 0.20, 0.15, 0.10, 0.05)
    std: float = 0.12

    @property
    def shape(self) -> tuple[int]:
        """The shape of one point."""
        return (len(self.means[0]),)

    def centres(self, like: Tensor) -> Tensor:
        """Return the means as a tensor [K, D] in the dtype and on the device of `like`."""
        return torch.tensor(self.means, dtype=like.dtype, device=like.device)

    def sample(self, seed: int, indices: Iterable[int]) -> Tensor:
        (dim,) = self.shape
        z = noise(seed, indices, (dim + 1,))
        edges = torch.tensor(self.weights, dtype=torch.float32, device="cpu").cumsum(0)
        # The last element decides the mode: its normal distribution function is uniform.
        mode = torch.bucketize(torch.special.ndtr(z[:, dim]), edges[:-1])
        return self.centres(z)[mode] + self.std * z[:, :dim]

    def eps(self, x: Tensor, alpha, sigma) -> Tensor:
        variance = alpha**2 * self.std**2 + sigma**2
        away = x[:, None, :] - self._at(alpha) * self.centres(x)  # [N, K, D]
        prior = torch.tensor(self.weights, dtype=x.dtype, device=x.device).log()
        logits = prior - away.square().sum(-1) / (2 * variance)
        share = logits.softmax(dim=1)  # which mode x_t came from, [N, K]
        return sigma * (share[..., None] * away).sum(1) / variance

    def endpoint(self, x: Tensor, alpha: float, sigma: float, *, steps: int = 400) -> Tensor:
        """Integrate the ODE with classical Runge-Kutta; error about 1e-9 in float64 by default.

        In y = x / alpha and r = sigma / alpha the ODE is dy/dr = E[eps | x]
        (Song et al. 2020, arXiv:2010.02502, Eq. 14). The step is even in asinh(r / r0), which is
        linear where the mixture decides and logarithmic far away.
        """
        scale, dtype = self.std, x.dtype
        stops = torch.linspace(
            math.asinh(sigma / alpha / scale), 0, steps + 1, dtype=torch.float64, device="cpu"
        )
        y = x.double() / alpha

        def slope(u: float, y: Tensor) -> Tensor:  # dy/du with r = scale * sinh(u)
            r = scale * math.sinh(u)
            a = 1 / math.sqrt(1 + r * r)
            return self.eps(a * y, a, a * r) * (scale * math.cosh(u))

        for u, v in zip(stops[:-1].tolist(), stops[1:].tolist(), strict=True):
            h, middle = v - u, (u + v) / 2
            k1 = slope(u, y)
            k2 = slope(middle, y + h / 2 * k1)
            k3 = slope(middle, y + h / 2 * k2)
            k4 = slope(v, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y.to(dtype)

    @staticmethod
    def _at(alpha):
        """Give a tensor alpha, [N, 1] or a single value, the shape that meets [N, K, D]."""
        return alpha.reshape(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
