"""The variances of data's modes, and what solvers make of them if the data are Gaussian.

Of Gaussian data every deterministic solver is a linear map, which multiplies each mode by a
number. That says, without a network, how much variance a solver loses on a grid, and which
correction of ds.solvers.DCW gives most of it back. Real data are not Gaussian: it is a forecast.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ds.diffusion.denoiser import Denoiser, Parts
from ds.diffusion.grids import Grid
from ds.diffusion.predictions import Estimate
from ds.diffusion.schedules import AbstractSchedule
from ds.diffusion.solvers import DCW, DDIM, AbstractSolver, integrate

# Modes with a smaller share of the mean variance do not show, and few samples do not give them.
LEAST = 1e-5
_GROUPS = 256  # of modes, in a fit
_RATIO = (5**0.5 - 1) / 2


def spectrum(samples: Tensor) -> Tensor:
    """Return the variances of the modes of samples [N, C, *sides], float64 [M] on the CPU, falling.

    A mode is a frequency of the orthonormal FFT over the sides, and a principal direction of the
    channels there: one of the covariance, for points [N, C]. The mean is left out, and so are modes
    with less than `LEAST` of the mean variance. Raises ValueError for fewer than 2 samples, and for
    samples without variance.
    """
    if samples.dim() < 2 or len(samples) < 2:
        raise ValueError(f"spectrum: needs samples [2 or more, C, ...], not {list(samples.shape)}")
    x = _fourier(samples).permute(2, 1, 0)
    found = torch.linalg.eigvalsh(x @ x.mH / (len(samples) - 1)).flatten()
    if not (mean := float(found.mean())) > 0:
        raise ValueError("spectrum: the samples are all alike; it needs some that differ")
    return found[found >= LEAST * mean].sort(descending=True).values


def spectrum_error(samples: Tensor, truth: Tensor) -> float:
    """Return the mean |log ratio| of the powers of samples and truth [N, C, *sides], by frequency.

    Both come from the same noise, so few are enough. Frequencies that `truth` has hardly any power
    in are left out, as `spectrum` does.
    """
    ours, true = (_fourier(x).abs().square().sum((0, 1)) for x in (samples, truth))
    shown = true >= LEAST * true.mean()
    return float((ours[shown] / true[shown]).log().abs().mean())


def _fourier(samples: Tensor) -> Tensor:
    """Return the orthonormal FFT over the sides, without the mean, [N, C, frequencies]; points
    [N, C] have one frequency.
    """
    x = samples.detach().cpu().double()
    x, sides = x - x.mean(0), tuple(range(2, x.dim()))
    x = torch.fft.fftn(x, dim=sides, norm="ortho") if sides else x
    return x.reshape(*x.shape[:2], -1)


def groups(variances: Tensor, most: int = _GROUPS) -> tuple[Tensor, Tensor]:
    """Return the geometric means of at most `most` groups of variances [M], and their sizes.

    Groups hold neighbours in size, about as many each.
    """
    parts = variances.sort(descending=True).values.tensor_split(min(most, len(variances)))
    sizes = torch.tensor([len(p) for p in parts], dtype=variances.dtype, device=variances.device)
    return torch.stack([p.log().mean().exp() for p in parts]), sizes


class _Modes:
    """What a solver needs of a denoiser: the exact one of independent Gaussian modes [N, M]."""

    def __init__(self, schedule: AbstractSchedule, variances: Tensor):
        self.schedule, self.variances = schedule, variances

    def __call__(self, x: Tensor, t: float) -> Estimate:
        return self.parts(x, t).estimate

    def parts(self, x: Tensor, t: float) -> Parts:
        """Return the exact prediction, as a denoiser does."""
        alpha, sigma = self.schedule.at(t)
        whole = x / (alpha**2 * self.variances + sigma**2)
        return Parts(alpha * self.variances * whole, sigma * whole, alpha, sigma, None, None)


def log_ratios(
    solver: AbstractSolver, grid: Grid, schedule: AbstractSchedule, variances: Tensor
) -> Tensor:
    """Return the log of (variance of a sample's mode / variance of the data's mode) [M], float64.

    The sampler is the real one, run on Gaussian modes of the given variances [M]. Raises ValueError
    for a solver that adds noise, and for variances that are not positive.
    """
    if solver.stochastic:
        raise ValueError(f"log_ratios: {solver} adds noise; accepted are deterministic solvers")
    variances = variances.double()
    if not bool((variances > 0).all()):
        raise ValueError("log_ratios: variances must be positive")
    start = schedule.prior(torch.ones_like(variances)[None], grid[0])
    end = integrate(cast(Denoiser, _Modes(schedule, variances)), solver, grid, start)[0]
    return 2 * end.abs().log() - variances.log()


def fitted(
    variances: Tensor,
    grid: Grid,
    schedule: AbstractSchedule,
    solver: AbstractSolver | None = None,
    *,
    weighted: bool = False,
) -> float:
    """Return the strength of DCW's pixel form that suits Gaussian data with these modes [M] best.

    It minimises the sum of |log ratio| over the modes, in closed form apart from a search in one
    dimension between -0.5 and 2. The solver is by default DDIM. Raises ValueError as `log_ratios`.
    """
    values, sizes = groups(variances.double())
    plain = DCW(solver or DDIM(), weighted=weighted)

    def off(low: float) -> float:
        found = log_ratios(replace(plain, low=low), grid, schedule, values)
        return float((found.abs() * sizes).sum())

    best = min((tenths / 10 for tenths in range(-5, 21)), key=off)
    a, b = best - 0.1, best + 0.1
    while b - a > 1e-6:  # golden section
        near, far = b - _RATIO * (b - a), a + _RATIO * (b - a)
        a, b = (a, far) if off(near) < off(far) else (near, b)
    return (a + b) / 2
