"""Gaussian data, whose denoiser and probability-flow ODE are linear maps."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds.analytic.base import AbstractData, Levels
from ds.diffusion.noise import noise
from ds.diffusion.predictions import Level


@dataclass(frozen=True)
class Gaussian(AbstractData):
    """Independent elements N(mean, std**2): every solver step is an affine map."""

    mean: Level = 0.1
    std: Level = 0.15
    shape: tuple[int, ...] = (1, 8, 8)

    def sample(self, seed: int, indices: Iterable[int]) -> Tensor:
        return self.mean + self.std * noise(seed, indices, self.shape)

    def eps(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        return sigma * (x - alpha * self.mean) / self._variance(alpha, sigma)

    def x0(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        gain = alpha * self.std**2 / self._variance(alpha, sigma)
        return self.mean + gain * (x - alpha * self.mean)

    def flow(self, x: Tensor, start: Levels, end: Levels) -> Tensor:
        widening = (self._variance(*end) / self._variance(*start)) ** 0.5
        return end[0] * self.mean + widening * (x - start[0] * self.mean)

    def posterior(self, x: Tensor, alpha: Level, sigma: Level) -> "Gaussian":
        """Return the distribution of x0 where x_t = alpha * x0 + sigma * eps is x [N, *shape].

        Its mean and its std are tensors, a row for each of x.
        """
        std = self.std * sigma / self._variance(alpha, sigma) ** 0.5
        return replace(self, mean=self.x0(x, alpha, sigma), std=std)

    def _variance(self, alpha: Level, sigma: Level) -> Level:
        """Return the variance of x_t."""
        return alpha**2 * self.std**2 + sigma**2


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

    def eps(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        return self._filter(x, sigma / self._variance(x, alpha, sigma))

    def x0(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        return self._filter(x, alpha * self.spectrum(x) / self._variance(x, alpha, sigma))

    def flow(self, x: Tensor, start: Levels, end: Levels) -> Tensor:
        return self._filter(x, (self._variance(x, *end) / self._variance(x, *start)).sqrt())

    def _variance(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Return the variance of each mode of x_t."""
        return alpha**2 * self.spectrum(x) + sigma**2

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x, norm="ortho") * gain, norm="ortho").real
