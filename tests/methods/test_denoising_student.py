"""Denoising Student: one call, at one time."""

from dataclasses import replace

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


DATA = ds.analytic.Gaussian(mean=0.3, std=0.4)
STARTS = {
    "x0": (ds.schedule.LinearBeta(), ds.predictions.X0()),
    "v": (ds.schedule.LinearBeta(), ds.predictions.V()),
    "v on a cosine": (ds.schedule.Cosine(num_steps=4000), ds.predictions.V()),
    "velocity": (ds.schedule.Linear(), ds.predictions.Velocity(time_scale=999.0)),
    "edm": (ds.schedule.EDM(), ds.predictions.Preconditioned(sigma_data=0.5)),
    "trigflow": (ds.schedule.Trig(0.5), ds.predictions.TrigFlow(sigma_data=0.5)),
}


def teacher_of(schedule, prediction="eps") -> ds.Teacher:
    """The exact teacher of DATA."""
    return DATA.teacher(ds.solvers.DDIM(), (schedule.noise,), schedule, prediction)


def start_of(
    schedule, prediction
) -> tuple[ds.Teacher, DenoisingStudent, torch.Tensor, torch.Tensor]:
    """A teacher, the method on it, noise, and the teacher's guess of x0 at its last time."""
    teacher = teacher_of(schedule, prediction)
    z = ds.noise(0, range(8), DATA.shape)
    guess = teacher.denoiser(schedule.prior(z), schedule.noise).x0
    return teacher, DenoisingStudent().on(teacher), z, guess


@pytest.mark.parametrize(("schedule", "prediction"), STARTS.values(), ids=STARTS)
def test_a_student_begins_with_the_best_guess_of_a_teacher_of_any_prediction(schedule, prediction):
    teacher, method, z, guess = start_of(schedule, prediction)
    begins = method.sample(teacher.net, z)
    away = (begins - guess).abs().max()
    assert away < 0.03  # what alpha * x adds; EDM ends at the noise level 80
    for form in ({"residual": True, "gain": -1.0}, {"gain": -method.gain}):
        wrong = replace(method, **form)
        if wrong != method:
            assert (wrong.sample(teacher.net, z) - guess).abs().max() > 4 * away


def test_a_student_of_a_teacher_that_predicts_the_noise_begins_as_in_the_paper():
    """Its output is the difference of the noise and the noise that is predicted."""
    teacher = teacher_of(ds.schedule.LinearBeta())
    method, z = DenoisingStudent().on(teacher), ds.noise(0, range(8), DATA.shape)
    assert method == DenoisingStudent(t=999, residual=True, gain=-1.0)
    eps = teacher.denoiser(z, 999).eps
    assert torch.equal(method.sample(teacher.net, z), z - eps)
    assert torch.equal(DenoisingStudent().sample(teacher.net, z), z - eps)


@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_a_student_is_told_the_last_time_of_its_teachers_schedule(steps):
    teacher = teacher_of(ds.schedule.LinearBeta(steps, 0.1 / steps, 20 / steps))
    assert DenoisingStudent().on(teacher).times(1) == (steps - 1,)
    assert DenoisingStudent(t=7).on(teacher).times(1) == (7,)


# The network of a velocity is told 999 here, as the paper's is.
@pytest.mark.parametrize("name", [name for name in STARTS if name != "velocity"])
def test_a_student_of_such_a_teacher_is_not_trained_in_the_papers_form(name):
    teacher, method = teacher_of(*STARTS[name]), DenoisingStudent()
    with pytest.raises(ValueError, match=r"use method\.on\(teacher\)"):
        method.init(teacher)
    method.on(teacher).init(teacher)


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
