"""A mixture of Gaussians, with classes: the smallest data on which a wrong method shows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds.analytic.base import AbstractData, Levels
from ds.diffusion.noise import noise
from ds.diffusion.predictions import Level
from ds.nets.base import NO_CLASS

_FAR = 1e6  # sigma / alpha, beyond which a step of first order is exact to 1e-12


@dataclass(frozen=True)
class GaussianMixture(AbstractData):
    """Round Gaussians of one width in the plane, of unequal weight.

    The weights differ because a symmetric mixture hides errors in the mass of its modes. Each mode
    has a class; given `label` [N], int64, all functions are those of the modes of that class, and
    for NO_CLASS those of all modes.
    """

    means: tuple[tuple[float, ...], ...] = (
        (1.3, 0.2),
        (0.4, 1.2),
        (-0.9, 1.0),
        (-1.4, -0.3),
        (-0.3, -1.2),
        (1.0, -1.0),
    )
    weights: tuple[float, ...] = (0.30, 0.20, 0.20, 0.15, 0.10, 0.05)
    std: float = 0.12
    classes: tuple[int, ...] = (0, 0, 1, 1, 2, 2)

    @property
    def shape(self) -> tuple[int]:
        """The shape of one point."""
        return (len(self.means[0]),)

    @property
    def num_classes(self) -> int:
        return max(self.classes) + 1

    def centres(self, like: Tensor) -> Tensor:
        """Return the means as a tensor [K, D] in the dtype and on the device of `like`."""
        return torch.tensor(self.means, dtype=like.dtype, device=like.device)

    def sample(self, seed: int, indices: Iterable[int], label: Tensor | None = None) -> Tensor:
        (dim,) = self.shape
        z = noise(seed, indices, (dim + 1,))
        edges = self._prior(z, label).cumsum(1)
        # The last element decides the mode: its normal distribution function is uniform.
        mode = (edges[:, :-1] < torch.special.ndtr(z[:, dim:])).sum(1)
        return self.centres(z)[mode] + self.std * z[:, :dim]

    def eps(self, x: Tensor, alpha: Level, sigma: Level, label: Tensor | None = None) -> Tensor:
        share, away, variance = self._posterior(x, alpha, sigma, label)
        return sigma * (share * away).sum(1) / variance

    def x0(self, x: Tensor, alpha: Level, sigma: Level, label: Tensor | None = None) -> Tensor:
        share, away, variance = self._posterior(x, alpha, sigma, label)
        return (share * self.centres(x)).sum(1) + alpha * self.std**2 / variance * (
            share * away
        ).sum(1)

    def posterior(self, x: Tensor, alpha: float, sigma: float) -> "GaussianMixture":
        """Return the distribution of x0 where x_t = alpha * x0 + sigma * eps is the point x [D].

        It is a mixture of as many modes, each as narrow as the noise lets it be.
        """
        share, away, variance = self._posterior(x[None].double(), alpha, sigma, None)
        centres = self.centres(away) + alpha * self.std**2 / variance * away[0]
        means = tuple(map(tuple, centres.tolist()))
        weights = tuple(share[0, :, 0].tolist())
        return replace(self, means=means, weights=weights, std=self.std * sigma / variance**0.5)

    @property
    def total_variance(self) -> float:
        """The sum of the variances of the coordinates: the trace of the covariance."""
        means = torch.tensor(self.means, dtype=torch.float64, device="cpu")
        weights = torch.tensor(self.weights, dtype=torch.float64, device="cpu")[:, None]
        spread = (weights * (means - (weights * means).sum(0)).square()).sum()
        return float(spread) + self.std**2 * len(self.means[0])

    def class_logits(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Return log p(class | x), [N, classes]: the best classifier of noisy points."""
        logits = self._logits(x, alpha, sigma, None)[0].log_softmax(1)
        own = [[i for i, k in enumerate(self.classes) if k == c] for c in range(self.num_classes)]
        return torch.stack([logits[:, modes].logsumexp(1) for modes in own], 1)

    def flow(
        self,
        x: Tensor,
        start: Levels,
        end: Levels,
        label: Tensor | None = None,
        *,
        least_steps: int = 400,
    ) -> Tensor:
        """Integrate the ODE with classical Runge-Kutta; error about 1e-9 in float64 by default.

        In x / alpha and r = sigma / alpha the ODE is d(x / alpha)/dr = E[eps | x] (Song et al.
        2020, arXiv:2010.02502, Eq. 14). The step is even in asinh(r / std), which is linear where
        the mixture decides and logarithmic far away. A number alpha may be 0 at the start.
        """
        alpha, sigma = start
        state = x.double()
        if not isinstance(alpha, Tensor) and alpha * _FAR < sigma:
            # As far as sigma / alpha = _FAR, x / sigma changes by x0 over alpha / sigma.
            x0 = self.x0(state, alpha, sigma, label)
            state = (state / sigma + (1 / _FAR - alpha / sigma) * x0) * _FAR
            u = self._warped(1.0, _FAR, x)
        else:
            state, u = state / alpha, self._warped(alpha, sigma, x)
        distance = self._warped(*end, x) - u
        steps = max(least_steps, math.ceil(65 * float(distance.abs().max())))
        h = distance / steps
        for i in range(steps):
            v = u + i * h
            k1 = self._slope(v, state, label)
            k2 = self._slope(v + h / 2, state + h / 2 * k1, label)
            k3 = self._slope(v + h / 2, state + h / 2 * k2, label)
            k4 = self._slope(v + h, state + h * k3, label)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return (end[0] * state).to(x.dtype)

    def _warped(self, alpha: Level, sigma: Level, like: Tensor) -> Tensor:
        """Return asinh(r / std) in float64, where r = sigma / alpha."""
        ratio = sigma / alpha / self.std
        return torch.as_tensor(ratio, dtype=torch.float64, device=like.device).asinh()

    def _slope(self, u: Tensor, state: Tensor, label: Tensor | None) -> Tensor:
        """Return d(x / alpha)/du for x / alpha at r = std * sinh(u)."""
        r = self.std * u.sinh()
        alpha = (1 + r * r).rsqrt()
        return self.eps(alpha * state, alpha, alpha * r, label) * (self.std * u.cosh())

    def _posterior(
        self, x: Tensor, alpha: Level, sigma: Level, label: Tensor | None
    ) -> tuple[Tensor, Tensor, Level]:
        """Return which mode x is from [N, K, 1], how far it is from each [N, K, D], its variance.

        The variance is that of x within a mode.
        """
        logits, away, variance = self._logits(x, alpha, sigma, label)
        return logits.softmax(dim=1)[..., None], away, variance

    def _logits(
        self, x: Tensor, alpha: Level, sigma: Level, label: Tensor | None
    ) -> tuple[Tensor, Tensor, Level]:
        variance = alpha**2 * self.std**2 + sigma**2
        scale = alpha.reshape(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
        away = x[:, None, :] - scale * self.centres(x)
        logits = self._prior(x, label).log() - away.square().sum(-1) / (2 * variance)
        return logits, away, variance

    def _prior(self, like: Tensor, label: Tensor | None) -> Tensor:
        """Return the weights of the modes, [1, K], or given labels [N, K]."""
        weights = torch.tensor([self.weights], dtype=like.dtype, device=like.device)
        if label is None:
            return weights
        classes = torch.tensor(self.classes, dtype=torch.int64, device=label.device)
        wanted = label[:, None]
        own = weights * ((classes == wanted) | (wanted == NO_CLASS))
        return own / own.sum(1, keepdim=True)
