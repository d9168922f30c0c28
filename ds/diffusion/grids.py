"""Grids: which times a solver visits, from noise down to data, as a tuple of distinct times.

The step from the last time to the data is understood. On a table of steps the times are indices:
those of a grid that is even in another variable are rounded, and where that gives the same time
twice, it is listed once, so asking for more times than there are gives fewer calls. In continuous
time they are real numbers.

The 2021 implementation visits some small times of its quadratic grid more than once. A step from
t to t changes nothing, so a grid here lists each time once: the same endpoint for fewer calls.
"""

import logging
import math
from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np

from ds.diffusion.schedules import MOST, AbstractSchedule, AbstractTable, LinearBeta
from ds.system.config import Between, require

Grid = tuple[float, ...]
Times = Annotated[int, Between(-math.inf, MOST)]  # before the rules of each grid
Spacing = Literal["leading", "trailing", "linspace", "strided"]
log = logging.getLogger("ds")
# The most signal, alpha, at the first time of a grid. LinearBeta() leaves 0.0388 at index 800.
SIGNAL = 0.04
# alpha / sigma at the first time from which `warn_of_signal` warns: with 0.14, data of a small
# deviation come out with one that is 1 % too large.
MUCH_SIGNAL = 0.14
# The noise levels, sigma / alpha, of EDM: the ends of a grid on a schedule that has no own.
LARGEST, SMALLEST = 80.0, 0.002


def start(schedule: AbstractSchedule) -> float:
    """Return the largest time that the paper's grids visit: 800 of LinearBeta(), an index.

    A sampler takes pure noise for the state at this time. On a table it is therefore the first
    index from 4/5 of the steps on whose alpha is at most 0.04, or else the last index. In
    continuous time it is the noise.
    """
    if not isinstance(schedule, AbstractTable):
        return schedule.noise
    late = schedule.num_steps * 4 // 5
    left = schedule.alphas_bar()[late:].sqrt()
    return late + min(int((left > SIGNAL).sum()), len(left) - 1)  # alpha falls


def warn_of_signal(schedule: AbstractSchedule, grid: Grid, where: str) -> None:
    """Log a warning if much signal is left at the first time, for which samplers take noise."""
    left = math.exp(schedule.lam(grid[0]))
    if left > MUCH_SIGNAL:
        log.warning(
            "%s: sampling starts from pure noise at time %g of %g, where alpha / sigma is still "
            "%.2f: the deviation of the samples can be off by %.0f %%; a grid that starts later, "
            "if the schedule has one, mends that",
            where,
            grid[0],
            schedule.noise,
            left,
            50 * left**2,
        )


def uniform(
    n: int,
    schedule: AbstractSchedule | None = None,
    *,
    spacing: Spacing = "leading",
    offset: int = 0,
) -> Grid:
    """Return n evenly spaced times: 980, 960, ..., 0 for n = 50 and LinearBeta(), the default.

    On a table of N steps the spacing has the meaning that it has in diffusers:

        leading       from 0 + offset upwards by N // n, so that the largest times stay unvisited
        trailing      from N - 1 downwards by N / n
        linspace      from N - 1 to 0, which is "n" of ADM
        strided       from 0 upwards by the least whole number that gives n times: "ddimn" of ADM

    Few leading times start where much signal is left, above all on schedules such as Cosine, whose
    noise rises late: with n = 10, alpha is 0.16 at the first. Trailing ones start at the noise. In
    continuous time, n even steps lead from the noise to the data, whatever the spacing.

    Raises ValueError unless n is at least 1 and a table has n times, for a stride that does not
    exist, and for an offset, or a spacing, that is not accepted. Song et al. 2020,
    arXiv:2010.02502, D.2; Lin et al. 2023, arXiv:2305.08891, Table 2.
    """
    schedule = schedule or LinearBeta()
    table = isinstance(schedule, AbstractTable)
    most = schedule.num_steps if isinstance(schedule, AbstractTable) else MOST
    require("uniform", int, n=n, offset=offset)
    require("uniform", Spacing, spacing=spacing)
    if not 1 <= n <= most:
        raise ValueError(f"uniform: n must lie between 1 and {most}, not {n}")
    if offset and not (table and spacing == "leading" and offset > 0):
        raise ValueError(f"uniform: an offset is above 0, of leading indices, not {offset}")
    if not table:
        return tuple(schedule.noise * (i / n) for i in range(n, 0, -1))
    if spacing == "linspace":
        return _distinct(np.linspace(0, schedule.noise, n).round())
    if spacing == "trailing":  # a last index of -1 comes from rounding
        return _distinct(t for t in np.arange(most, 0, -most / n).round() - 1 if t >= 0)
    if spacing == "strided":
        stride = -(-most // n)  # at the least
        if len(times := range(0, most, stride)) != n:
            near = ", ".join(map(str, sorted({len(times), -(-most // (stride - 1))})))
            raise ValueError(
                f"uniform: no whole stride gives {n} of {most} times; near it are {near}"
            )
        return tuple(reversed(times))
    times = range((n - 1) * (most // n) + offset, -1, -(most // n))[:n]
    schedule.check(times[0])
    return tuple(times)


def quadratic(
    n: int, schedule: AbstractSchedule | None = None, *, top: float | None = None
) -> Grid:
    """Return times evenly spaced in their square root: dense near the data.

    On a table they are the distinct times among int(linspace(0, sqrt(top), n)**2): quadratic(100)
    has 96 times, 800 down to 0, of LinearBeta(). In continuous time, n steps lead from top to the
    data. top is by default `start(schedule)`. Raises ValueError unless n >= 2, top is positive and
    a time of the schedule, if one is given. Song et al. 2020, arXiv:2010.02502, D.2; Luhman &
    Luhman 2021 for CIFAR-10 and CelebA.
    """
    if top is None:
        top = start(schedule or LinearBeta())
    if schedule is not None and not isinstance(schedule, AbstractTable):
        _check("quadratic", n, top, 0)
        schedule.check(top)
        return tuple(top * (i / n) ** 2 for i in range(n, 0, -1))
    require("quadratic", Times, n=n, top=top)
    _check("quadratic", n, top, 1)
    if schedule is not None:
        schedule.check(top)
    return _distinct((np.linspace(0, np.sqrt(top), n) ** 2).astype(int))


def log_snr(
    n: int, schedule: AbstractSchedule, *, top: float | None = None, bottom: float | None = None
) -> Grid:
    """Return n times evenly spaced in lam = log(alpha / sigma), from `top` down to `bottom`.

    top is by default the noisiest time; where alpha is 0 there, it is the one of sigma / alpha = 80
    (of a table, the one before the last). bottom is by default index 0 of a table, else the time of
    sigma / alpha = 0.002. log_snr(24, LinearBeta(), top=800) has 24 times, log_snr(100, ...) 90.
    Raises ValueError unless n >= 2 and both are times of the schedule, bottom below top. Lu et al.
    2022, arXiv:2206.00927, where it is the grid "logSNR".
    """
    top, bottom = _ends("log_snr", n, schedule, top, bottom)
    return _at(schedule, np.linspace(schedule.lam(top), schedule.lam(bottom), n), top, bottom)


def karras(
    n: int,
    schedule: AbstractSchedule,
    *,
    top: float | None = None,
    bottom: float | None = None,
    rho: float = 7.0,
    whole: bool = True,
) -> Grid:
    """Return n times evenly spaced in (sigma / alpha)**(1 / rho), from `top` down to `bottom`.

    Both are by default those of log_snr. On a table the times are indices; if not `whole` they lie
    between them, so that the noise levels are exact and all n are distinct. The network is then
    told real numbers. Raises ValueError as log_snr does, and unless rho > 0. Karras et al. 2022,
    arXiv:2206.00364, Eq. 5.
    """
    if not rho > 0:
        raise ValueError(f"karras: rho must be positive, not {rho}")
    top, bottom = _ends("karras", n, schedule, top, bottom, whole)
    ends = np.exp(-np.array([schedule.lam(top), schedule.lam(bottom)]) / rho)
    lams = -rho * np.log(np.linspace(ends[0], ends[1], n))
    return _at(schedule, lams, top, bottom, whole)


def _ends(
    name: str,
    n: int,
    schedule: AbstractSchedule,
    top: float | None,
    bottom: float | None,
    whole: bool = True,
) -> tuple[float, float]:
    """Check the arguments of a grid; return its first and last time."""
    table = isinstance(schedule, AbstractTable)
    if top is None:
        top = schedule.noise
        if schedule.lam(top) == -math.inf:
            top = top - 1 if table else schedule.time(-math.log(LARGEST))
    if bottom is None:
        bottom = 0 if table else schedule.time(-math.log(SMALLEST))
    _check(name, n, top, 1 if table else 0)
    schedule.check(top, bottom)
    if table and whole:
        require(name, Times, top=top, bottom=bottom)
    if not schedule.data < bottom < top or schedule.lam(top) == -math.inf:
        raise ValueError(
            f"{name}: need data < bottom < top and some signal at top, not bottom = {bottom} and "
            f"top = {top}"
        )
    return top, bottom


def _check(name: str, n: int, top: float, least: float) -> None:
    require(name, Times, n=n)
    if n < 2 or not top >= least or not top > 0:
        words = f"top >= {least}" if least else "top > 0"
        raise ValueError(f"{name}: need n >= 2 and {words}, not n = {n} and top = {top}")


def _at(
    schedule: AbstractSchedule, lams: np.ndarray, top: float, bottom: float, whole: bool = True
) -> Grid:
    """Return the times of given lam, the first and the last of which are `top` and `bottom`."""
    if whole and isinstance(schedule, AbstractTable):
        return _distinct(schedule.nearest(lams))
    return (top, *map(schedule.time, lams[1:-1].tolist()), bottom)


def _distinct(times: Iterable[int]) -> Grid:
    return tuple(sorted({int(t) for t in times}, reverse=True))
