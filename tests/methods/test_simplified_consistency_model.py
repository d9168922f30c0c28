"""sCM: its boundary and its precision, both flows, its weight, warm-up, and converted teachers."""

import math
from dataclasses import replace

import pytest
import torch

import ds
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Preconditioned, Rescaled
from ds.diffusion.schedules import EDM
from ds.methods import Progress
from ds.methods import SimplifiedConsistencyModel as SCM
from ds.methods.base import built
from ds.methods.networks import Weight
from ds.methods.proof import NOISE, NORMAL, Formula
from ds.methods.proofs.consistency.simplified_consistency_model import angles, velocity
from ds.nets import MLPConfig
from ds.pairs.sources import Batch

METHOD = SCM(normalize=False, learned_weight=False)
NET = MLPConfig(dim=3, width=16, depth=2)
END = Progress(50, 100)
DATA = ds.analytic.Gaussian(mean=0.3, std=0.5, shape=(3,))


def teacher():
    return DATA.teacher(ds.solvers.DDIM(), (80.0,), EDM(), Preconditioned())


def batch(count=64):
    index = torch.arange(count)
    return Batch(ds.noise(1, index, (3,)), ds.noise(2, index, (3,)), index, Draws(0, index))


def test_at_time_0_the_function_returns_what_it_is_given():
    x, zero = 100 * batch().x0, torch.zeros(64)
    assert torch.equal(METHOD.denoiser(NET.build())(x, zero).x0, x)


@pytest.mark.parametrize("level", [1e-3, 1.0, 80.0, 800.0])
def test_times_in_float64_keep_the_digits_of_g_near_the_noise(level):
    """Where sCT trains, cos(t) is 6e-4, and to round t to float32 moves it by 5e-5 of itself."""
    F = Formula(velocity(METHOD))
    t = METHOD.path.times_of(torch.full((len(NOISE),), level, dtype=torch.float64))

    def g(x, t):
        slope = METHOD.slope(x.flip(0), x, t)
        return METHOD.tangent(*METHOD.velocity(F, x, t, slope, {}), x, t, slope, torch.ones(33))

    def away(found):
        return ((found - g(NOISE, t)).abs().max() / g(NOISE, t).abs().max()).item()

    assert away(g(NOISE.float(), t)) < 1e-6
    if level == 800:
        assert away(g(NOISE.float(), t.float())) > 1e-5


def test_noise_levels_are_log_normal_and_times_in_float64():
    _, t, _ = replace(METHOD, flow="data", sigma_data=0.7).rows({}, batch(20_000))
    logs = (0.7 * t.tan()).log()
    assert t.dtype == torch.float64
    assert logs.mean().item() == pytest.approx(-1, abs=0.02)
    assert logs.std().item() == pytest.approx(1.4, abs=0.02)


def made(method=METHOD, **fields):
    method = replace(method, student=NET, **fields)
    return method, method.init(teacher())


def test_the_gradient_moves_f_along_its_derivative():
    """It is that of -F * g, with g as it is: Eq. 6."""
    method, modules = made()
    loss = method.loss(modules, batch(), END)
    found = torch.autograd.grad(loss, modules["student"].parameters())
    x, t, slope = method.rows(modules, batch())
    F, dF = method.velocity(modules["student"], x, t, slope, {})
    g = method.tangent(F.detach(), dF, x, t, slope, method.ramp(END, t))
    wanted = torch.autograd.grad(-2 * (F * g).mean(), modules["student"].parameters())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_normalized_tangent_has_a_size_below_1_in_every_row():
    sizes = []
    for normalize in (False, True):
        method, modules = made(normalize=normalize)
        sizes.append(method.loss(modules, batch(1), END).item())
    assert sizes[1] == pytest.approx((sizes[0] ** 0.5 / (sizes[0] ** 0.5 + 0.1)) ** 2, rel=1e-5)


def test_the_weight_begins_at_0_and_learns_one_over_the_error_of_every_time():
    weight = Weight()
    t = METHOD.path.times_of(torch.logspace(-3, 3, 256, dtype=torch.float64))
    assert torch.equal(weight(t), torch.zeros(256))
    error = (2 + t.cos()).float()
    steps = torch.optim.Adam(weight.parameters(), lr=0.05)
    for _ in range(400):
        w = weight(t)
        steps.zero_grad()
        (w.exp() * error - w).mean().backward()
        steps.step()
    torch.testing.assert_close(weight(t).exp() * error, torch.ones(256), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("warmup", "step", "total", "ramp"),
    [
        (10, 0, 100, 0.0),
        (10, 5, 100, 0.5),
        (10, 70, 100, 1.0),
        (0, 0, 100, 1.0),
        (10_000, 10, 40, 0.5),  # a run that is shorter than the warm-up
        (10_000, 20, 40, 1.0),
        (10_000, 0, 1, 1.0),
    ],
)
def test_the_warm_up_rises_in_its_steps_and_no_run_ends_in_it(warmup, step, total, ramp):
    found = SCM(warmup=warmup).ramp(Progress(step, total), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(found, torch.full_like(found, ramp))


@pytest.mark.parametrize(
    ("fields", "others"),
    [
        ({}, {"weight", "teacher"}),
        ({"flow": "data"}, {"weight"}),
        ({"learned_weight": False}, {"teacher"}),
    ],
)
def test_only_distillation_keeps_a_teacher_and_only_a_learned_weight_learns(fields, others):
    method = SCM(student=NET, **fields)
    modules = method.init(teacher())
    assert {*modules} == {"student", *others}
    assert method.loss(modules, batch(), END).isfinite()


def test_the_loss_with_a_learned_weight_is_that_of_equation_8():
    method, modules = made(learned_weight=True)
    plain = replace(method, learned_weight=False).loss(modules, batch(1), END)
    assert torch.equal(method.loss(modules, batch(1), END), plain)
    with torch.no_grad():
        modules["weight"].gains.normal_(generator=torch.Generator().manual_seed(0))
    w = modules["weight"](method.rows(modules, batch(1))[1])
    found = method.loss(modules, batch(1), END)
    torch.testing.assert_close(found, (w.exp() * plain - w).mean())


def test_a_converted_edm_begins_as_the_teacher_itself():
    start = teacher()
    with pytest.raises(ValueError, match=r"use method\.on\(teacher\)"):
        SCM(converted=True).init(start)
    method = SCM(converted=True).on(start)
    assert method.prediction == Rescaled(EDM(), Preconditioned())
    x, sigma = NOISE, angles().tan() * method.sigma_data
    x0, eps = method.denoiser(start.net)(x, angles())
    own = start.denoiser(x / angles().cos()[:, None], sigma)
    torch.testing.assert_close((x0, eps), (*own,))


@pytest.mark.parametrize("level", [1e-3, 1.0, 79.0, 700.0])
def test_the_derivative_of_a_network_that_is_told_log_sigma_stays_small_near_the_noise(level):
    """cos(t) * sin(t) makes up for the growth of d log(sigma) / dt, in float32 too."""
    method = SCM(prediction=Rescaled(EDM(800.0), Preconditioned()))
    t = method.path.times_of(torch.full((len(NOISE),), level, dtype=torch.float64))
    net = built(NET)
    found = [
        method.velocity(net.to(x.dtype), x, t, method.slope(x.flip(0), x, t), {})[1]
        for x in (NOISE.float(), NOISE)
    ]
    assert found[1].abs().max() < 1
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[1].abs().max()


@pytest.mark.parametrize(("nfe", "grid"), [(1, (1.0,)), (2, (1.0, 1.1)), (4, (1, 0.75, 0.5, 0.25))])
def test_samples_begin_at_sigma_max_and_visit_the_published_time(nfe, grid):
    first = math.atan(80 / 0.5)
    even = tuple(first * share for share in grid)
    assert SCM().visited(nfe) == pytest.approx((first, 1.1) if nfe == 2 else even)


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_samples_of_the_exact_map_have_the_distribution_of_the_data(nfe):
    index = torch.arange(20_000)
    z = ds.noise(0, index, (3,)).double()
    x = METHOD.sample(Formula(velocity(METHOD)), z, nfe=nfe, draws=Draws(0, index))
    torch.testing.assert_close(x.mean(0), torch.full((3,), 0.3).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(x.std(0), NORMAL.std, rtol=0.02, atol=0)
