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

from ds import analytic, noise
from ds.diffusion import grids, solvers
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import (
    DDIM,
    AbstractSolver,
    DPMSolverPP,
    DPMSolverPPSinglestep,
    Heun,
    UniPC,
)
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
    *(cls() for cls in SOLVERS), DPMSolverPP(order=3), DPMSolverPPSinglestep(order=3), UniPC(p=3)
]  # fmt: skip
every_solver = pytest.mark.parametrize("solver", EVERY, ids=repr)
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


def measured_order(solver):
    data = analytic.Gaussian(std=0.5)
    z = noise(0, range(2), data.shape, dtype=torch.float64)
    calls, errors = [], []
    for n in (79, 157, 313):  # whole groups of a singlestep solver
        grid = grids.karras(n, FINE)
        endpoint = data.teacher(solver, grid, FINE).sample(z)
        exact = data.endpoint(z, *FINE.at(grid[0]))
        calls.append(len(grid))
        errors.append(float((endpoint - exact).square().mean().sqrt()))
    return -np.polyfit(np.log(calls), np.log(errors), 1)[0]


@every_solver
def test_the_endpoint_converges_with_the_declared_order(solver):
    assert measured_order(solver) == pytest.approx(solver.order, abs=0.15)


def test_the_third_order_as_released_converges_with_order_2():
    released = DPMSolverPP(order=3, as_released=True)
    assert 1.5 < measured_order(released) < 2.2


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


@every_solver
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
