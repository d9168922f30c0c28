"""The grids against the formulas of the 2021 code."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds import analytic, noise
from ds.diffusion import grids
from ds.diffusion.schedules import (
    EDM,
    Cosine,
    Linear,
    LinearBeta,
    ScaledLinear,
    Sigmoid,
    Table,
    Trig,
    zero_terminal_snr,
)
from ds.diffusion.solvers import DDIM, integrate
from ds.training.presets import SolveConfig

RAW = tuple(int(t) for t in np.linspace(0, np.sqrt(800), 100) ** 2)  # with its repeats


def test_quadratic_100_has_the_96_distinct_times_of_the_2021_list():
    assert len(RAW) == 100 and grids.quadratic(100) == tuple(sorted(set(RAW), reverse=True))
    assert len(grids.quadratic(100)) == 96


def test_quadratic_100_starts_and_ends_as_published():
    grid = grids.quadratic(100)
    assert grid[:4] == (800, 783, 768, 752)
    assert grid[:-10:-1] == (0, 1, 2, 3, 5, 6, 8, 9, 11)


@pytest.mark.parametrize(
    "data", [analytic.Gaussian(), analytic.GaussianField(), analytic.GaussianMixture()]
)
def test_the_repeats_of_the_2021_list_change_nothing(data):
    denoiser = data.teacher(DDIM(), (0,)).denoiser
    z = noise(0, range(20), data.shape, dtype=torch.float64)
    with_repeats = integrate(denoiser, DDIM(), RAW[::-1], z)
    without = integrate(denoiser, DDIM(), grids.quadratic(100), z)
    # A step from t to t divides by alpha and multiplies again: one rounding of a number below 2.
    torch.testing.assert_close(with_repeats, without, rtol=0, atol=4.5e-16)


def test_uniform_50_is_lsun_s_grid():
    assert grids.uniform(50) == tuple(range(980, -1, -20))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 1000), top=st.integers(1, 9999))
def test_quadratic_is_the_formula_without_repeats(n, top):
    formula = np.unique((np.linspace(0, np.sqrt(top), n) ** 2).astype(np.int64))
    assert grids.quadratic(n, top=top) == tuple(formula[::-1].tolist())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))))
def test_uniform_is_evenly_spaced_from_zero(sizes):
    n, num_steps = sizes
    expected = np.arange(n) * (num_steps // n)
    assert grids.uniform(n, LinearBeta(num_steps)) == tuple(expected[::-1].tolist())


def test_times_are_plain_integers():
    # numpy's would go into JSON and into schedule.at as something else
    assert all(type(t) is int for t in (*grids.quadratic(10), *grids.uniform(10)))


@pytest.mark.parametrize("n", [-1, 0, 1001])
def test_uniform_names_an_impossible_count(n):
    with pytest.raises(ValueError, match=f"between 1 and 1000, not {n}"):
        grids.uniform(n)


@pytest.mark.parametrize(("n", "top"), [(1, 800), (0, 800), (-5, 800), (10, 0), (10, -1)])
def test_quadratic_names_an_impossible_count_or_top(n, top):
    with pytest.raises(ValueError, match=f"not n = {n} and top = {top}"):
        grids.quadratic(n, top=top)


EVEN = pytest.mark.parametrize("grid", [grids.log_snr, grids.karras])


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 300), top=st.integers(1, 999))
def test_grids_even_in_noise_fall_from_top_to_0_without_repeats(n, top):
    for grid in (grids.log_snr, grids.karras):
        times = grid(n, LinearBeta(), top=top)
        assert times[0] == top and times[-1] == 0 and len(times) <= n
        assert all(type(t) is int for t in times)
        assert list(times) == sorted(set(times), reverse=True)


@EVEN
def test_grids_even_in_noise_list_a_time_once_when_asked_for_too_many(grid):
    assert len(grid(24, LinearBeta(), top=800)) == 24
    assert 60 < len(grid(100, LinearBeta(), top=800)) < 100
    assert grid(10_000, LinearBeta(5)) == (4, 3, 2, 1, 0)
    assert grid(2, LinearBeta(), top=1) == (1, 0)


@pytest.mark.parametrize(
    ("grid", "flag"),
    [(grids.karras, "use_karras_sigmas"), (grids.log_snr, "use_exponential_sigmas")],
)
@pytest.mark.parametrize("n", [10, 24])
def test_grids_even_in_noise_have_the_times_of_diffusers(grid, flag, n):
    peer = pytest.importorskip("diffusers").DPMSolverMultistepScheduler(**{flag: True})
    peer.set_timesteps(n)
    times = peer.timesteps.double()
    # its table of sigmas is float32, and it may round a half the other way
    ours = torch.tensor(grid(n, LinearBeta()), dtype=torch.float64)
    assert (ours - times).abs().max() <= 1


@EVEN
@pytest.mark.parametrize(("n", "top"), [(1, 800), (0, 800), (10, 0), (10, -1)])
def test_grids_even_in_noise_name_an_impossible_count_or_top(grid, n, top):
    with pytest.raises(ValueError, match=f"not n = {n} and top = {top}"):
        grid(n, LinearBeta(), top=top)


@EVEN
def test_grids_even_in_noise_name_a_top_the_schedule_lacks(grid):
    with pytest.raises(ValueError, match="t = 1000 does not exist"):
        grid(10, LinearBeta(), top=1000)


def test_karras_names_an_impossible_rho():
    with pytest.raises(ValueError, match="rho must be positive, not 0"):
        grids.karras(10, LinearBeta(), rho=0)


PATHS = pytest.mark.parametrize("schedule", [EDM(), Linear(), Trig(), Trig(0.5)], ids=repr)


@PATHS
def test_grids_in_continuous_time_are_even_in_their_variable(schedule):
    def steps(values):
        return np.diff(np.asarray(values))

    n = 9
    uniform, quadratic = grids.uniform(n, schedule), grids.quadratic(n, schedule)
    np.testing.assert_allclose(steps(uniform), -schedule.noise / n)
    np.testing.assert_allclose(steps(np.sqrt(quadratic)), -(schedule.noise**0.5) / n)
    assert uniform[0] == quadratic[0] == schedule.noise
    lams = [schedule.lam(t) for t in grids.log_snr(n, schedule)]
    np.testing.assert_allclose(steps(lams), (lams[-1] - lams[0]) / (n - 1))
    roots = [np.exp(-schedule.lam(t) / 7) for t in grids.karras(n, schedule)]
    np.testing.assert_allclose(steps(roots), (roots[-1] - roots[0]) / (n - 1))


@PATHS
@EVEN
def test_in_continuous_time_sigma_over_alpha_runs_from_80_to_a_500th_by_default(grid, schedule):
    times = grid(7, schedule)
    assert len(times) == 7 and all(type(t) is float for t in times)
    assert [np.exp(-schedule.lam(t)) for t in (times[0], times[-1])] == pytest.approx([80, 0.002])


@EVEN
def test_the_ends_of_a_grid_can_be_set(grid):
    assert grid(5, Linear(), top=0.9, bottom=0.1)[::4] == (0.9, 0.1)
    assert grid(5, LinearBeta(), top=900, bottom=10)[::4] == (900, 10)


def test_karras_on_edm_is_the_formula():
    i, n = np.arange(18), 18
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(grids.karras(18, EDM()), expected)


@EVEN
def test_a_table_without_signal_at_its_end_is_visited_from_the_time_before(grid):
    assert grid(3, Table((0.1, 0.5, 0.9, 1.0)))[0] == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: grids.uniform(0, Linear()), "between 1 and 1000000, not 0"),
        (lambda: grids.quadratic(5, Linear(), top=1.5), "t = 1.5 does not exist"),
        (lambda: grids.quadratic(5, LinearBeta(100), top=100), "t = 100 does not exist"),
        (lambda: grids.quadratic(5, EDM(), top=0), "top > 0"),
        (lambda: grids.log_snr(5, Linear(), top=1.0), "some signal at top"),
        (lambda: grids.karras(5, Linear(), top=0.5, bottom=0.6), "data < bottom < top"),
        (lambda: grids.karras(5, Linear(), bottom=0.0), "data < bottom"),
        (lambda: grids.karras(5, LinearBeta(), top=10.5), "top must be a whole number"),
    ],
)
def test_what_a_grid_cannot_be_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


TIMES = {  # what diffusers' DDIM visits
    "leading": (20, 1000, 0),
    "leading, an offset": (20, 1000, 1),
    "leading, uneven": (30, 1000, 1),
    "trailing": (50, 1000, 0),
    "trailing, uneven": (30, 1000, 0),
    "trailing, few steps": (7, 50, 0),
    "linspace": (50, 1000, 0),
    "linspace, all": (50, 50, 0),
}


@pytest.mark.parametrize("name", TIMES)
def test_a_spacing_has_the_times_of_diffusers(name):
    n, steps, offset = TIMES[name]
    spacing = name.partition(",")[0]
    theirs = pytest.importorskip("diffusers").DDIMScheduler(
        num_train_timesteps=steps, timestep_spacing=spacing, steps_offset=offset
    )
    theirs.set_timesteps(n)
    found = grids.uniform(n, LinearBeta(steps), spacing=spacing, offset=offset)
    assert found == tuple(theirs.timesteps.tolist())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))))
def test_trailing_times_fall_from_the_last_index(sizes):
    n, num_steps = sizes
    grid = grids.uniform(n, LinearBeta(num_steps, 1e-6, 1e-5), spacing="trailing")
    assert grid[0] == num_steps - 1 and grid[-1] >= 0 and len(grid) == n


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"spacing": "log"},
            "spacing must be one of leading, trailing, linspace, strided, not 'log'",
        ),
        ({"offset": -1}, "an offset is above 0"),
        ({"offset": 1, "spacing": "trailing"}, "of leading indices, not 1"),
        ({"offset": 20}, "t = 1000 does not exist"),
        ({"spacing": "strided", "n": 999}, "no whole stride gives 999 of 1000 times; near"),
    ],
)
def test_a_spacing_that_there_is_not_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        grids.uniform(**{"n": 50, "schedule": LinearBeta(), **options})


STARTS = [  # a schedule, and the largest time of the paper's grids
    (LinearBeta(), 800),
    (LinearBeta(4000, 2.5e-5, 5e-3), 3200),
    (LinearBeta(100, 1e-3, 0.2), 80),
    (LinearBeta(50, 2e-3, 0.4), 40),
    (Cosine(), 974),
    (Cosine(4000), 3897),
    (Sigmoid(), 815),
    (ScaledLinear(), 999),
    (zero_terminal_snr(LinearBeta()), 800),
    (zero_terminal_snr(ScaledLinear()), 923),
    (Table((0.5, 0.9)), 1),
    (LinearBeta(1), 0),
    (EDM(), 80),
    (Linear(), 1),
]


@pytest.mark.parametrize(("schedule", "time"), STARTS, ids=lambda v: f"{v!s:.40}")
def test_a_schedule_starts_where_its_signal_is_gone(schedule, time):
    assert grids.start(schedule) == time
    if time > 1:
        assert grids.quadratic(20, schedule)[0] == pytest.approx(time, abs=1)  # rounding


def gaussian_std(schedule, t):
    """The deviation of what the exact ODE makes of pure noise at time t, where 0.15 is right."""
    z = noise(0, range(2000), (4,), dtype=torch.float64)
    z = (z - z.mean()) / z.std()
    return analytic.Gaussian(0.0, 0.15, (4,)).endpoint(z, *schedule.at(t)).std().item()


@pytest.mark.parametrize("schedule", [s for s, _ in STARTS[:-4]], ids=lambda v: f"{v!s:.40}")
@pytest.mark.parametrize("grid", ["quadratic", "uniform", "log_snr", "karras"])
def test_an_exact_teacher_on_any_schedule_draws_data_of_the_right_width(schedule, grid):
    times = SolveConfig(grid=grid, steps=50).build(schedule)[1]
    assert gaussian_std(schedule, times[0]) == pytest.approx(0.15, rel=0.01)


def test_an_index_that_is_absolute_is_not_the_start_of_another_schedule():
    """An exact teacher of 4000 steps came out with 0.25 when it started at index 800."""
    assert gaussian_std(LinearBeta(4000, 2.5e-5, 5e-3), 800) > 0.24
    assert gaussian_std(Cosine(), 800) > 0.155


def test_a_teacher_of_4000_steps_samples_data_of_the_right_width():
    schedule = LinearBeta(4000, 2.5e-5, 5e-3)
    data = analytic.Gaussian(0.0, 0.15, (4,))
    z = noise(0, range(2000), (4,), dtype=torch.float64)
    teacher = data.teacher(*SolveConfig(solver="unipc").build(schedule), schedule)
    assert teacher.sample((z - z.mean()) / z.std()).std().item() == pytest.approx(0.15, rel=0.01)


def test_a_grid_that_starts_with_much_signal_is_said(caplog):
    grids.warn_of_signal(Cosine(), grids.uniform(50, Cosine()), "x")
    grids.warn_of_signal(LinearBeta(), grids.quadratic(100), "x")
    assert not caplog.records
    grids.warn_of_signal(Cosine(), grids.uniform(5, Cosine()), "teacher")
    assert "teacher: sampling starts from pure noise at time 800 of 999" in caplog.text
    assert "alpha / sigma is still 0.32" in caplog.text
