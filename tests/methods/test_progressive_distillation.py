"""Progressive distillation: its stages, its targets, its loss, and the teachers it starts from."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ds.diffusion.noise import Draws
from ds.diffusion.predictions import X0, Eps, Preconditioned, Rescaled, V, Velocity
from ds.diffusion.schedules import EDM, LinearBeta, Trig
from ds.diffusion.solvers import DDIM
from ds.methods import Progress, ProgressiveDistillation
from ds.methods.networks import Frozen
from ds.methods.proof import NOISE, NORMAL, Formula
from ds.nets import MLPConfig
from ds.pairs.sources import Batch

STEP = Progress(0, 1)


def test_the_steps_are_halved_stage_by_stage_down_to_one():
    method = ProgressiveDistillation(start_steps=16, student=MLPConfig())
    stages = method.stages()
    assert [(s.start_steps, s.nfe) for s in stages] == [(16, 8), (8, 4), (4, 2), (2, 1)]
    assert [s.student for s in stages] == [MLPConfig(), None, None, None]
    assert all(s.stages() == (s,) for s in stages)


@pytest.mark.parametrize(("start", "nfe"), [(1, 1), (12, 1), (8, 3), (4, 4), (12, 2)])
def test_steps_that_do_not_halve_to_the_last_ones_are_refused(start, nfe):
    with pytest.raises(ValueError, match=f"not {start} with nfe {nfe}"):
        ProgressiveDistillation(start_steps=start, nfe=nfe)


def test_the_rate_falls_to_0_in_each_stage_and_nothing_is_averaged():
    stages = ProgressiveDistillation(start_steps=16, last_length=2.0).stages()
    assert all(s.train == {"lr_schedule": "linear", "ema_decay": 0.0} for s in stages)
    assert [s.length for s in stages] == [1, 1, 2, 2]
    assert {s.length for s in ProgressiveDistillation().stages()} == {1}


def test_the_result_of_a_stage_is_the_teacher_of_the_next():
    net = Formula(lambda x, told: torch.sin(x) * told[:, None])
    stage = ProgressiveDistillation(start_steps=8, nfe=4)
    result = stage.result(net)
    assert (result.nfe, result.solver) == (4, DDIM())
    assert torch.equal(result.sample(NOISE), stage.sample(net, NOISE, nfe=4))
    after = replace(stage, start_steps=4, nfe=2)
    x, i = NOISE[:2], torch.tensor([2, 1])
    frozen = after.init(result)["teacher"]
    with torch.no_grad():
        grid, made = (*result.grid, 0.0), []
        for row, k in zip(x, (0, 2), strict=True):
            y, _ = DDIM().step(result.denoiser, row[None], grid[k], grid[k + 1], None)
            y, _ = DDIM().step(result.denoiser, y, grid[k + 1], grid[k + 2], None)
            made.append(y)
        found = after.target(frozen, x, i, {})
        (a, b), (c, d) = (after.schedule.gather(after.time(k, 2), x) for k in (i, i - 1))
    torch.testing.assert_close(c * found + d * (x - a * found) / b, torch.cat(made))


@pytest.mark.parametrize(
    ("schedule", "prediction", "expected"),
    [
        (Trig(), X0(), X0()),
        (Trig(), V(), V()),
        (EDM(), Preconditioned(), Rescaled(EDM(), Preconditioned())),
        # which would be divided by alpha, 0 at the noise
        (LinearBeta(), Eps(), Rescaled(LinearBeta(), Velocity())),
    ],
)
def test_a_student_predicts_what_its_teacher_does_but_not_the_noise(schedule, prediction, expected):
    teacher = NORMAL.teacher(DDIM(), (schedule.noise,), schedule, prediction)
    method = ProgressiveDistillation().on(teacher)
    assert method.prediction == expected
    assert method.on(teacher) == method
    fresh = ProgressiveDistillation(student=MLPConfig()).on(teacher)
    assert fresh.prediction == X0()
    assert method.sample(teacher.net, NOISE).isfinite().all()


def rows(i: int, x0: torch.Tensor, z: torch.Tensor) -> Batch:
    index = torch.full((len(x0),), i)
    return Batch(x0, z, index, Draws(0, index))


@pytest.mark.parametrize("index", range(4))
def test_the_loss_is_the_larger_of_the_errors_of_x0_and_of_the_noise(index):
    """Row by row, over the means of the elements; the noise follows from x and x0."""
    method = ProgressiveDistillation(start_steps=8, nfe=4)
    told = []
    student = Formula(lambda x, t: told.append(t) or torch.sin(3 * x))
    frozen = Frozen(NORMAL.teacher(DDIM(), (1.0,), Trig()).denoiser, Trig())
    batch = rows(index, NOISE.flip(0), NOISE)
    found = method.loss(torch.nn.ModuleDict({"student": student, "teacher": frozen}), batch, STEP)
    i = (told[0] / (torch.pi / 2) * 4).round().long()
    alpha, sigma = Trig().gather(told[0], NOISE)
    x = alpha * batch.x0 + sigma * batch.noise
    made, wanted = torch.sin(3 * x), method.target(frozen, x, i, {})
    eps = [(x - alpha * x0) / sigma for x0 in (made, wanted)]
    each = [(a - b).square().mean(1) for a, b in ((made, wanted), eps)]
    torch.testing.assert_close(found, torch.maximum(*each).mean())


@pytest.mark.parametrize("i", [1000, 4095])
def test_a_target_of_thousands_of_steps_loses_no_digits(i):
    """The control is the published form, of the difference of the states after and before."""
    method = ProgressiveDistillation(start_steps=8192, nfe=4096)
    frozen = Frozen(NORMAL.teacher(DDIM(), (1.0,), Trig()).denoiser, Trig())
    number, x = torch.full((len(NOISE),), i), NOISE.float()
    exact, found = (method.target(frozen, y, number, {}) for y in (NOISE, x))
    assert (exact - found).abs().max() < 3e-6
    times = (
        method.time(number, 4096),
        method.time(2 * number - 1, 8192),
        method.time(number - 1, 4096),
    )
    y = x
    for t, s in pairwise(times):
        x0, eps = frozen(y, t.float(), {})
        alpha, sigma = Trig().gather(s, x)
        y = alpha * x0 + sigma * eps
    (a, b), (c, d) = (Trig().gather(t, x) for t in (times[0], times[2]))
    published = (y - d / b * x) / (c - d / b * a)
    assert (exact - published).abs().max() > 1e-5
