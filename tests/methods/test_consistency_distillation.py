"""Consistency distillation: its boundary, its targets, and the teachers it takes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import ds
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import EDM, Linear, LinearBeta, Trig
from ds.methods import ConsistencyDistillation, Progress
from ds.methods.proof import Formula
from ds.pairs.sources import Batch

DATA = ds.analytic.Gaussian(mean=0.3, std=0.5, shape=(3,))
METHOD = ConsistencyDistillation(target_decay=0.9)


class Linearly(nn.Module):
    """A network with weights: one linear map for all times."""

    shape = (3,)

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x, told):
        return self.map(x) + told[:, None]


def modules(method=METHOD, schedule=None):
    schedule = schedule or EDM()
    exact = DATA.teacher(ds.solvers.DDIM(), (schedule.noise,), schedule)
    frozen = method.init(exact)["teacher"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Linearly()
    made = {"student": student, "teacher": frozen}
    if method.target_decay:
        made["target"] = copy.deepcopy(student).requires_grad_(False)
    return nn.ModuleDict(made)


def batch(count=64):
    index = torch.arange(count)
    x0, z = (ds.noise(seed, index, (3,)).double() for seed in (1, 2))
    return Batch(x0, z, index, Draws(0, index))


@pytest.mark.parametrize("schedule", [Linear(), Trig(), LinearBeta()], ids=repr)
def test_a_teacher_teaches_the_same_on_every_schedule(schedule):
    rows, start = batch(), Progress(0, 1)
    own = METHOD.loss(modules(), rows, start)
    assert own > 1e-3
    torch.testing.assert_close(METHOD.loss(modules(schedule=schedule), rows, start), own)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_targets_come_from_an_average_of_the_student_or_from_the_student_itself(decay):
    method = replace(METHOD, target_decay=decay)
    made = modules(method)
    method.loss(made, batch(), Progress(0, 1)).backward()
    assert all(p.grad is not None for p in made["student"].parameters())
    assert all(
        p.grad is None for name, m in made.items() if name != "student" for p in m.parameters()
    )
    if not decay:
        assert "target" not in made
        return
    before = copy.deepcopy(made["target"].map.weight)
    with torch.no_grad():
        made["student"].map.weight.add_(1)
    method.after_step(made, Progress(0, 1))
    torch.testing.assert_close(made["target"].map.weight, before + 0.1)


def test_student_and_target_have_the_same_dropout():
    """Between levels that are nearly one, their difference is nearly 0."""
    method = replace(METHOD, target_decay=0.0, sigma_min=1.0, sigma_max=1.0 + 1e-9)
    made, rows = modules(method), batch()
    made["student"].map = nn.Sequential(made["student"].map, nn.Dropout(0.5))
    student = method.denoiser(made["student"])
    x, t = rows.x0, torch.full((len(rows.x0),), 2.0, dtype=torch.float64)
    assert (student(x, t).x0 - student(x, t).x0).abs().max() > 1e-3
    f, target = method.ends(made, rows, torch.zeros_like(rows.index))
    assert (f - target).abs().max() < 1e-6


def test_no_score_is_given_since_a_network_of_one_value_has_the_loss_0():
    assert METHOD.score(modules(), batch(), Progress(0, 1)) is None


class Exact(ConsistencyDistillation):
    """With the ODE's own map in the place of the network."""

    def denoiser(self, net):
        return Denoiser(Formula(self.end), self.path, "x0")

    def end(self, x, sigma):
        variance = DATA.std**2
        gain = ((variance + self.sigma_min**2) / (variance + sigma[:, None] ** 2)).sqrt()
        return DATA.mean + gain * (x - DATA.mean)


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_samples_of_any_number_of_calls_have_the_distribution_of_the_data(nfe):
    index = torch.arange(20_000)
    z = ds.noise(0, index, (3,)).double()
    x = Exact().sample(Formula(None), z, nfe=nfe, draws=Draws(0, index))
    assert x.mean().item() == pytest.approx(DATA.mean, abs=0.01)
    assert x.std().item() == pytest.approx(DATA.std, rel=0.01)
    part = Exact().sample(Formula(None), z[7:9], nfe=nfe, draws=Draws(0, index[7:9]))
    assert torch.equal(part, x[7:9])
    if nfe > 1:
        one = Exact().sample(Formula(None), z)
        assert torch.corrcoef(torch.stack([one.flatten(), x.flatten()]))[0, 1] < 0.9


def test_more_than_one_call_needs_draws():
    with pytest.raises(ValueError, match=r"draws=ds\.Draws"):
        METHOD.sample(Linearly(), batch().noise, nfe=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma_min": 80.0}, "sigma_min .80.0. must be below sigma_max"),
        ({"num_levels": 1}, "num_levels must be at least 2"),
        ({"solver": "rk4"}, "solver must be one of heun, euler"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyDistillation(**fields)
