"""Samplers as they were released, call for call: EDM's, k-diffusion's, ADM's and diffusers'."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import ds
from ds import grids, predictions, solvers
from ds.diffusion.schedules import EDM, Cosine, Linear, LinearBeta
from ds.diffusion.solvers import Ancestral, Clipped, Heun
from tests.diffusion.test_solvers import states_of_diffusers
from tests.golden import FOLDER

with np.load(FOLDER / "samplers.npz") as file:
    GOLDEN = {name: torch.from_numpy(np.asarray(file[name])) for name in file}


class Given:
    """Random numbers that were recorded for the steps that use them, in order."""

    def __init__(self, steps=range(20)):
        self.left = iter(GOLDEN["noise"][i] for i in steps)

    def normal(self, stream, shape):
        return next(self.left)


class Network(nn.Module):
    """A formula as a network, which records what it is given."""

    shape = (3, 2, 2)

    def __init__(self, formula):
        super().__init__()
        self.formula, self.x, self.t = formula, [], []

    def forward(self, x, t):
        self.x.append(x)
        self.t.append(float(t[0]))
        return self.formula(x, t.reshape(-1, 1, 1, 1).to(x))


def denoised(x, sigma):
    v = sigma**2
    return 0.25 * x / (0.25 + v) + 0.3 * torch.tanh(x) * v / (1 + v)


def six_channels(x, t):
    eps = 0.9 * x * (t + 1) / 1000 + 0.2 * torch.sin(3 * x)
    return torch.cat([eps, torch.sin(2 * x + t / 300) * 1.2], 1)


class Slope(nn.Module):
    """A classifier of two classes, the first of which has a log probability of known gradient."""

    def forward(self, x, t):
        with torch.no_grad():
            slope = 2.5 * torch.cos(x) * (1 + t.reshape(-1, 1, 1, 1).to(x) / 1000)
        # the log probability of a class that is hardly there has the slope of its logit
        logit = (slope * (x - x.detach())).flatten(1).sum(1) - 1e4
        return torch.stack([logit, torch.zeros_like(logit)], 1)


def replayed(name, denoiser, solver, grid, *, atol, draws=None):
    """Sample with the recorded noise; hold what each call was given, and the sample, to it."""
    x = denoiser.schedule.prior(GOLDEN["z"], grid[0])
    end = solvers.integrate(denoiser, solver, grid, x, draws=draws)
    net = denoiser.net
    expected = GOLDEN[f"{name}.t"]
    torch.testing.assert_close(
        torch.tensor(net.t, dtype=torch.float64), expected, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        torch.stack([*net.x, end]), GOLDEN[f"{name}.x"], rtol=atol, atol=atol
    )


HEUN = [
    ("edm18", 18, Heun()),
    ("edm_churn", 6, Heun(churn=2.4 / 6, s_min=0.05, s_max=50.0, s_noise=1.003)),
    ("edm_cap", 6, Heun(churn=9 / 6, s_max=50.0)),
    ("k_heun", 8, Heun()),
    ("k_heun_churn", 8, Heun(churn=2.0 / 8, s_min=0.05, s_max=20.0, s_noise=1.1)),
]


@pytest.mark.parametrize(("name", "steps", "solver"), HEUN, ids=[name for name, *_ in HEUN])
def test_heun_is_that_of_edm_and_of_k_diffusion_call_for_call(name, steps, solver):
    denoiser = ds.Denoiser(Network(denoised), EDM(), "x0")
    grid = grids.karras(steps, EDM())
    # both draw noise in each step, and use it between s_min and s_max
    used = Given(i for i, t in enumerate(grid) if solver.s_min <= t <= solver.s_max)
    replayed(name, denoiser, solver, grid, atol=1e-10, draws=used)


def test_the_ends_of_churn_are_included():
    grid = grids.karras(6, EDM())

    def levels(**ends):
        net = Network(denoised)
        solver = Heun(churn=0.1, **ends)
        denoiser = ds.Denoiser(net, EDM(), "x0")
        solvers.integrate(denoiser, solver, grid, GOLDEN["z"], draws=Given())
        return net.t[::2]

    raised = [1.1 * t if 1 <= i <= 3 else t for i, t in enumerate(grid)]
    assert levels(s_min=grid[3], s_max=grid[1]) == pytest.approx(raised, rel=1e-12)


LEARNED = predictions.LearnedVariance()
ADM = [
    ("adm_learned", "ddim10", Ancestral("learned"), LEARNED, LinearBeta(), False),
    ("adm_learned_clip_guided", "10", Clipped(Ancestral("learned")), LEARNED, LinearBeta(), True),
    ("adm_small", "ddim8", Clipped(Ancestral("small")), predictions.Eps(), Cosine(), False),
    ("adm_large_guided", "8", Clipped(Ancestral("large")), predictions.Eps(), LinearBeta(), True),
    ("ddim_adm_learned_clip_guided", "10", Clipped(rederive=True), LEARNED, LinearBeta(), True),
    ("ddim_adm_large_guided", "8", Clipped(rederive=True), predictions.Eps(), LinearBeta(), True),
]


@pytest.mark.parametrize(
    ("name", "subset", "solver", "prediction", "schedule", "guided"), ADM, ids=[a[0] for a in ADM]
)
def test_ancestral_and_ddim_are_those_of_adm_call_for_call(
    name, subset, solver, prediction, schedule, guided
):
    half = prediction == predictions.Eps()
    net = Network(lambda x, t: six_channels(x, t)[:, :3] if half else six_channels(x, t))
    denoiser = ds.Denoiser(net, schedule, prediction)
    if guided:
        label = torch.zeros(2, dtype=torch.int64)
        denoiser = ds.ClassifierGuided(denoiser, Slope(), 1.0).given(label=label)
    spacing = "strided" if subset.startswith("ddim") else "linspace"
    grid = grids.uniform(int(subset.removeprefix("ddim")), schedule, spacing=spacing)
    # its coefficients are float32, and its guided states too
    replayed(name, denoiser, solver, grid, atol=1e-4 if guided else 2e-6, draws=Given())


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("steps_")])
def test_subsets_of_steps_are_those_of_adm(name):
    _, steps, subset = name.split("_")
    spacing = "strided" if subset.startswith("ddim") else "linspace"
    found = grids.uniform(
        int(subset.removeprefix("ddim")), LinearBeta(int(steps), 1e-6, 1e-3), spacing=spacing
    )
    assert list(found) == GOLDEN[name].tolist()


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_is_diffusers_ddpm_step_for_step(variance, clip, monkeypatch):
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    left = iter(GOLDEN["noise"])
    monkeypatch.setattr(ddpm, "randn_tensor", lambda *_, **__: next(left))
    kind = {"learned": "learned_range"}.get(variance, f"fixed_{variance}")
    scheduler = ddpm.DDPMScheduler(variance_type=kind, clip_sample=clip)
    scheduler.set_timesteps(10)
    learned = variance == "learned"
    net = Network(lambda x, t: six_channels(x, t)[:, : 6 if learned else 3])
    denoiser = ds.Denoiser(net, LinearBeta(), LEARNED if learned else "eps")
    solver = Clipped(Ancestral(variance)) if clip else Ancestral(variance)
    grid, draws, state = grids.uniform(10), Given(), None
    assert list(grid) == scheduler.timesteps.tolist()
    x = y = GOLDEN["z"]
    for t, s in pairwise((*grid, -1)):
        y = scheduler.step(net(y, torch.full((2,), t)), t, y).prev_sample
        x, state = solver.step(denoiser, x, t, s, state, draws)
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)  # its betas are float32


def test_a_variance_that_was_not_learned_is_one_clear_line():
    denoiser = ds.Denoiser(Network(denoised), LinearBeta())
    with pytest.raises(ValueError, match="needs a network that learned it"):
        solvers.integrate(denoiser, Ancestral("learned"), (9, 0), GOLDEN["z"], draws=Given())
    with pytest.raises(ValueError, match="variance must be one of learned, small, large"):
        Ancestral("fixed")


@pytest.mark.parametrize("schedule", [LinearBeta(), EDM(), Linear()], ids=repr)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_variance_of_ancestral_samples_is_that_of_its_formula(schedule, variance):
    """Each step is linear in x and adds noise; at eta = 1, DDIM has the small variance."""
    data, n = ds.analytic.Gaussian(mean=0.0, std=0.5, shape=(64,)), 512
    grid = grids.karras(10, schedule)
    found = float(schedule.prior(torch.ones(1, dtype=torch.float64), grid[0])) ** 2
    for t, s in pairwise((*grid, schedule.data)):
        (a, b), (a_s, b_s) = schedule.at(t), schedule.at(s)
        large = b**2 - (a / a_s * b_s) ** 2
        small = large * b_s**2 / b**2
        slope = a / a_s * b_s**2 / b**2 + a_s * large / b**2 * a * 0.25 / (a**2 * 0.25 + b**2)
        fresh = 0 if not b_s else small if variance == "small" else large
        found = slope**2 * found + fresh
    z = ds.noise(0, range(n), data.shape, dtype=torch.float64)
    teacher = data.teacher(Ancestral(variance), grid, schedule)
    x = teacher.sample(z, draws=ds.Draws(1, torch.arange(n)))
    assert abs(float(x.square().mean()) - found) < 5 * found * (2 / x.numel()) ** 0.5


def test_dpm_solver_pp_with_fresh_noise_is_diffusers_sde_step_for_step(monkeypatch):
    module = pytest.importorskip("diffusers.schedulers.scheduling_dpmsolver_multistep")
    left = iter(GOLDEN["noise"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(left))
    scheduler = module.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    grid, solver, draws = grids.quadratic(9), solvers.DPMSolverPP(eta=1.0), Given()
    denoiser = ds.Denoiser(Network(lambda x, t: six_channels(x, t)[:, :3]), LinearBeta())
    x, state = GOLDEN["z"], None
    peers = states_of_diffusers(scheduler, denoiser, grid, x)
    for (t, s), expected in zip(pairwise((*grid, -1)), peers, strict=True):
        x, state = solver.step(denoiser, x, t, s, state, draws)
        torch.testing.assert_close(x, expected.double(), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="eta is for order 2"):
        solvers.DPMSolverPP(3, eta=1.0)
