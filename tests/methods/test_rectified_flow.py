"""Rectified flow: its stages, its times, its losses, and the teachers that it starts from."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import ds
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Eps, Preconditioned, Rescaled, Velocity
from ds.diffusion.schedules import EDM, Linear, LinearBeta
from ds.diffusion.solvers import DDIM, SameNoise, UniPC
from ds.methods import DenoisingStudent, Progress, RectifiedFlow
from ds.methods.proof import NOISE, NORMAL, Formula
from ds.models.teacher import Teacher
from ds.nets import MLPConfig
from ds.nets.lpips import LPIPS
from ds.pairs.sources import Batch
from ds.training.parallel import Loss
from tests.methods.test_methods import batch, start

REFLOW = RectifiedFlow(feeds="pairs", reflow=1)
DISTIL = RectifiedFlow(feeds="pairs", reflow=0, distil=True)
STEP = Progress(0, 1)


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (RectifiedFlow(reflow=0), [("images", 1, False)]),
        (RectifiedFlow(), [("images", 100, False), ("pairs", 1, False)]),
        (
            RectifiedFlow(reflow=2, steps=7, nfe=3),
            [("images", 7, False), ("pairs", 7, False), ("pairs", 3, False)],
        ),
        (RectifiedFlow(feeds="pairs", reflow=0), [("pairs", 1, False)]),
        (REFLOW, [("pairs", 1, False)]),
        (DISTIL, [("pairs", 1, True)]),
        (replace(REFLOW, distil=True, nfe=2), [("pairs", 100, False), ("pairs", 2, True)]),
        (
            RectifiedFlow(distil=True),
            [("images", 100, False), ("pairs", 100, False), ("pairs", 1, True)],
        ),
    ],
)
def test_a_stage_feeds_on_what_the_last_one_makes(method, stages):
    found = replace(method, student=MLPConfig()).stages()
    assert [(s.feeds, s.result(Formula(torch.sin)).nfe, s.distil) for s in found] == stages
    assert all(stage.stages() == (stage,) for stage in found)
    assert [stage.student for stage in found] == [MLPConfig(), *[None] * (len(found) - 1)]


@pytest.mark.parametrize(("solver", "kind"), [("euler", DDIM()), ("same_noise", SameNoise())])
def test_the_result_is_a_teacher_whose_samples_are_those_of_the_method(solver, kind):
    net = Formula(lambda x, told: torch.sin(x) * told[:, None] / 999)
    method = RectifiedFlow(reflow=0, nfe=4, solver=solver)
    result = method.result(net)
    assert isinstance(result, Teacher) and result.solver == kind
    assert torch.equal(result.sample(NOISE), method.sample(net, NOISE, nfe=4))


def told(method: RectifiedFlow, count: int = 64) -> torch.Tensor:
    """What the network is told in two batches of the same rows."""
    found = []
    net = Formula(lambda x, t: found.append(t) or 0 * x)
    x = torch.zeros(count, 3)
    for first in (0, count):
        draws = Draws(0, torch.arange(first, first + count))
        method.loss({"student": net}, Batch(x, x, torch.arange(count), draws), STEP)
    return torch.cat(found)


def test_a_pair_has_another_time_at_every_draw():
    """Times that belonged to the pair would show each pair at one time for the whole run."""
    times = told(RectifiedFlow())
    assert len(times.unique()) == 128
    assert times.min() >= 0 and times.max() <= 999


def test_two_ended_times_are_often_near_both_ends():
    even, ends = (told(replace(REFLOW, two_ended=two), 512) / 999 for two in (False, True))
    middle = [float(((t > 0.25) & (t < 0.75)).float().mean()) for t in (even, ends)]
    expected = [0.5, math.sinh(1) / math.sinh(2)]
    assert middle == pytest.approx(expected, abs=0.06)  # 4 deviations of 1,024 times


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_distillation_of_k_steps_trains_at_its_k_times_alone(k):
    method = replace(DISTIL, nfe=k)
    expected = [999 * j / k for j in range(1, k + 1)]
    assert told(method).unique().tolist() == pytest.approx(expected)
    assert method.times(k) == pytest.approx(expected[::-1])
    assert method.times(1) == (999,)  # whose target is the same
    with pytest.raises(ValueError, match=rf"{k} distilled steps do not make 3 calls"):
        method.sample(Formula(torch.sin), NOISE, nfe=3)


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_denoising_student_is_the_distillation_of_one_step(loss_type):
    """One loss serves both: it has the same bits, and so have its gradients."""
    losses, gradients = [], []
    for method in (DenoisingStudent(loss_type), replace(DISTIL, loss_type=loss_type)):
        modules = start(method)[1].train()
        loss = method.loss(modules, batch(method), STEP)
        loss.backward()
        losses.append(loss)
        gradients.append([w.grad for w in modules.parameters()])
    assert torch.equal(*losses)
    assert all(map(torch.equal, *gradients))
    assert gradients[0][0].any()


class Alike(nn.Module):
    """In the place of LPIPS: another distance of images."""

    def forward(self, a, b):
        return (a - b).abs().flatten(1).mean(1)


@pytest.mark.parametrize("kind", ["reflow of 2-RF++", "reflow, l2 and LPIPS", "distil by LPIPS"])
def test_lpips_joins_the_loss_of_reflow_and_is_that_of_distillation(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(LPIPS, "load", lambda path: Alike())
    (file := tmp_path / "lpips.pth").write_bytes(b"")
    pairs = Batch(NOISE.cos(), NOISE, torch.arange(33), Draws(0, torch.arange(33)))
    method = {
        "reflow of 2-RF++": replace(REFLOW, two_ended=True, loss_type="pseudo_huber", lpips=file),
        "reflow, l2 and LPIPS": replace(REFLOW, lpips=file),
        "distil by LPIPS": replace(DISTIL, lpips=file),
    }[kind]
    teacher = NORMAL.teacher(DDIM(), (1.0,), Linear())
    net, alike = Formula(lambda x, told: x.sin()), method.init(teacher)["lpips"]
    found = method.loss(nn.ModuleDict({"student": net, "lpips": alike}), pairs, STEP)

    t = method.errors(net, pairs)[2]
    x = (1 - t) * pairs.x0 + t * NOISE
    off = x.sin() - (NOISE - pairs.x0)
    near = (x - t * x.sin() - pairs.x0).abs().mean(1)
    c = 0.00054 * 3
    huber = (1 - t[:, 0]) * ((off.square().sum(1) + c**2).sqrt() - c) / 3
    expected = {
        "reflow of 2-RF++": huber + near / t[:, 0],
        "reflow, l2 and LPIPS": off.square().mean(1) + near / t[:, 0],
        "distil by LPIPS": near,
    }[kind]
    torch.testing.assert_close(found, expected.mean(), rtol=1e-12, atol=0)
    images = replace(method, feeds="images", distil=False)
    assert "lpips" not in images.init(teacher)


TEACHERS = {
    "EDM": NORMAL.teacher(DDIM(), (80.0,), EDM(), Preconditioned()),
    "DDPM": NORMAL.teacher(DDIM(), (999,), LinearBeta(), Eps()),
}
CONVERTED = RectifiedFlow(reflow=1, converted=True)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_converted_teacher_starts_as_its_own_flow(name):
    """Its ODE on the straight path is the teacher's, between the noise levels that it knows."""
    teacher = TEACHERS[name]
    method, own = CONVERTED.on(teacher), teacher.denoiser.schedule
    denoiser = method.denoiser(method.init(teacher)["student"])
    assert denoiser.schedule == Linear()
    lams = own.lam(own.noise), own.lam(0) if name == "DDPM" else 6.0
    top, bottom = map(Linear().time, lams)
    x, state = NOISE, None
    for t, s in pairwise(ds.grids.log_snr(200, Linear(), top=top, bottom=bottom)):
        x, state = UniPC().step(denoiser, x, t, s, state)
    end = NORMAL.flow(NOISE, Linear().at(top), Linear().at(bottom))
    torch.testing.assert_close(x, end, rtol=0, atol=1e-4)
    one = method.result(denoiser.net).sample(NOISE)  # in a step, from more noise than it knows
    assert one.isfinite().all()


@pytest.mark.parametrize("name", TEACHERS)
def test_a_later_stage_keeps_the_prediction_of_a_converted_teacher(name):
    teacher = TEACHERS[name]
    first, second = CONVERTED.stages()
    first = first.on(teacher)
    assert isinstance(first.prediction, Rescaled)
    assert second.on(first.result(teacher.net)).prediction == first.prediction
    with pytest.raises(ValueError, match=r"use method\.on\(teacher\)"):
        CONVERTED.init(teacher)
    plain = RectifiedFlow()
    assert plain.on(teacher) == plain
    assert plain.denoiser(teacher.net).prediction == Velocity(999.0)


def test_the_loss_of_a_converted_teacher_is_one_graph():
    denoiser = ds.Denoiser(MLPConfig(dim=3).build(), LinearBeta())
    teacher = Teacher(denoiser, DDIM(), (999,))
    method = replace(REFLOW, converted=True, two_ended=True, loss_type="pseudo_huber").on(teacher)
    modules, graphs = method.init(teacher), CompileCounter()
    loss = torch.compile(Loss(method, modules), fullgraph=True, backend=graphs)
    for first in (0, 33):
        draws = Draws(0, torch.arange(first, first + 33))
        rows = Batch(NOISE.cos().float(), NOISE.float(), torch.arange(33), draws)
        assert torch.equal(loss(rows, STEP), method.loss(modules, rows, STEP))
    assert graphs.frame_count == 1


def test_the_paths_of_the_data_bend_and_straight_ones_do_not():
    z = ds.noise(0, range(64), (3,)).double()
    bend = {}
    for name, field in {
        "straight": lambda x, _: 0 * x + 2,
        "bent": lambda x, t: t[:, None] + 0 * x,
    }.items():
        (check,) = RectifiedFlow(feeds="pairs", time_scale=1.0).measure(Formula(field), z)
        bend[name] = check.value
    assert bend["straight"] < 1e-12
    assert bend["bent"] == pytest.approx(3 / 12, rel=1e-2)  # the variance of t, three times
