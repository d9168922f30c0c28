"""Spectra of samples, and the correction that is fitted to one in closed form."""

import math

import pytest
import torch

from ds import analytic, noise
from ds.diffusion.grids import karras
from ds.diffusion.schedules import EDM, Linear
from ds.diffusion.solvers import DCW, DDIM, Heun, UniPC
from ds.evaluation.spectrum import fitted, groups, log_ratios, spectrum, spectrum_error

WIDE = torch.logspace(-4, 1, 11, dtype=torch.float64)


def off(solver, n, schedule=None, variances=WIDE):
    schedule = schedule or EDM()
    return float(log_ratios(solver, karras(n, schedule), schedule, variances).abs().sum())


@pytest.mark.parametrize(
    ("n", "least", "most", "plain"),
    [(5, 0.05, 0.37, 20.205), (13, 0.44, 0.69, 6.245), (20, 0.58, 0.79, 3.967)],
)
def test_steps_of_euler_lose_variance(n, least, most, plain):
    ratios = log_ratios(DDIM(), karras(n, EDM()), EDM(), WIDE).exp()
    assert ratios.min() == pytest.approx(least, abs=6e-3)
    assert ratios.max() == pytest.approx(most, abs=6e-3)
    assert off(DDIM(), n) == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize(
    ("n", "weighted", "strength", "left"),
    [
        (13, False, 0.0323, 0.381),
        (13, True, 0.1157, 1.319),
        (8, False, 0.0956, 0.963),
        (8, True, 0.3140, 2.467),
        (20, False, 0.0127, 0.263),
        (20, True, 0.0494, 0.856),
    ],
)
def test_the_fitted_correction_takes_most_of_the_error_away(n, weighted, strength, left):
    found = fitted(WIDE, karras(n, EDM()), EDM(), weighted=weighted)
    assert found == pytest.approx(strength, abs=2e-4)
    with_it = off(DCW(low=found, weighted=weighted), n)
    assert with_it == pytest.approx(left, abs=1e-3)
    assert with_it < 0.3 * off(DDIM(), n)
    # the other sign makes it worse
    assert off(DCW(low=-found, weighted=weighted), n) > 1.5 * off(DDIM(), n)


@pytest.mark.parametrize("solver", [DDIM(), Heun(), UniPC()], ids=repr)
def test_a_fit_is_the_best_strength_of_its_solver_and_path(solver):
    found = fitted(WIDE, karras(9, Linear()), Linear(), solver)
    best = off(DCW(solver, low=found), 9, Linear())
    for near in (-0.01, -0.001, 0.001, 0.01):
        assert off(DCW(solver, low=found + near), 9, Linear()) > best
    assert best < off(solver, 9, Linear())


def test_a_fit_to_samples_of_a_field_mends_the_spectrum_of_its_samples():
    """From samples alone: their spectrum, the strength, and the sampler's images."""
    field, grid = analytic.GaussianField(), karras(13, EDM())
    z = noise(1, range(64), field.shape, dtype=torch.float64)
    truth = field.endpoint(EDM().prior(z), *EDM().at(80))
    strength = fitted(spectrum(field.sample(0, range(64))), grid, EDM())
    errors = [
        spectrum_error(field.teacher(solver, grid, EDM()).sample(z), truth)
        for solver in (DDIM(), DCW(low=strength), DCW(low=-strength))
    ]
    assert errors[1] < 0.3 * errors[0] < 0.3 * errors[2]


def test_the_spectrum_of_many_samples_is_that_of_the_field():
    field = analytic.GaussianField(size=8)
    found = spectrum(field.sample(0, range(4000)))
    exact = field.spectrum(found).flatten().sort(descending=True).values
    assert (found / exact).log().abs().max() < 0.15
    assert found.shape == (64,) and float(found.sum() / exact.sum()) == pytest.approx(1, abs=0.02)


def test_colours_and_points_have_principal_directions():
    mix = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.1, 0.0], [2.0, 0.0, 0.2]])
    white = noise(0, range(5000), (3, 4, 4))
    found = spectrum(torch.einsum("ij,njhw->nihw", mix, white)).reshape(3, 16)
    exact = torch.linalg.eigvalsh((mix @ mix.T).double()).flip(0)
    assert (found.mean(1) / exact).log().abs().max() < 0.05
    points = noise(0, range(5000), (2,)) * torch.tensor([3.0, 0.5])
    assert spectrum(points).tolist() == pytest.approx([9, 0.25], rel=0.1)


def test_modes_without_power_are_left_out():
    x = noise(0, range(64), (1, 4, 4))
    x[:] = x.mean((2, 3), keepdim=True)  # only the mean of each image varies
    assert len(spectrum(x)) == 1
    assert spectrum_error(2 * x, x) == pytest.approx(math.log(4))
    assert spectrum_error(x, x) == 0


def test_groups_hold_all_modes():
    values, sizes = groups(torch.arange(1.0, 101.0, dtype=torch.float64), 7)
    assert sizes.sum() == 100 and len(values) == 7 and (values.diff() < 0).all()
    few, ones = groups(WIDE)
    torch.testing.assert_close(few.flip(0), WIDE)
    assert ones.tolist() == [1] * 11


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spectrum(torch.zeros(1, 1, 4, 4)), "needs samples"),
        (lambda: spectrum(torch.ones(4, 1, 4, 4)), "all alike"),
        (lambda: off(DDIM(eta=1.0), 5), "adds noise"),
        (lambda: off(DDIM(), 5, variances=-WIDE), "must be positive"),
    ],
)
def test_what_has_no_spectrum_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
