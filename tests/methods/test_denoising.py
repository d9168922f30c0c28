"""Denoising: how a teacher is trained."""

import math

import pytest
import torch
from torch import nn

import ds
from ds.diffusion.noise import Draws
from ds.methods import Denoising, Progress
from ds.methods.proof import NOISE, Formula
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


EDM = Denoising(ds.schedule.EDM(), "preconditioned")


def test_on_edms_path_it_is_edms_loss():
    """Karras et al. 2022, Eq. 2 and 8: the squared error of x0 with a weight of its noise level."""
    net = Counting(starts()[0].net).double()
    batch = Images(digits()[0]).batch(range(16))
    x0, z = batch.x0.double(), batch.noise.double()
    sigma = EDM._drawn(batch.draws).double()
    level = sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        found = EDM.loss({"student": net}, batch._replace(x0=x0, noise=z), START)
        c_in, c_noise = (level**2 + 0.25).rsqrt(), sigma.log() / 4
        c_skip, c_out = 0.25 / (level**2 + 0.25), level * 0.5 / (level**2 + 0.25).sqrt()
        noisy = x0 + level * z
        error = c_skip * noisy + c_out * net(c_in * noisy, c_noise) - x0
    expected = ((level**2 + 0.25) / (level * 0.5) ** 2 * error.square()).mean()
    assert torch.allclose(found, expected, rtol=1e-6)
    assert not torch.allclose(error.square().mean(), expected, rtol=1e-2)


def test_on_edms_path_the_logarithm_of_sigma_is_normal():
    index = torch.arange(10_000)
    x = EDM._drawn(Draws(0, index)).log()
    assert abs(x.mean() + 1.2) < 4 * 1.2 / 100 and abs(x.std() / 1.2 - 1) < 4 / 141
    assert Denoising(EDM.schedule, "preconditioned", (9.0, 1.0))._drawn(Draws(0, index)).max() == 80


@torch.no_grad()
def test_on_edms_path_it_samples_with_heun():
    net, teacher = Counting(starts()[0].net), EDM.result(starts()[0].net)
    assert (teacher.solver, len(teacher.grid), teacher.nfe) == (ds.solvers.Heun(), 18, 35)
    z = ds.noise(0, range(2), SHAPE)
    assert torch.equal(EDM.sample(net, z, nfe=35), teacher.sample(z)) and len(net.times) == 35
    EDM.sample(net, z, nfe=36)
    assert len(net.times) == 70
    assert EDM.times(35) == pytest.approx([math.log(t) / 4 for t in teacher.grid])


class Told(nn.Module):
    """Keep what a loss tells it."""

    def forward(self, x, t, **cond):
        self.t, self.cond = t, cond
        return x


def test_a_share_of_the_labels_is_left_out_so_that_the_teacher_can_be_guided():
    """Which ones depends on (seed, draw) alone, and the times do not depend on labels at all."""
    index = torch.arange(10_000)
    zeros, label = torch.zeros(len(index), 1, 1, 1), index % 10
    batch, net = Batch(zeros, zeros, index, Draws(3, index), {"label": label}), Told()
    Denoising().loss({"student": net}, batch, START)
    told, times = net.cond["label"], net.t
    untold = told == -1
    assert abs(untold.double().mean() - 0.1) < 4 * 0.003
    assert torch.equal(told[~untold], label[~untold]) and torch.equal(label, index % 10)
    assert abs(untold[label == 7].double().mean() - 0.1) < 4 * 0.0095
    part = Batch(*(x[50:90] for x in batch[:3]), Draws(3, index[50:90]), {"label": label[50:90]})
    Denoising().loss({"student": net}, part, START)
    assert torch.equal(net.cond["label"], told[50:90])
    Denoising(label_dropout=0).loss({"student": net}, batch, START)
    assert net.cond["label"] is label
    Denoising().loss({"student": net}, batch._replace(cond={}), START)
    assert net.cond == {} and torch.equal(net.t, times)


def test_a_prediction_without_meaning_on_a_path_is_refused():
    with pytest.raises(ValueError, match=r"V needs alpha"):
        Denoising(ds.schedule.EDM(), "v")


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


ARC = Denoising(ds.schedule.Trig(), "x0", snr_weight=True)


def test_the_teacher_of_progressive_distillation_learns_the_larger_error_of_x0_and_noise():
    """At even times of the arc; each row has the worse of its two means over the elements."""
    told = []
    net = Formula(lambda x, t: told.append(t) or torch.sin(3 * x))
    index = torch.arange(10_000)
    batch = Batch(NOISE.repeat(304, 1)[:10_000], torch.cos(index)[:, None], index, Draws(0, index))
    found = ARC.loss({"student": net}, batch, START)
    alpha, sigma = ARC.schedule.gather(told[0], batch.x0)
    x = alpha * batch.x0 + sigma * batch.noise
    made = torch.sin(3 * x)
    eps = (x - alpha * made) / sigma
    both = ((made - batch.x0).square().mean(1), (eps - batch.noise).square().mean(1))
    torch.testing.assert_close(found, torch.maximum(*both).mean())
    counts = torch.histc(told[0], 10, 0, math.pi / 2).double()
    assert (counts - 1000).square().sum() / 1000 < 27.9
    assert ARC.result(net).nfe == 20


@pytest.mark.parametrize("prediction", ["eps", "preconditioned"])
def test_a_prediction_that_is_divided_by_alpha_is_refused_where_alpha_falls_to_0(prediction):
    with pytest.raises(ValueError, match="alpha is 0; predict x0 or v"):
        Denoising(ds.schedule.Trig(), prediction)
