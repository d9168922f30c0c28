"""Densities of times, each by a chi-square test that the others fail."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ds.diffusion.noise import Draws
from ds.methods import times

COUNT, STREAM = 20_000, 0x5B7D
DRAWS = Draws(3, torch.arange(COUNT))
LEVELS = times.log_normal(DRAWS, STREAM, -1.1, 2.0)


def cosh(rate):
    """The distribution function of a density proportional to e^(rate t) + e^(rate (1 - t))."""

    def below(t):
        return (np.exp(rate * t) - np.exp(rate * (1 - t))) / (2 * np.exp(rate) - 2) + 0.5

    return below


def normal(mean, std):
    return lambda t: stats.norm.cdf(np.log(t / (1 - t)), mean, std)


def log_normal(t):
    """The distribution function of sigma / (1 + sigma) where log(sigma) is normal."""
    return stats.norm.cdf(np.log(t / (1 - t)), -1.1, 2.0)


def cut(t):
    """That of log(level) / log(80) where log(level) is normal, cut to levels from 1 to 80."""
    start, inside, end = (stats.norm.cdf(np.log(x), -1.1, 2.0) for x in (1.0, 80.0**t, 80.0))
    return (inside - start) / (end - start)


def student(t):
    """That of log(level) / log(80) for Student's distribution, cut to levels from 1 to 80."""
    below = stats.t(0.01, scale=0.2).cdf
    return (below(t * math.log(80)) - 0.5) / (below(math.log(80)) - 0.5)


# The times of a density, and the share of them that should be below t.
DENSITIES = {
    "uniform": (lambda: DRAWS.uniform(STREAM), lambda t: t),
    "grid": (lambda: (times.grid(DRAWS, STREAM, 40) + 0.5) / 40, lambda t: t),
    "logit-normal": (lambda: times.logit_normal(DRAWS, STREAM, -0.4, 1.0), normal(-0.4, 1.0)),
    "two-ended": (lambda: times.two_ended(DRAWS, STREAM), cosh(4.0)),
    "log-normal": (lambda: LEVELS / (1 + LEVELS), log_normal),
    "cut": (
        lambda: times.cut_log_normal(DRAWS, STREAM, -1.1, 2.0, 1.0, 80.0).log() / math.log(80),
        cut,
    ),
    "late": (lambda: times.late(DRAWS, STREAM, 1.0, 80.0).log() / math.log(80), student),
    "steeper": (lambda: times.two_ended(DRAWS, STREAM, 8.0), cosh(8.0)),
}


def misfit(drawn, below):
    """Return the probability that drawn times are as far from a density, or further."""
    edges = np.linspace(0, 1, 21)
    inside = below(edges[1:-1])
    expected = COUNT * np.diff([0.0, *inside, 1.0])
    found = np.histogram(drawn.double().numpy(), edges)[0]
    return stats.chisquare(found, expected).pvalue


@pytest.mark.parametrize("name", DENSITIES)
def test_times_have_their_density_by_a_chi_square_test(name):
    draw, below = DENSITIES[name]
    assert misfit(draw(), below) > 0.01
    others = [other for _, other in DENSITIES.values() if other(0.2) != below(0.2)]
    assert len(others) >= 3
    assert max(misfit(draw(), other) for other in others) < 1e-9


def test_times_of_two_ends_keep_a_margin():
    t = times.two_ended(DRAWS, STREAM, margin=0.1)
    assert 0.1 <= t.min() < 0.101 and 0.899 < t.max() <= 0.9
    assert times.two_ended(DRAWS, STREAM).min() >= 1e-5


def test_times_do_not_depend_on_how_rows_are_cut():
    part = Draws(3, DRAWS.index[100:200])
    for draw in (
        lambda draws: times.grid(draws, STREAM, 7),
        lambda draws: times.logit_normal(draws, STREAM, 0.0, 1.0),
        lambda draws: times.two_ended(draws, STREAM),
        lambda draws: times.log_normal(draws, STREAM, -1.1, 2.0),
        lambda draws: times.late(draws, STREAM, 1.0, 80.0),
        lambda draws: times.cut_log_normal(draws, STREAM, -1.1, 2.0, 0.1, 1.0),
    ):
        torch.testing.assert_close(draw(part), draw(DRAWS)[100:200])  # but for its last bit


def test_a_grid_has_all_of_its_times_and_no_other():
    assert times.grid(DRAWS, STREAM, 7).unique().tolist() == [*range(7)]
    assert times.grid(DRAWS, STREAM, 1).unique().tolist() == [0]
