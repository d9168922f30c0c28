"""DCW against the closed form of its gains, on every path, and around every solver."""

import math
from itertools import pairwise
from typing import cast

import pytest
import torch

import ds
from ds import analytic, noise
from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.schedules import EDM, Linear, LinearBeta, Trig
from ds.diffusion.solvers import (
    DCW,
    DDIM,
    Clipped,
    DPMSolverPP,
    DPMSolverPPSinglestep,
    Heun,
    UniPC,
    bare,
    integrate,
)
from ds.engine.loop import Recurrence
from ds.training.presets import SolveConfig

FIELD = analytic.GaussianField(size=8)
KARRAS = grids.karras(13, EDM())
SOLVERS = [DDIM(), Heun(), DPMSolverPP(), DPMSolverPPSinglestep(), UniPC(), Clipped(DDIM(), 1e3)]
PATHS = [EDM(), LinearBeta(), Linear(), Trig(), Trig(0.5)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
FORMS = [
    DCW(low=0.03),
    DCW(low=0.1, weighted=True),
    DCW(low=0.1, high=0.02, wavelet=True),
    DCW(low=0.02, high=-0.01, wavelet=True, weighted=False),
]


def z(shape, rows=3):
    return noise(0, range(rows), shape, dtype=torch.float64)


def modes(x):
    return torch.fft.fft2(x, norm="ortho")


def gain(schedule, grid, variance, strength):
    """The closed form: (L + (1 + c) r r') / (L + r^2) a step, in y = x / alpha, r = sigma / alpha.

    `strength(r)` is c in a step from r.
    """
    levels = [sigma / alpha for alpha, sigma in map(schedule.at, (*grid, schedule.data))]
    steps = [
        (variance + (1 + strength(r)) * r * s) / (variance + r**2) for r, s in pairwise(levels)
    ]
    return torch.stack([torch.as_tensor(step, dtype=torch.float64) for step in steps]).prod(0)


@pytest.mark.parametrize("schedule", PATHS, ids=repr)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_mode_of_a_field_is_multiplied_by_the_product_of_the_closed_form(schedule, weighted):
    c, grid = 0.04, grids.karras(13, schedule)
    x = schedule.prior(z(FIELD.shape), grid[0])
    denoiser = FIELD.teacher(DDIM(), grid, schedule).denoiser
    end = integrate(denoiser, DCW(low=c, weighted=weighted), grid, x)
    spectrum = FIELD.spectrum(x)
    strength = (lambda r: c * min(1, r / 80)) if weighted else lambda r: c
    expected = gain(schedule, grid, spectrum, strength) * modes(x) / schedule.at(grid[0])[0]
    # float32 would miss this by far; a start at alpha = 1/160 loses two digits
    assert (modes(end) - expected).abs().max() < 1e-10
    plain = gain(schedule, grid, spectrum, lambda r: 0) * modes(x) / schedule.at(grid[0])[0]
    assert (modes(end) - plain).abs().max() > 1e-3


def test_bands_of_white_data_are_multiplied_by_the_product_of_the_closed_form():
    data = analytic.Gaussian(mean=0.0, std=0.3, shape=(2, 6, 6))
    x = 80 * z(data.shape)
    denoiser = data.teacher(DDIM(), KARRAS, EDM()).denoiser
    end = integrate(denoiser, DCW(low=0.1, high=0.03, wavelet=True), KARRAS, x)
    low = gain(EDM(), KARRAS, 0.09, lambda r: 0.1 * r / 80)
    high = gain(EDM(), KARRAS, 0.09, lambda r: 0.03 * (1 - r / 80))
    assert abs(low / high - 1) > 0.05
    means = haar(x)
    assert (end - low * means - high * (x - means)).abs().max() < 1e-10


def haar(x):
    """The low band, by the matrix of an orthonormal Haar transform; an odd side is repeated."""

    def band(n):
        rows = torch.zeros((n + 1) // 2, n + n % 2, dtype=torch.float64)
        for i in range(len(rows)):
            rows[i, 2 * i : 2 * i + 2] = 2**-0.5
        extend = torch.eye(n, dtype=torch.float64)[[*range(n), *[n - 1] * (n % 2)]]
        return (rows.T @ rows @ extend)[:n]

    return band(x.shape[2]) @ x @ band(x.shape[3]).T


@pytest.mark.parametrize("shape", [(1, 6, 4), (2, 5, 7), (1, 2, 2), (3, 3, 8)])
def test_bands_are_those_of_haar_for_odd_sides_too(shape):
    data = analytic.Gaussian(shape=shape)
    denoiser = data.teacher(DDIM(), KARRAS, EDM()).denoiser
    x, (t, s) = z(shape), KARRAS[3:5]
    plain, _ = DDIM().step(denoiser, x, t, s, None)
    dcw = DCW(low=0.5, high=0.2, wavelet=True, weighted=False)
    found, _ = dcw.step(denoiser, x, t, s, None)
    away = plain - denoiser(x, t).x0
    expected = plain + 0.5 * haar(away) + 0.2 * (away - haar(away))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    both = DCW(low=0.3, high=0.3, wavelet=True, weighted=False).step(denoiser, x, t, s, None)[0]
    pixels = DCW(low=0.3).step(denoiser, x, t, s, None)[0]
    torch.testing.assert_close(both, pixels, rtol=0, atol=1e-12)


@every_solver
def test_a_strength_of_zero_is_the_solver_to_the_bit(solver):
    for form in (DCW(solver), DCW(solver, wavelet=True), DCW(solver, weighted=True)):
        teachers = [FIELD.teacher(one, grids.quadratic(7)) for one in (solver, form)]
        plain, corrected = (t.sample(noise(0, range(2), FIELD.shape)) for t in teachers)
        assert torch.equal(plain, corrected)
        assert teachers[0].nfe == teachers[1].nfe and solver.order == form.order


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(3), DPMSolverPPSinglestep(), UniPC()])
def test_paths_are_views_of_one_correction(form, solver):
    """From one x / alpha over one range of sigma / alpha, paths end at one image."""
    form = DCW(solver, form.low, form.high, form.wavelet, form.weighted)
    y, ends = 20 * z(FIELD.shape), []
    for schedule in (EDM(), Linear(), Trig(), Trig(0.5)):
        top, bottom = (schedule.time(-math.log(r)) for r in (20, 0.1))
        grid = grids.log_snr(9, schedule, top=top, bottom=bottom)
        denoiser = FIELD.teacher(solver, grid, schedule).denoiser
        ends.append(integrate(denoiser, form, grid, schedule.at(top)[0] * y))
        plain = integrate(denoiser, solver, grid, schedule.at(top)[0] * y)
        assert (ends[-1] - plain).abs().max() > 1e-4
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


def test_a_step_of_heun_moves_away_from_its_second_prediction():
    data = analytic.GaussianMixture()
    denoiser = data.teacher(Heun(), KARRAS, EDM()).denoiser
    seen = []

    class Watching:
        schedule = denoiser.schedule

        def parts(self, x, t):
            seen.append(denoiser.parts(x, t))
            return seen[-1]

    x, (t, s) = 10 * z(data.shape), KARRAS[2:4]
    plain, _ = Heun().step(denoiser, x, t, s, None)
    found, _ = DCW(Heun(), low=0.1).step(cast(Denoiser, Watching()), x, t, s, None)
    assert len(seen) == 2
    torch.testing.assert_close(found, plain + 0.1 * (plain - seen[1].x0), rtol=0, atol=1e-12)
    assert (seen[0].x0 - seen[1].x0).abs().max() > 1e-3


def test_the_prediction_is_the_clipped_one_whichever_wraps_the_other():
    data, grid = analytic.Gaussian(std=1.0), grids.quadratic(6)
    outside, inside = (Clipped(DCW(low=0.1), 0.5), DCW(Clipped(DDIM(), 0.5), low=0.1))
    a, b = (data.teacher(solver, grid).sample(z(data.shape)) for solver in (outside, inside))
    assert torch.equal(a, b) and a.abs().max() == 0.5
    assert bare(outside) == bare(inside) == DDIM()


def test_noise_passes_through():
    data, grid = analytic.Gaussian(), grids.quadratic(6)
    draws = ds.Draws(5, torch.arange(3))
    plain, corrected = (
        data.teacher(solver, grid).sample(z(data.shape), draws=draws)
        for solver in (DDIM(eta=1.0), DCW(DDIM(eta=1.0), low=1e-6))
    )
    assert DCW(DDIM(eta=1.0)).stochastic and not DCW().stochastic
    torch.testing.assert_close(corrected, plain, rtol=0, atol=1e-4)
    assert not torch.equal(corrected, plain)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            analytic.GaussianMixture(),
            r"wavelet form takes pictures .* at least 2 x 2, not \[3, 2\]",
        ),
        (analytic.Gaussian(shape=(1, 1, 8)), r"not \[3, 1, 1, 8\]; the pixel form"),
    ],
)
def test_bands_of_what_is_no_picture_are_refused(data, words):
    teacher = data.teacher(DCW(low=0.1, wavelet=True), grids.quadratic(4))
    with pytest.raises(ValueError, match=words):
        teacher.sample(z(data.shape))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"high": 0.1}, "high = 0.1 is of the wavelet form; pass wavelet=True"),
        ({"low": math.nan}, "DCW: low must be at least -10"),
        ({"low": "1"}, "DCW: low must be a number"),
        ({"sigma_max": 0}, "sigma_max must be above 0"),
    ],
)
def test_a_wrong_correction_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        DCW(**fields)


def test_a_loop_of_the_engine_takes_pixels_and_refuses_bands():
    """A loop's table multiplies whole images, which bands are not."""
    grid = grids.quadratic(6)
    plain, pixels, bands = (
        FIELD.teacher(solver, grid) for solver in (DDIM(), DCW(low=0.1), DCW(low=0.1, wavelet=True))
    )
    assert not torch.allclose(Recurrence.of(plain).table, Recurrence.of(pixels).table)
    with pytest.raises(ValueError, match="wavelet form takes pictures"):
        Recurrence.of(bands)


def test_the_guided_evaluations_of_bands_are_counted():
    data = analytic.GaussianMixture()
    teacher = data.teacher(DDIM(), grids.quadratic(4), conditional=True)
    guided = ds.Guided(teacher.denoiser, 2.0)
    counts = {
        ds.Teacher(guided, solver, teacher.grid).nfe
        for solver in (DDIM(), DCW(low=0.1, wavelet=True))
    }
    assert counts == {2 * len(teacher.grid)}


def test_settings_put_the_correction_inside_the_clipping():
    schedule = LinearBeta()
    solver, _ = SolveConfig(solver="unipc", dcw=0.02, clip="static").build(schedule)
    assert solver == Clipped(DCW(UniPC(), low=0.02))
    assert SolveConfig(solver="unipc").build(schedule)[0] == UniPC()
    with pytest.raises(ValueError, match=r"solve\.dcw must be at most 10"):
        SolveConfig(dcw=11.0)
