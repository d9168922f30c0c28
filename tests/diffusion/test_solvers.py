"""Every solver against closed forms: its order, its cost, and for DDIM each step."""

import dataclasses
import importlib
import json
import math
import pkgutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import ds
from ds import analytic, noise
from ds.diffusion import grids, solvers
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.schedules import EDM, AbstractTable, Cosine, Linear, LinearBeta, Table, Trig
from ds.diffusion.solvers import (
    DDIM,
    AbstractSolver,
    Ancestral,
    Clipped,
    DDIMToFirst,
    DPMSolverPP,
    DPMSolverPPSinglestep,
    Heun,
    Renoise,
    SameNoise,
    UniPC,
)
from ds.methods.proof import Formula
from ds.models.teacher import Teacher
from ds.system.config import from_json, to_json

# So fine that rounding times to its indices does not show, nor the step from time 0 to the data.
FINE = LinearBeta(200_000, 1e-10, 1e-4)
MODULES = [
    importlib.import_module(f"ds.diffusion.solvers.{m.name}")
    for m in pkgutil.iter_modules(solvers.__path__)
]
SOLVERS = sorted(
    {
        value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, AbstractSolver)
        and not value.__abstractmethods__
    },
    key=lambda cls: cls.__name__,
)
EVERY = [
    *(cls() for cls in SOLVERS if cls not in (Clipped, Ancestral, Renoise)),
    Clipped(UniPC(), limit=1e6),  # beyond what there is to clip
    DPMSolverPP(order=3),
    DPMSolverPPSinglestep(order=3),
    UniPC(p=3),
]
every_solver = pytest.mark.parametrize("solver", EVERY, ids=repr)
every_order = pytest.mark.parametrize("solver", [s for s in EVERY if s != SameNoise()], ids=repr)
every_grid = pytest.mark.parametrize(
    "grid", [grids.quadratic(100), grids.uniform(50)], ids=["quadratic 100", "uniform 50"]
)


class Counting(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.shape, self.calls = net, net.shape, 0

    def forward(self, x, t):
        self.calls += 1
        return self.net(x, t)


def karras(n, schedule):
    """A grid that ends so near the data that the last step does not show."""
    if schedule == FINE:
        return grids.karras(n, schedule)
    return grids.karras(n, schedule, bottom=schedule.time(math.log(1e5)), whole=False)


def measured_order(solver, schedule=FINE, grid=karras):
    data = analytic.Gaussian(std=0.5, shape=(3,))
    z = noise(0, range(4), data.shape, dtype=torch.float64)
    calls, errors = [], []
    for n in (79, 157, 313):  # whole groups of a singlestep solver
        times = grid(n, schedule)
        endpoint = data.teacher(solver, times, schedule).sample(z)
        exact = data.endpoint(schedule.prior(z, times[0]), *schedule.at(times[0]))
        calls.append(len(times))
        errors.append(float((endpoint - exact).square().mean().sqrt()))
    return -np.polyfit(np.log(calls), np.log(errors), 1)[0]


PATHS = [FINE, Cosine(), EDM(20.0), Linear(), Trig(), Trig(0.5)]


@pytest.mark.parametrize("schedule", PATHS, ids=repr)
@every_order
def test_the_endpoint_converges_with_the_declared_order(solver, schedule):
    assert measured_order(solver, schedule) == pytest.approx(solver.order, abs=0.15)


@pytest.mark.parametrize("schedule", [Linear(), Trig()], ids=repr)
@pytest.mark.parametrize(
    ("solver", "least", "most"),
    # The first steps that are even in time never become even in lam, which is infinite there.
    [(DDIM(), 0.85, 1.15), (Heun(), 1.85, 2.15), (DPMSolverPP(), 1.5, 2.15), (UniPC(), 1.8, 2.2)],
)
def test_the_order_from_where_there_is_no_signal_at_all(solver, schedule, least, most):
    assert least < measured_order(solver, schedule, grids.uniform) < most


@pytest.mark.parametrize("schedule", [Linear(), Trig(), Table((0.1, 0.2, 0.9, 1.0))], ids=repr)
@every_solver
def test_a_sample_from_where_there_is_no_signal_at_all_is_finite(solver, schedule):
    data = analytic.GaussianMixture()
    z = noise(0, range(4), data.shape, dtype=torch.float64)
    for n in (1, 2, 4):
        grid = grids.uniform(n, schedule)
        assert grid[0] == (schedule.noise if schedule.data == 0 or n == 4 else grid[0])
        assert data.teacher(solver, grid, schedule).sample(z).isfinite().all()


def test_the_exact_ode_is_the_same_on_every_path():
    """From one x / alpha and one range of sigma / alpha, paths end at one x / alpha."""
    data = analytic.GaussianMixture()
    y = 20 * noise(0, range(8), data.shape, dtype=torch.float64)
    ends = []
    for schedule in (FINE, EDM(), Linear(), Trig(), Trig(0.5)):
        top, bottom = (schedule.time(-math.log(r)) for r in (20, 0.1))
        if isinstance(schedule, AbstractTable):
            top, bottom = round(top), round(bottom)
        grid = grids.log_snr(200, schedule, top=top, bottom=bottom)
        denoiser = data.teacher(UniPC(), grid, schedule).denoiser
        x, state = schedule.at(top)[0] * y, None
        for t, s in pairwise(grid):
            x, state = UniPC().step(denoiser, x, t, s, state)
        ends.append(x / schedule.at(bottom)[0])
    for end in ends[1:]:
        # the ends of the table's grid are rounded to one of 200,000 indices
        torch.testing.assert_close(end, ends[0], rtol=0, atol=2e-4)
    for end in ends[2:]:
        torch.testing.assert_close(end, ends[1], rtol=0, atol=1e-9)


def test_the_third_order_as_released_converges_with_order_2():
    released = DPMSolverPP(order=3, as_released=True)
    assert 1.5 < measured_order(released) < 2.2


STOCHASTIC = [
    (DDIM(eta=1.0), LinearBeta()),
    (DDIM(eta=0.5), EDM()),
    (DDIM(eta=1.0), Linear()),
    (Ancestral("small"), LinearBeta()),
    (Ancestral("large"), EDM()),
    (Ancestral(), Linear()),
    (DPMSolverPP(eta=1.0), Trig()),
    (Heun(churn=0.1), EDM()),
    (Heun(churn=0.1, s_min=0.05, s_max=50.0, s_noise=1.003), LinearBeta()),
    (Heun(churn=0.1), Trig()),
]
every_stochastic = pytest.mark.parametrize(("solver", "schedule"), STOCHASTIC, ids=repr)
DRAWS = ds.Draws(5, torch.arange(64))


@every_stochastic
def test_a_sample_is_a_function_of_seed_and_index_in_any_split(solver, schedule):
    data = analytic.Gaussian(shape=(3,))
    teacher = data.teacher(solver, grids.uniform(6, schedule), schedule)
    z = noise(0, DRAWS.index, data.shape)
    whole = teacher.sample(z, draws=DRAWS)
    for rows in ([3], [40, 7, 3]):
        part = teacher.sample(z[rows], draws=ds.Draws(5, DRAWS.index[rows]))
        assert torch.equal(part, whole[rows])
    other = teacher.sample(z, draws=ds.Draws(6, DRAWS.index))
    assert (other - whole).abs().min() > 0


@every_stochastic
def test_a_solver_that_adds_noise_asks_for_draws(solver, schedule):
    teacher = analytic.Gaussian(shape=(3,)).teacher(solver, grids.uniform(3, schedule), schedule)
    assert solver.stochastic
    with pytest.raises(ValueError, match=r"adds noise.*draws=ds\.Draws"):
        teacher.sample(torch.zeros(1, 3))


def ddim_variance(grid, schedule, eta, variance):
    """The variance of DDIM's sample of Gaussian data: each step is a linear map plus noise."""
    found = float(schedule.prior(torch.ones(1, dtype=torch.float64), grid[0])) ** 2
    for t, s in pairwise((*grid, schedule.data)):
        (a, b), (a_s, b_s) = schedule.at(t), schedule.at(s)
        fresh = eta**2 * b_s**2 * (1 - (a * b_s / (a_s * b)) ** 2)  # Eq. 16 for any alpha, sigma
        slope = a_s * a * variance + math.sqrt(b_s**2 - fresh) * b
        found = (slope / (a**2 * variance + b**2)) ** 2 * found + fresh
    return found


@pytest.mark.parametrize("schedule", [LinearBeta(), EDM(), Linear()], ids=repr)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_s_noise_has_the_variance_of_its_formula(schedule, eta):
    data, n = analytic.Gaussian(mean=0.0, std=0.5, shape=(64,)), 512
    grid = grids.karras(10, schedule)
    teacher = data.teacher(DDIM(eta), grid, schedule)
    z = noise(0, range(n), data.shape, dtype=torch.float64)
    x = teacher.sample(z, draws=ds.Draws(1, torch.arange(n)))
    expected = ddim_variance(grid, schedule, eta, 0.25)
    deviation = expected * math.sqrt(2 / x.numel())
    assert abs(float(x.square().mean()) - expected) < 5 * deviation
    # the formula tells the noise levels apart
    for other in {0.0, 0.5, 1.0} - {eta}:
        assert abs(ddim_variance(grid, schedule, other, 0.25) - expected) > 5 * deviation


def test_ddim_with_fresh_noise_converges_to_the_variance_of_the_data():
    errors = [
        abs(ddim_variance(grids.karras(n, EDM()), EDM(), 1.0, 0.25) / 0.25 - 1) for n in (40, 400)
    ]
    assert errors[1] < errors[0] / 5 and errors[1] < 0.05


@pytest.mark.parametrize("schedule", [EDM(), LinearBeta()], ids=repr)
def test_churn_keeps_the_variance_that_its_noise_makes_up_for(schedule):
    data, n = analytic.Gaussian(mean=0.0, std=0.5, shape=(64,)), 512
    grid = grids.karras(40, schedule)
    z = noise(0, range(n), data.shape, dtype=torch.float64)

    def variance(**options):
        teacher = data.teacher(Heun(**options), grid, schedule)
        x = teacher.sample(z, draws=ds.Draws(1, torch.arange(n)))
        return float(x.square().mean()) / 0.25

    # 5 deviations of a variance of 32,768 numbers, and the error of 40 steps
    assert variance(churn=0.1) == pytest.approx(1, abs=0.04 + 0.01)
    assert variance(churn=0.1, s_noise=0.5) < 0.9
    assert variance(churn=0.1, s_max=1e-9) == variance()


@pytest.mark.parametrize("schedule", [Linear(), EDM(), LinearBeta()], ids=repr)
def test_a_sampler_that_goes_back_to_the_first_noise_forgets_an_earlier_error(schedule):
    """The network knows the one image there is, but not at the first time."""
    z = noise(0, range(4), (3,), dtype=torch.float64)
    grid = grids.uniform(3, schedule)
    alpha, sigma = schedule.at(grid[-1])
    off = {}
    for solver in (SameNoise(), DDIM()):
        seen = []
        net = Formula(lambda x, t, seen=seen: seen.append(x) or 0.3 + (t == grid[0])[:, None] * x)
        Teacher(Denoiser(net, schedule, "x0"), solver, grid).sample(z)
        first = seen[0] / schedule.at(grid[0])[1]
        off[solver] = float((seen[-1] - (0.3 * alpha + sigma * first)).abs().max())
    assert off[SameNoise()] < 1e-12 and off[DDIM()] > 1e-2


@pytest.mark.parametrize("schedule", [EDM(), Trig(0.5), Linear()], ids=repr)
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_renoised_samples_have_the_distribution_of_the_path(schedule, floor):
    """The network returns one image with the noise of `floor`; the second state is looked at."""
    index = torch.arange(20_000)
    z, y = (noise(seed, index, (3,), dtype=torch.float64) for seed in (0, 1))
    seen = []
    net = Formula(lambda x, t: seen.append(x) or 0.3 + floor * y)
    grid = (schedule.noise, schedule.time(0.5))
    denoiser = Denoiser(net, schedule, "x0")
    x = schedule.prior(z)
    solvers.integrate(denoiser, Renoise(floor), grid, x, draws=ds.Draws(0, index))
    alpha, sigma = schedule.at(grid[1])
    assert seen[1].mean().item() == pytest.approx(0.3 * alpha, abs=0.01 * sigma)
    assert seen[1].std().item() == pytest.approx(sigma, rel=0.01)
    first = torch.corrcoef(torch.stack([seen[1].flatten(), z.flatten()]))[0, 1]
    assert first.abs() < 0.02, "fresh noise"


def test_a_time_between_two_indices_is_a_time_of_a_table():
    data, schedule = analytic.Gaussian(std=0.5), LinearBeta(100)
    z = noise(0, range(2), data.shape, dtype=torch.float64)
    exact = data.endpoint(z, *schedule.at(90))
    grid = tuple(i / 4 for i in range(360, -1, -1))
    fine, coarse = (
        (data.teacher(DDIM(), times, schedule).sample(z) - exact).abs().max()
        for times in (grid, grid[::4])
    )
    assert fine < coarse / 3


@every_solver
def test_a_sample_costs_the_declared_number_of_network_calls(solver):
    data = analytic.Gaussian()
    for n in (1, 2, 7):
        exact = data.teacher(solver, grids.uniform(n))
        net = Counting(exact.net)
        teacher = Teacher(Denoiser(net, exact.denoiser.schedule), solver, exact.grid)
        teacher.sample(noise(0, range(2), data.shape))
        assert net.calls == teacher.nfe


def test_heun_asks_twice_a_step_but_for_the_last():
    assert Heun().nfe(grids.uniform(7)) == 13 and DDIM().nfe(grids.uniform(7)) == 7


@every_solver
def test_a_solver_is_a_frozen_value(solver):
    assert type(solver).__dataclass_params__.frozen
    assert hash(solver) == hash(dataclasses.replace(solver)) == hash(from_json(to_json(solver)))
    assert from_json(json.loads(json.dumps(to_json(solver)))) == solver


@every_solver
def test_a_solver_leaves_its_input_alone(solver):
    data = analytic.Gaussian()
    z = noise(0, range(2), data.shape)
    before = z.clone()
    data.teacher(solver, grids.uniform(5)).sample(z)
    assert torch.equal(z, before)


def ddim_factor(grid, variance):
    """What DDIM multiplies a deviation from the mean by: the product of its steps' factors."""
    times = [LinearBeta().at(t) for t in (*grid, LinearBeta.data)]
    return math.prod(
        (a_s * a_t * variance + s_s * s_t) / (a_t**2 * variance + s_t**2)
        for (a_t, s_t), (a_s, s_s) in pairwise(times)
    )


@every_grid
def test_ddim_on_gaussian_data_is_the_product_of_its_linear_steps(grid):
    data = analytic.Gaussian(mean=0.1, std=0.15)
    z = noise(0, range(8), data.shape, dtype=torch.float64)
    alpha, _ = LinearBeta().at(grid[0])
    expected = 0.1 + ddim_factor(grid, 0.15**2) * (z - alpha * 0.1)
    # 96 steps in float64, whose first one divides by alpha = 1/130
    torch.testing.assert_close(data.teacher(DDIM(), grid).sample(z), expected, rtol=0, atol=1e-10)


@every_grid
def test_ddim_is_not_the_exact_ode(grid):
    data = analytic.Gaussian(mean=0.1, std=0.15)
    z = noise(0, range(8), data.shape, dtype=torch.float64)
    exact = data.endpoint(z, *LinearBeta().at(grid[0]))
    assert (data.teacher(DDIM(), grid).sample(z) - exact).abs().max() > 1e-3


@pytest.mark.parametrize("solver", [s for s in EVERY if s != DDIMToFirst()], ids=repr)
def test_a_solver_without_noise_to_remove_ends_where_the_denoiser_says(solver):
    data = analytic.Gaussian()
    teacher = data.teacher(solver, (0,))
    z = noise(0, range(2), data.shape, dtype=torch.float64)
    assert torch.equal(teacher.sample(z), teacher.denoiser(z, 0).x0)


@pytest.mark.parametrize("cls", [DPMSolverPP, DPMSolverPPSinglestep, UniPC])
@pytest.mark.parametrize("order", [0, 1, 4, None])
def test_an_order_that_a_solver_lacks_is_refused(cls, order):
    words = "(order|p) must be a whole number" if order is None else "the order must be 2 or 3"
    with pytest.raises(ValueError, match=rf"{cls.__name__}: {words}, not {order}"):
        cls(order)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0.0}, "Clipped: limit must be above 0, not 0.0"),
        ({"quantile": 0.0}, "Clipped: quantile must be"),
        ({"most": -1.0}, "Clipped: most must be above 0"),
    ],
)
def test_a_clipping_that_clips_everything_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Clipped(**options)


@pytest.mark.parametrize("inner", [DDIM(), DDIM(eta=1.0), Heun()], ids=repr)
def test_a_clipped_solver_says_of_itself_what_its_solver_says(inner):
    clipped = Clipped(inner)
    assert (clipped.order, clipped.stochastic) == (inner.order, inner.stochastic)
    assert clipped.nfe((3, 2, 1)) == inner.nfe((3, 2, 1))


PLUS = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
# A solver, and the scheduler of diffusers that does the same.
PEERS = [
    (Heun(), "HeunDiscreteScheduler", {}),
    (DPMSolverPP(2), "DPMSolverMultistepScheduler", {"solver_order": 2, **PLUS}),
    (
        DPMSolverPP(3, as_released=True),
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "lower_order_final": False, **PLUS},
    ),
    (
        DPMSolverPP(3, lower_order_final=True, as_released=True),
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, **PLUS},
    ),
    (DPMSolverPPSinglestep(2), "DPMSolverSinglestepScheduler", {"solver_order": 2, **PLUS}),
    (DPMSolverPPSinglestep(3), "DPMSolverSinglestepScheduler", {"solver_order": 3, **PLUS}),
    (UniPC(2), "UniPCMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}),
    (UniPC(3), "UniPCMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "zero"}),
]


def states_of_diffusers(scheduler, denoiser, grid, z):
    """Every x that a scheduler of diffusers goes through, on our times and float64 levels."""
    scheduler.set_timesteps(len(grid))
    levels = [denoiser.schedule.at(t) for t in grid]
    sigmas = torch.tensor([s / a for a, s in levels] + [0.0], dtype=torch.float64)
    times = torch.tensor(grid)
    twice = type(scheduler).__name__ == "HeunDiscreteScheduler"
    if twice:  # it keeps x / alpha
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        times = torch.cat([times[:1], times[1:].repeat_interleave(2)])
        z = z / levels[0][0]
    scheduler.sigmas, scheduler.timesteps = sigmas, times
    for i, t in enumerate(times):
        x = scheduler.scale_model_input(z, t)
        z = scheduler.step(denoiser.net(x, t.repeat(len(x))), t, z).prev_sample
        if not twice or i % 2 == 1 or i == len(times) - 1:
            k = i // 2 + 1 if twice else i + 1
            alpha = levels[k][0] if k < len(levels) else 1.0
            yield alpha * z if twice else z


@pytest.mark.parametrize(
    ("solver", "peer", "options"), PEERS, ids=[repr(solver) for solver, *_ in PEERS]
)
@pytest.mark.parametrize("n", [9, 14])  # diffusers lowers the last orders below 15
def test_every_step_is_that_of_diffusers(solver, peer, options, n):
    scheduler = getattr(pytest.importorskip("diffusers"), peer)(**options)
    data = analytic.GaussianMixture()
    grid = grids.quadratic(n)
    denoiser = data.teacher(solver, grid).denoiser
    x = z = noise(0, range(16), data.shape, dtype=torch.float64)
    state, peers = None, states_of_diffusers(scheduler, denoiser, grid, z)
    for (t, s), expected in zip(pairwise((*grid, LinearBeta.data)), peers, strict=True):
        x, state = solver.step(denoiser, x, t, s, state)
        torch.testing.assert_close(x, expected.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "peer", "options"), PEERS[1:], ids=[repr(solver) for solver, *_ in PEERS[1:]]
)
def test_every_step_with_thresholding_is_that_of_diffusers(solver, peer, options):
    limits = {"dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
    scheduler = getattr(pytest.importorskip("diffusers"), peer)(
        thresholding=True, **limits, **options
    )
    data, grid = analytic.GaussianField(4, std=1.5), grids.quadratic(9)
    denoiser = data.teacher(solver, grid).denoiser
    x = z = y = noise(0, range(8), data.shape, dtype=torch.float64)
    thresholded, state, plain = Clipped(solver, quantile=0.8, most=1.5), None, None
    peers = states_of_diffusers(scheduler, denoiser, grid, z)
    for (t, s), expected in zip(pairwise((*grid, LinearBeta.data)), peers, strict=True):
        x, state = thresholded.step(denoiser, x, t, s, state)
        y, plain = solver.step(denoiser, y, t, s, plain)
        torch.testing.assert_close(x, expected.double(), rtol=0, atol=1e-5)
    assert (x - y).abs().max() > 0.3 and x.abs().max() <= 1


def test_third_order_at_24_calls_is_closer_to_the_ode_than_ddim_at_96():
    data, schedule = analytic.GaussianMixture(), LinearBeta()
    z = noise(0, range(512), data.shape, dtype=torch.float64)
    exact = data.endpoint(z, *schedule.at(800))

    def error(solver, grid):
        return (data.teacher(solver, grid).sample(z) - exact).square().mean().sqrt()

    paper = error(DDIM(), grids.quadratic(100))
    for solver in (DPMSolverPP(3), UniPC(2)):
        for grid in (grids.quadratic(24), grids.log_snr(24, schedule, top=800)):
            assert len(grid) == 24 and error(solver, grid) < paper


@pytest.mark.parametrize("schedule", [LinearBeta(), Cosine(), EDM(), Linear(), Trig()], ids=repr)
@pytest.mark.parametrize(
    "data", [analytic.Gaussian(std=0.5, shape=(3,)), analytic.GaussianField(8)], ids=repr
)
def test_heun_at_edm_s_18_steps_of_real_noise_levels_has_order_2_on_every_path(schedule, data):
    z = noise(0, range(8), data.shape, dtype=torch.float64)
    top = schedule.time(-math.log(80)) if schedule.lam(schedule.noise) < -math.log(80) else None

    def order(solver):
        errors = []
        for n in (18, 25, 35):
            grid = grids.karras(n, schedule, top=top, whole=False)
            exact = data.endpoint(schedule.prior(z, grid[0]), *schedule.at(grid[0]))
            found = data.teacher(solver, grid, schedule).sample(z)
            errors.append(float((found - exact).square().mean().sqrt()))
        return -np.polyfit(np.log([17, 24, 34]), np.log(errors), 1)[0]  # steps above the last one

    assert Heun().nfe(grids.karras(18, schedule, top=top, whole=False)) == 35
    assert order(Heun()) == pytest.approx(2, abs=0.15)
    assert order(DDIM()) < 1.3  # Euler's method


def test_a_grid_of_real_noise_levels_on_a_table_has_them_exactly():
    table = LinearBeta()
    exact = grids.karras(18, table, whole=False)
    levels = np.exp([-table.lam(t) / 7 for t in exact])
    np.testing.assert_allclose(levels, np.linspace(levels[0], levels[-1], 18), rtol=1e-12)
    rounded = grids.karras(18, table)
    assert all(isinstance(t, int) for t in rounded) and any(t != int(t) for t in exact)
    assert max(abs(t - s) for t, s in zip(exact, rounded, strict=True)) <= 0.5
