"""Denoising Student: one call, at one time."""

import pytest
import torch
from torch import nn

import ds
from ds.diffusion.noise import Draws
from ds.methods import DenoisingStudent, Progress
from ds.pairs.sources import Batch
from tests.methods.test_methods import SHAPE, starts


def test_it_starts_at_the_teachers_weights():
    teacher = starts()[0]
    student = DenoisingStudent().init(teacher)["student"].state_dict()
    assert all(torch.equal(w, student[name]) for name, w in teacher.net.state_dict().items())


def test_it_makes_an_image_in_one_call_only():
    with pytest.raises(ValueError, match="in 1 network call, not 2"):
        DenoisingStudent().sample(starts()[0].net, ds.noise(0, range(2), SHAPE), nfe=2)


@pytest.mark.parametrize("t", [1000, 5000])
def test_it_refuses_a_time_that_the_schedule_lacks(t):
    with pytest.raises(ValueError, match=f"t = {t}"):
        DenoisingStudent(t=t).init(starts()[0])


@pytest.mark.parametrize("t", [-1, -2])
def test_it_refuses_a_time_that_is_none_of_noise(t):
    with pytest.raises(ValueError, match=f"t must be at least 0, not {t}"):
        DenoisingStudent(t=t)


def test_it_sees_its_time_and_nothing_else():
    class Time(nn.Module):
        def forward(self, x, t):
            return x - t.reshape(-1, 1, 1, 1) / 1000

    z = ds.noise(0, range(3), SHAPE)
    torch.testing.assert_close(DenoisingStudent(t=640).sample(Time(), z), torch.full_like(z, 0.64))


@pytest.mark.parametrize(("loss_type", "expected"), [("l1", 0.5), ("l2", 0.25)])
def test_its_loss_is_the_mean_over_elements(loss_type, expected):
    class Half(nn.Module):
        def forward(self, x, t):
            return x - 0.5

    z, index = ds.noise(0, range(3), SHAPE), torch.arange(3)
    pairs = Batch(torch.zeros(3, *SHAPE), z, index, Draws(0, index))
    loss = DenoisingStudent(loss_type=loss_type).loss({"student": Half()}, pairs, Progress(0, 1))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
