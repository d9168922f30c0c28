"""Denoising: how a teacher is trained."""

import pytest
import torch
from torch import nn

import ds
from ds.diffusion.noise import Draws
from ds.methods import Denoising, Progress
from ds.pairs.sources import Batch, Images, digits
from tests.methods.test_methods import SHAPE, Counting, starts

START = Progress(0, 1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_it_is_zero_for_the_network_that_knows_the_answer(prediction):
    batch = Images(digits()[0]).batch(range(16))
    method = Denoising(prediction=prediction)

    class Oracle(nn.Module):
        def forward(self, x, t):
            return method.denoiser(self).target(batch.x0, batch.noise, t)

    assert method.loss({"student": Oracle()}, batch, START).item() == 0


def test_it_draws_every_time_equally_often():
    """10,000 draws in ten bins of 100 times: chi-squared with 9 degrees of freedom."""

    class Noting(nn.Module):
        def forward(self, x, t):
            self.t = t
            return x

    net, index = Noting(), torch.arange(10_000)
    zeros = torch.zeros(len(index), 1, 1, 1)
    Denoising().loss({"student": net}, Batch(zeros, zeros, index, Draws(0, index)), START)
    counts = torch.bincount(net.t // 100, minlength=10).double()
    assert len(counts) == 10 and net.t.min() == 0 and net.t.max() == 999
    assert (counts - 1000).square().sum() / 1000 < 27.9  # exceeded once in a thousand


@torch.no_grad()
def test_it_samples_with_as_many_calls_as_asked():
    net = Counting(starts()[0].net)
    Denoising().sample(net, ds.noise(0, range(2), SHAPE), nfe=7)
    assert net.times == [852, 710, 568, 426, 284, 142, 0]


def test_its_result_is_a_teacher_with_its_prediction():
    method = Denoising(prediction="v")
    teacher = method.result(starts()[0].net)
    z = ds.noise(0, range(2), SHAPE)
    assert (teacher.denoiser.prediction, teacher.nfe) == (ds.predictions.V(), 20)
    assert torch.equal(teacher.sample(z), method.sample(teacher.net, z))


def test_it_does_not_train_a_teacher_on_another_schedule_than_its_own():
    teacher = starts()[0]
    for method in (Denoising(ds.schedule.Cosine()), Denoising(prediction="v")):
        with pytest.raises(ValueError, match="give Denoising the same"):
            method.init(teacher)
