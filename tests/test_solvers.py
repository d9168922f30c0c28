"""Every solver against closed forms: its order, its cost, and for DDIM each step."""

import dataclasses
import importlib
import math
import pkgutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from ds import analytic, grids, noise, solvers
from ds.denoiser import Denoiser
from ds.sample import Teacher
from ds.schedule import DATA, LinearBeta
from ds.solvers import DDIM, AbstractSolver

FINE = LinearBeta(10_000, 1e-5, 2e-3)  # so fine that rounding times to its indices does not show
MODULES = [
    importlib.import_module(f"ds.solvers.{m.name}") for m in pkgutil.iter_modules(solvers.__path__)
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
every_solver = pytest.mark.parametrize("solver", [cls() for cls in SOLVERS], ids=repr)
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


@every_solver
@pytest.mark.parametrize("data", [analytic.Gaussian(), analytic.GaussianField()])
def test_the_endpoint_converges_with_the_declared_order(solver, data):
    z = noise(0, range(8), data.shape, dtype=torch.float64)
    steps, errors = [25, 50, 100, 200, 400], []
    for n in steps:
        grid = grids.quadratic(n, top=9999)
        endpoint = data.teacher(solver, grid, FINE).sample(z)
        exact = data.endpoint(z, *FINE.at(grid[0]))
        errors.append(float((endpoint - exact).square().mean().sqrt()))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -slope == pytest.approx(solver.order, abs=0.1), errors


@every_solver
def test_a_step_costs_the_declared_number_of_network_calls(solver):
    data = analytic.Gaussian()
    exact = data.teacher(solver, grids.uniform(7))
    net = Counting(exact.net)
    teacher = Teacher(Denoiser(net, exact.denoiser.schedule), solver, exact.grid)
    teacher.sample(noise(0, range(2), data.shape))
    assert net.calls == teacher.nfe == 7 * solver.nfe_per_step


@every_solver
def test_a_solver_is_a_frozen_value(solver):
    assert type(solver).__dataclass_params__.frozen
    assert hash(solver) == hash(dataclasses.replace(solver)) and solver == type(solver)()


@every_solver
def test_a_solver_leaves_its_input_alone(solver):
    data = analytic.Gaussian()
    z = noise(0, range(2), data.shape)
    before = z.clone()
    data.teacher(solver, grids.uniform(5)).sample(z)
    assert torch.equal(z, before)


def ddim_factor(grid, variance):
    """What DDIM multiplies a deviation from the mean by: the product of its steps' factors."""
    times = [LinearBeta().at(t) for t in (*grid, DATA)]
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
