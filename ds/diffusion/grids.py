"""Grids: which times a solver visits, from noise down to data, as a tuple of distinct indices.

Grids that are even in another variable than the index are rounded to indices, and where that gives
the same time twice, it is listed once: asking for more times than there are gives fewer calls.
The 2021 implementation visits some small times of its quadratic grid more than once. A step from
t to t changes nothing, so a grid here lists each time once: the same endpoint for fewer calls.
"""

import math
from typing import Annotated

import numpy as np

from ds.diffusion.schedules import MOST, AbstractSchedule
from ds.system.config import Between, require

Grid = tuple[int, ...]
Times = Annotated[int, Between(-math.inf, MOST)]  # before the rules of each grid


def uniform(n: int, *, num_steps: int = 1000) -> Grid:
    """Return n evenly spaced times, 0 included: 980, 960, ..., 0 for n = 50.

    Raises ValueError unless 1 <= n <= num_steps. Where n does not divide num_steps the spacing is
    rounded down and the largest times stay unvisited. Song et al. 2020, arXiv:2010.02502, D.2.
    """
    require("uniform", int, n=n, num_steps=num_steps)
    if not 1 <= n <= num_steps:
        raise ValueError(f"uniform: n must lie between 1 and {num_steps}, not {n}")
    spacing = num_steps // n
    return tuple(range((n - 1) * spacing, -1, -spacing))


def quadratic(n: int, *, top: int = 800) -> Grid:
    """Return the distinct times among int(linspace(0, sqrt(top), n)**2): dense near the data.

    quadratic(100) has 96 times, 800 down to 0. Raises ValueError unless n >= 2 and top >= 1.
    Song et al. 2020, arXiv:2010.02502, D.2; Luhman & Luhman 2021 for CIFAR-10 and CelebA.
    """
    require("quadratic", Times, n=n, top=top)
    if n < 2 or top < 1:
        raise ValueError(f"quadratic: need n >= 2 and top >= 1, not n = {n} and top = {top}")
    times = {int(t) for t in np.linspace(0, np.sqrt(top), n) ** 2}
    return tuple(sorted(times, reverse=True))


def log_snr(n: int, schedule: AbstractSchedule, *, top: int | None = None) -> Grid:
    """Return n times evenly spaced in lam = log(alpha / sigma), from top, or the last, down to 0.

    log_snr(24, LinearBeta(), top=800) has 24 times, log_snr(100, ...) 90. Raises ValueError
    unless n >= 2 and top is an index of the schedule above 0. Lu et al. 2022, arXiv:2206.00927,
    where it is the grid "logSNR".
    """
    lam = _lam("log_snr", n, schedule, top)
    return _nearest(np.linspace(lam[-1], lam[0], n), lam)


def karras(n: int, schedule: AbstractSchedule, *, top: int | None = None, rho: float = 7.0) -> Grid:
    """Return n times evenly spaced in (sigma / alpha)**(1 / rho), from top, or the last, to 0.

    Raises ValueError unless n >= 2, rho > 0 and top is an index of the schedule above 0. Karras et
    al. 2022, arXiv:2206.00364, Eq. 5 with sigma_min and sigma_max those of the times 0 and top.
    """
    if not rho > 0:
        raise ValueError(f"karras: rho must be positive, not {rho}")
    lam = _lam("karras", n, schedule, top)
    return _nearest(-rho * np.log(np.linspace(*np.exp(-lam[[-1, 0]] / rho), n)), lam)


def _lam(name: str, n: int, schedule: AbstractSchedule, top: int | None) -> np.ndarray:
    """Check the arguments of a grid; return lam of the times 0 to top."""
    top = schedule.num_steps - 1 if top is None else top
    require(name, Times, n=n, top=top)
    if n < 2 or top < 1:
        raise ValueError(f"{name}: need n >= 2 and top >= 1, not n = {n} and top = {top}")
    schedule.check(top)
    abar = schedule.alphas_bar()[: top + 1].numpy()
    return np.log(abar / (1 - abar)) / 2


def _nearest(wanted: np.ndarray, lam: np.ndarray) -> Grid:
    """Return the distinct indices nearest to the wanted lam, between indices linear in lam."""
    times = np.interp(wanted, lam[::-1], np.arange(len(lam))[::-1]).round()
    return tuple(sorted({int(t) for t in times}, reverse=True))
