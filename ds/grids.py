"""Grids: which times a solver visits, from noise down to data, as a tuple of distinct indices.

The 2021 implementation visits some small times of its quadratic grid more than once. A step from
t to t changes nothing, so a grid here lists each time once: the same endpoint for fewer calls.
"""

import numpy as np

Grid = tuple[int, ...]


def uniform(n: int, *, num_steps: int = 1000) -> Grid:
    """Return n evenly spaced times, 0 included: 980, 960, ..., 0 for n = 50.

    Raises ValueError unless 1 <= n <= num_steps. Where n does not divide num_steps the spacing is
    rounded down and the largest times stay unvisited. Song et al. 2020, arXiv:2010.02502, D.2.
    """
    if not 1 <= n <= num_steps:
        raise ValueError(f"uniform: n must lie between 1 and {num_steps}, not {n}")
    spacing = num_steps // n
    return tuple(range((n - 1) * spacing, -1, -spacing))


def quadratic(n: int, *, top: int = 800) -> Grid:
    """Return the distinct times among int(linspace(0, sqrt(top), n)**2): dense near the data.

    quadratic(100) has 96 times, 800 down to 0. Raises ValueError unless n >= 2 and top >= 1.
    Song et al. 2020, arXiv:2010.02502, D.2; Luhman & Luhman 2021 for CIFAR-10 and CelebA.
    """
    if n < 2 or top < 1:
        raise ValueError(f"quadratic: need n >= 2 and top >= 1, not n = {n} and top = {top}")
    times = {int(t) for t in np.linspace(0, np.sqrt(top), n) ** 2}
    return tuple(sorted(times, reverse=True))
