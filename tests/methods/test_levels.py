"""What consistency models share: their boundary, their levels, their losses, and their samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import ds
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Bounded
from ds.methods import ConsistencyDistillation, ConsistencyTraining, Progress
from ds.methods.base import built
from ds.methods.consistency.levels import karras
from ds.methods.proof import Formula
from ds.models.export import to_program
from ds.nets import MLPConfig
from ds.nets.lpips import LPIPS
from ds.pairs.sources import Batch
from tests.methods.runs import found

DATA = ds.analytic.Gaussian(mean=0.3, std=0.5, shape=(3,))
TEACHER = DATA.teacher(ds.solvers.DDIM(), (80.0,), ds.schedule.EDM())
INDEX = torch.arange(64)
NETS = {"student": Formula(lambda x, t: x.sin()), "target": Formula(lambda x, t: x.cos())}
METHODS = [ConsistencyDistillation(target_decay=0.9), ConsistencyTraining()]
each = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", [cls for cls in found() if hasattr(cls, "sigma_min")])
def test_a_consistency_function_returns_its_input_at_the_smallest_level_to_the_bit(cls, dtype):
    f = cls().denoiser(Formula(lambda x, t: 1e3 * x.cos()))
    assert isinstance(f.prediction, Bounded)
    x = 100 * ds.noise(1, INDEX, (3,)).to(dtype)
    for count in (2, 18, torch.tensor(151.0, dtype=torch.float64)):
        smallest = karras(torch.full((64,), int(count) - 1), count, cls.sigma_min, cls.sigma_max)
        assert torch.equal(f(x, smallest).x0, x)
        assert not torch.equal(f(x, 1.01 * smallest).x0, x)


@pytest.mark.parametrize("count", [2, 18, 40])
def test_the_levels_are_those_of_the_grid_of_karras(count):
    grid = ds.grids.karras(count, ds.schedule.EDM(), top=80.0, bottom=0.002)
    i = torch.arange(count)
    for number in (count, torch.tensor(float(count), dtype=torch.float64)):
        np.testing.assert_allclose(karras(i, number, 0.002, 80.0), grid, rtol=1e-12)


class Halves:
    """Draws whose uniform numbers say the middle of the levels."""

    def uniform(self, stream):
        return torch.full((64,), 0.5, dtype=torch.float64)


class Alike(nn.Module):
    """In the place of LPIPS: another distance of images."""

    def forward(self, a, b):
        return (a - b).abs().amax(1)


@each
@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "lpips"])
def test_a_distance_is_that_of_whole_rows(method, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(LPIPS, "load", lambda path: Alike())
    (file := tmp_path / "lpips.pth").write_bytes(b"")
    changes = {"lpips": file} if kind == "lpips" else {"loss_type": kind, "huber": 0.1}
    method = replace(method, **changes)
    modules = nn.ModuleDict({**method.init(TEACHER), **NETS})
    x0, z = (ds.noise(seed, INDEX, (3,)).double() for seed in (1, 2))
    found = method.loss(modules, Batch(x0, z, INDEX, Halves()), Progress(99, 100))
    count = 18 if isinstance(method, ConsistencyDistillation) else 151
    i = torch.full((64,), int((count - 1) / 2))
    number = () if count == 18 else (count,)
    f, target = method.ends(modules, Batch(x0, z, INDEX, Halves()), i, *number)
    off, width = f - target, 0.1 * 3**0.5
    expected = {
        "l1": off.abs().mean(),
        "l2": off.square().mean(),
        "huber": ((off.square().sum(1) + width**2).sqrt() - width).mean(),  # of a whole row
        "lpips": off.abs().amax(1).mean(),
    }[kind]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert off.abs().max() > 0.01


# Levels of the released samplers on ImageNet-64: those of CD are 40, and those of CT 201.
RELEASED = {
    "CD in two steps": (ConsistencyDistillation(num_levels=40, indices=(0, 22)), 39, 22),
    "CT in two steps": (ConsistencyTraining(end_steps=200, indices=(0, 106)), 200, 106),
}


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("clip", [False, True])
def test_a_sample_calls_the_network_at_the_given_levels(name, clip):
    method, last, index = RELEASED[name]
    method, called = replace(method, clip=clip), []
    net = Formula(lambda x, t: called.append((x, t)) or 3 * torch.ones_like(x))
    z = ds.noise(0, INDEX, (3,)).double()
    method.sample(net, z, nfe=2, draws=Draws(0, INDEX))
    sigma = (80 ** (1 / 7) + index / last * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    for (_, told), level, time in zip(called, (80.0, sigma), method.times(2), strict=True):
        np.testing.assert_allclose(told, np.log(level) / 4, rtol=1e-12)
        assert time == told[0]
    state = called[1][0] * (sigma**2 + 0.25) ** 0.5
    first = method.denoiser(net)(80 * z, 80.0).x0
    fresh = (state - (first.clamp(-1, 1) if clip else first)) / (sigma**2 - 0.002**2) ** 0.5
    assert fresh.mean().abs() < 0.2 and fresh.std().item() == pytest.approx(1, rel=0.1)
    assert torch.corrcoef(torch.stack([fresh.flatten(), z.flatten()]))[0, 1].abs() < 0.2
    assert len(method.times(3)) == 3, "other numbers of calls are evenly spaced"


@each
def test_a_copy_of_a_network_that_is_told_other_noise_levels_is_refused(method):
    """OpenAI's networks are told 1000 * log(sigma) / 4, those of JAX and EDM a thousandth of it."""
    net, config = built(MLPConfig(dim=3, width=8, depth=1)), MLPConfig(dim=3, width=16)
    denoiser = ds.Denoiser(net, ds.schedule.EDM(), ds.predictions.Preconditioned(0.5, 250.0))
    teacher = replace(TEACHER, denoiser=denoiser)
    with pytest.raises(ValueError, match=r"told 250 \* log.*told 0.25 \* log.*noise_scale to 250"):
        method.init(teacher)
    for right in (replace(method, noise_scale=250.0), replace(method, student=config)):
        assert right.init(teacher)["student"].config.width in (8, 16)


def test_a_consistency_model_is_exported(tmp_path):
    net = built(MLPConfig(dim=3, width=8, depth=1))
    student = ds.Student(net, ConsistencyTraining(clip=True))
    to_program(student, tmp_path / "student.pt2")
    z = ds.noise(0, INDEX, (3,))
    made = torch.export.load(tmp_path / "student.pt2").module()(z)
    torch.testing.assert_close(made, student.sample(z))


@each
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_min": 80.0}, "sigma_min .80.0. must be below sigma_max"),
        ({"indices": (3, 5)}, "indices must rise from 0 to at most .*, not 3, 5"),
        ({"indices": (0, 5, 5)}, "indices must rise"),
        ({"indices": (0, 150)}, "the last level above sigma_min, not 0, 150"),
        ({"indices": (-1,)}, "indices.0. must be at least 0"),
    ],
)
def test_levels_that_make_no_sense_are_refused(method, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(method, **changes)
