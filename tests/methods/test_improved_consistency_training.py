"""Improved consistency training: its levels, its weights, and the mistakes of public copies."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch._dynamo.testing import CompileCounter

import ds
from ds.diffusion.noise import Draws
from ds.methods import ImprovedConsistencyTraining, Progress
from ds.methods.proof import Formula
from ds.nets import MLPConfig
from ds.nets.song import Fourier
from ds.pairs.sources import Batch
from ds.training.parallel import Loss

TEACHER = ds.analytic.GaussianMixture().teacher(ds.solvers.DDIM(), (800,))
METHOD = ImprovedConsistencyTraining()
COUNT, TOTAL = 20_000, 800
MANY = Draws(3, torch.arange(COUNT))


def rows(count=64, dtype=torch.float64):
    index = torch.arange(count)
    x0, z = (ds.noise(seed, index, (2,)).to(dtype) for seed in (1, 2))
    return Batch(x0, z, index, Draws(0, index))


def cast(steps):
    return torch.tensor(float(steps), dtype=torch.float64)


# By hand: log2(1280 / 10) + 1 is 8, so they double at each eighth of a run.
DOUBLINGS = {0: 10, 99: 10, 100: 20, 199: 20, 200: 40, 499: 160, 699: 640, 700: 1280, 799: 1280}


@pytest.mark.parametrize(("step", "steps"), DOUBLINGS.items())
def test_the_steps_between_levels_double_at_each_eighth_of_the_run(step, steps):
    assert METHOD.steps(Progress(step, TOTAL)) == steps


def test_an_end_that_no_doubling_reaches_is_reached_all_the_same():
    """log2 of 100 / 10 is 3.32, so a run of 432 has four lengths of 100 steps, and a rest."""
    method = replace(METHOD, end_steps=100)
    found = [int(method.steps(Progress(k, 432))) for k in range(0, 432, 100)]
    assert found == [10, 20, 40, 80, 100]
    assert METHOD.steps(Progress(2, 3)) == 40, "a run may be shorter than its doublings"


def discretised(steps):
    """The share of each step between levels: a difference of erf, by SciPy."""
    levels = ds.grids.karras(steps + 1, ds.schedule.EDM(), top=80.0, bottom=0.002)
    share = -np.diff(stats.norm.cdf(np.log(levels), -1.1, 2.0))
    return share / share.sum()


@pytest.mark.parametrize("steps", [10, 80])
def test_levels_have_the_discretised_log_normal_density_by_a_chi_square_test(steps):
    counts = torch.bincount(METHOD.drawn(MANY, cast(steps)), minlength=steps).numpy()
    share = discretised(steps)
    often = COUNT * share >= 5  # as the test needs

    def misfit(share):
        expected = np.append(COUNT * share[often], COUNT * share[~often].sum() + 1e-9)
        found = np.append(counts[often], counts[~often].sum() + 1e-9)
        return stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue

    assert len(counts) == steps
    assert misfit(share) > 0.01
    moved = np.roll(share, 1)
    for wrong in (moved, share[::-1], np.full(steps, 1 / steps)):
        assert misfit(wrong) < 1e-9


def test_levels_do_not_depend_on_how_rows_are_cut():
    part = Draws(3, MANY.index[100:200])
    assert torch.equal(METHOD.drawn(part, cast(1280)), METHOD.drawn(MANY, cast(1280))[100:200])


def test_the_student_is_told_the_noisier_level_and_the_target_the_next_one():
    told = []
    net = Formula(lambda x, t: told.append(t) or x.sin())
    METHOD.loss({"student": net}, rows(), Progress(0, TOTAL))
    (t, s), i = ((4 * x).exp() for x in told), METHOD.drawn(rows().draws, cast(10))
    grid = torch.tensor(ds.grids.karras(11, ds.schedule.EDM(), top=80.0, bottom=0.002))
    torch.testing.assert_close(t, grid.double()[i])
    torch.testing.assert_close(s, grid.double()[i + 1])


def test_a_row_counts_by_the_inverse_of_its_step():
    net, batch = Formula(lambda x, t: x.sin()), rows()
    f, i = METHOD.denoiser(net), METHOD.drawn(batch.draws, cast(10))
    t, s = METHOD.levels(i, cast(10)), METHOD.levels(i + 1, cast(10))
    high, low = (f(batch.x0 + x[:, None] * batch.noise, x).x0 for x in (t, s))
    size = ((high - low).square().sum(1) + 2 * 5.4e-4**2).sqrt() - 5.4e-4 * 2**0.5
    found = METHOD.loss({"student": net}, batch, Progress(0, TOTAL))
    torch.testing.assert_close(found, (size / (t - s)).mean())
    assert found / (size * (t - s)).mean() > 2


class Dropping(nn.Module):
    """A network with weights and dropout."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        self.map, self.drop = nn.Linear(2, 2, dtype=torch.float64), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.drop(self.map(x))


def test_the_target_is_the_student_itself_with_its_dropout_and_no_gradient():
    """Between levels that are nearly one, they differ by nearly nothing, but by a slope."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, batch = Dropping(), rows()
        x = batch.x0
        t = torch.full((len(x),), 2.0, dtype=torch.float64)
        assert (net(x, t) - net(x, t)).abs().max() > 0.1
        error = METHOD.error(net, batch, t, t - 1e-9)
        assert error.abs().max() < 1e-6
        (slope,) = torch.autograd.grad(error.sum(), [net.map.weight])
    assert slope.abs().max() > 0.1
    assert {*METHOD.init(TEACHER)} == {"student"}


def test_the_loss_of_a_row_is_huber_of_all_its_elements():
    """3-4-5: a row far above the width counts by its length, 5, and not by 3 + 4."""
    error = torch.tensor([[3.0, 4.0], [5.0, 0.0]])
    torch.testing.assert_close(METHOD.distance(error), torch.full((2,), 5.0), rtol=1e-3, atol=0)
    tiny = torch.full((1, 3072), 1e-6)
    width = 5.4e-4 * 3072**0.5
    torch.testing.assert_close(METHOD.distance(tiny.double()).item(), 3072e-12 / (2 * width))


MISTAKES = {
    "f minus x at sigma_min": "no shift by sigma min",
    "variance of the network's input, less 1": "c in without the root",
    "deviation of f without a signal, less that of the data": "c out without sigma data",
    "loss of an error, turned": "huber of each element",
    "change of the embedding in a step": "full frequency",
}


@pytest.mark.parametrize("metric", MISTAKES)
def test_each_published_mistake_is_a_control_that_fails(metric):
    (check,) = [check for check in METHOD.identity() if check.metric == metric]
    assert check.passed
    assert check.controls[MISTAKES[metric]] > 1e-2


def test_two_steps_go_by_the_level_0_821():
    called, z = [], rows().noise
    net = Formula(lambda x, t: called.append((x, t)) or 0 * x)
    METHOD.sample(net, z, nfe=2, draws=rows().draws)
    levels = [math.exp(4 * t[0]) for _, t in called]
    assert levels == pytest.approx([80.0, 0.821])
    first = METHOD.denoiser(net)(80 * z, 80.0).x0
    fresh = called[1][0] * (0.821**2 + 0.25) ** 0.5 - first
    assert fresh.std().item() == pytest.approx((0.821**2 - 0.002**2) ** 0.5, rel=0.2)
    assert [len(METHOD.times(nfe)) for nfe in (1, 2, 5)] == [1, 2, 5]
    assert METHOD.times(5)[-1] == METHOD.times(2)[-1]


def test_a_compiled_run_has_one_graph_for_all_numbers_of_levels():
    modules, graphs = (
        nn.ModuleDict({"student": MLPConfig(width=8, depth=1).build()}),
        CompileCounter(),
    )
    loss = torch.compile(Loss(METHOD, modules), fullgraph=True, backend=graphs)
    for step in (0, 101, 102, 799):
        batch, progress = rows(dtype=torch.float32), Progress(step, TOTAL)
        assert torch.equal(loss(batch, progress), METHOD.loss(modules, batch, progress))
    assert graphs.frame_count <= 2  # a second one where the step is a number in the graph


def test_a_low_noise_scale_makes_fourier_features_those_of_the_paper():
    """Of the scale 0.02 on log(sigma) / 4, by a network whose features have the scale 16."""
    method = replace(METHOD, noise_scale=0.25 * 0.02 / 16)
    layer = Fourier(64)
    sigma = torch.tensor([0.002, 0.821, 80.0], dtype=torch.float64)
    told = [method.denoiser(nn.Identity()).c_noise(x) for x in sigma.tolist()]
    found = layer(torch.tensor(told, dtype=torch.float64))
    angles = 2 * math.pi * (0.02 * layer.frequencies.double() / 16) * (sigma.log() / 4)[:, None]
    torch.testing.assert_close(found, torch.cat([angles.sin(), angles.cos()], 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_steps": 2000}, r"start_steps \(2000\) must be at most end_steps \(1280\)"),
        ({"mid": 90.0}, r"mid \(90.0\) and sigma_max \(80.0\) must rise"),
        ({"huber": 0.0}, "huber must be above 0"),
    ],
)
def test_fields_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(METHOD, **changes)
