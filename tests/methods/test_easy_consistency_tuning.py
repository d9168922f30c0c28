"""Easy consistency tuning: its levels, its losses, where it begins, and the truncated run."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import ds
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Eps, Preconditioned
from ds.diffusion.schedules import EDM, Linear, LinearBeta
from ds.methods import EasyConsistencyTuning, Progress, losses
from ds.methods.networks import Frozen
from ds.methods.proof import Formula
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.nets import MLPConfig
from ds.pairs.sources import Batch, Images
from ds.training.config import TrainConfig
from ds.training.parallel import Loss
from ds.training.stages import Stages
from tests.methods.test_methods import starts

METHOD, TOTAL = EasyConsistencyTuning(), 80  # steps: ten for each stage
TRUNCATED = EasyConsistencyTuning(truncate=1.0, mid=(1.0,))
NET, CUTS = MLPConfig(dim=3, width=8, depth=1), range(0, 64, 16)


def rows(count: int = 64, first: int = 0) -> Batch:
    index = torch.arange(first, first + count)
    x0, noise = (ds.noise(seed, index, (3,)) for seed in (1, 2))
    return Batch(x0, noise, index, Draws(0, index))


def net(dropout: float = 0.0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = NET.build()
    made.layers.insert(1, nn.Dropout(dropout))
    return made


@pytest.mark.parametrize(
    ("stage", "t", "share"),
    [
        (-3, 80.0, 0.0),
        (-1, 80.0, 0.0),
        (0, math.log(7) - 1e-9, 0.0),  # where 8 * sigmoid(-t) is 1
        (0, 3.0, 1 - (1 + 8 / (1 + math.exp(3))) / 2),
        (0, 60.0, 0.5),
        (3, 0.5, 1 - (1 + 8 / (1 + math.exp(0.5))) / 16),
        (7, 1e-9, 1 - 5 / 256),
        (7, 60.0, 1 - 1 / 256),
        (30, 2.0, 0.999),  # the most
    ],
)
def test_r_of_a_stage(stage, t, share):
    r = METHOD.lower(torch.tensor([t], dtype=torch.float64), stage)
    assert r.item() == pytest.approx(share * t, rel=1e-12)
    if stage == 0 and not share:
        assert METHOD.lower(torch.tensor([t + 1e-6], dtype=torch.float64), stage) > 0


def test_the_recipe_of_one_hour_has_the_steps_of_the_last_stage_from_the_first_on():
    hour, t = EasyConsistencyTuning(ratio=256.0, num_stages=1), torch.tensor([0.01, 1.0, 50.0])
    for step in (0, TOTAL // 2, TOTAL):
        r = hour.lower(t, hour.stage(Progress(step, TOTAL)))
        torch.testing.assert_close(r, METHOD.lower(t, 7), rtol=1e-6, atol=0)


def test_stages_have_equal_length_after_those_that_only_denoise():
    stages = [METHOD.stage(Progress(step, TOTAL)) for step in range(TOTAL + 1)]
    assert stages == [*(step // 10 for step in range(TOTAL)), 7]
    late = replace(METHOD, pretrain=2)
    stages = [late.stage(Progress(step, 100)) for step in range(100)]
    assert stages == [step // 10 - 2 for step in range(100)]


def test_where_r_is_0_the_loss_is_that_of_edm():
    """The squared error of what the network itself returns, from Preconditioned.target."""
    batch, made = rows(), net()
    method = replace(METHOD, ratio=1.0, sigma_data=0.7)
    t, _ = method.levels(batch.draws)
    levels, prediction = EDM().gather(t, batch.x0), Preconditioned(0.7)
    x, told = prediction.inputs(batch.x0 + levels[1] * batch.noise, t, *levels)
    out = made(x, told) - prediction.target(batch.x0, batch.noise, *levels)
    found = method.loss({"student": made}, batch, Progress(TOTAL, TOTAL))
    torch.testing.assert_close(found, out.square().sum(1).mean(), rtol=1e-4, atol=0)


def test_the_loss_of_few_numbers_is_squared_and_of_more_the_size_over_the_step():
    t, r = torch.tensor([1.0, 4.0], dtype=torch.float64), torch.tensor([0.5, 3.9])
    few, many = torch.randn(2, 255), torch.randn(2, 256)
    edm = (t**2 + 0.25) / (0.5 * t) ** 2
    wanted = few.square().sum(1) * (edm / (1 - r / t))
    torch.testing.assert_close(METHOD.weighted(few, t, r), wanted.float())
    size = many.norm(dim=1)
    torch.testing.assert_close(METHOD.weighted(many, t, r), (size / (t - r)).float())
    imagenet = replace(METHOD, weight="output", width=0.06)
    huber = ((size**2 + 0.06**2).sqrt() - 0.06) * edm
    torch.testing.assert_close(imagenet.weighted(many, t, r), huber.float())
    for method, error in ((replace(METHOD, loss_type="squared"), many), (METHOD, few)):
        assert (method.weighted(2 * error, t, r) / method.weighted(error, t, r)).tolist() == [4, 4]


def test_an_error_of_0_has_a_finite_gradient():
    error, t = torch.zeros(2, 300, requires_grad=True), torch.tensor([1.0, 2.0])
    found = METHOD.weighted(error, t, t / 2), losses.pseudo_huber(error, 0.0)
    (ours,), (without_width,) = (torch.autograd.grad(loss.sum(), error) for loss in found)
    assert torch.equal(ours, torch.zeros_like(error)) and without_width.isnan().all()


def test_the_target_is_the_student_at_r_with_no_gradient_and_the_image_where_r_is_0():
    batch, made = rows(2), net()
    method = replace(METHOD, prediction=ds.predictions.X0())  # which does not return x at 0
    t, r = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.9])
    error = method.error({"student": made}, batch, t, r)
    f = method.denoiser(made)
    x0 = f(batch.x0 + batch.noise, t).x0
    nearer = f(batch.x0 + 0.9 * batch.noise, torch.full((2,), 0.9)).x0
    torch.testing.assert_close(error, x0 - torch.stack([batch.x0[0], nearer[1]]))
    ours, wanted = (torch.autograd.grad(e.sum(), made.layers[0].bias) for e in (error, x0))
    torch.testing.assert_close(ours, wanted)


def test_what_is_its_own_target_learns_nothing():
    """So that r = t would pass for success, if a small loss were one."""
    batch, t = rows(), torch.full((64,), 2.0)
    assert METHOD.error({"student": net()}, batch, t, t).abs().max() == 0
    assert METHOD.error({"student": net()}, batch, t, 0.9 * t).abs().max() > 1e-3


def test_student_and_target_have_the_same_dropout():
    batch, made = rows(), {"student": net(0.5)}
    t = torch.full((64,), 2.0, dtype=torch.float64)
    f = METHOD.denoiser(made["student"])
    assert (f(batch.x0, t).x0 - f(batch.x0, t).x0).abs().max() > 1e-3
    assert METHOD.error(made, batch, t, t).abs().max() == 0


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(LinearBeta(), Eps()), (EDM(40.0), Preconditioned(0.3)), (Linear(), None)],
    ids=lambda value: type(value).__name__,
)
def test_the_student_begins_as_the_teachers_own_denoiser(schedule, prediction):
    network = starts()[0].net  # a U-Net, whatever it was trained for
    denoiser = ds.Denoiser(network, schedule, prediction or ds.predictions.Velocity())
    teacher = Teacher(denoiser, ds.solvers.DDIM(), (schedule.noise,))
    method = METHOD.on(teacher)
    begins = method.denoiser(method.init(teacher)["student"])
    t = torch.logspace(-1.5, 1.5, 8, dtype=torch.float64)
    x = ds.noise(0, range(8), (1, 8, 8)) * t.float()[:, None, None, None]
    there = schedule.times_of(t)
    alpha, _ = schedule.gather(there, x)
    own = denoiser(alpha * x, there).x0
    torch.testing.assert_close(begins(x, t).x0, own, rtol=1e-6, atol=1e-6 * own.abs().max().item())
    assert (METHOD.denoiser(network)(x, t).x0 - own).abs().max() > 1e-2, "with its weights alone"


@pytest.mark.parametrize(
    ("mid", "levels"),
    [
        ((0.821,), (80.0,)),
        ((0.821,), (80.0, 0.821)),
        ((0.0025,), (80.0, 0.0025)),  # sampling above a smallest level would add 0.0015
        ((0.821,), ds.grids.karras(5, EDM())[:-1]),
        ((10.0, 3.0, 0.5), (80.0, 10.0, 3.0, 0.5)),
    ],
)
def test_each_call_sees_the_sample_of_the_last_with_fresh_noise_of_its_full_level(mid, levels):
    seen = []
    data = Formula(lambda x, told: seen.append((x, told)) or torch.zeros_like(x))
    method = replace(METHOD, prediction=ds.predictions.X0(), mid=mid)
    index = torch.arange(10_000)
    method.sample(data, ds.noise(0, index, (3,)), nfe=len(levels), draws=Draws(0, index))
    assert [told[0].item() for _, told in seen] == pytest.approx([*levels])
    for x, told in seen:
        assert x.std().item() == pytest.approx(told[0].item(), rel=0.02)
    states = torch.stack([x.flatten() for x, _ in seen])
    assert (torch.corrcoef(states).reshape(len(levels), -1).fill_diagonal_(0).abs() < 0.1).all()


def test_the_second_run_learns_at_its_level_and_above_with_targets_of_the_first_below():
    _, second = TRUNCATED.stages()
    batch, student, first = rows(4000), net(), Formula(lambda x, told: 0 * x + 7.0)
    t, part = second.levels(batch.draws)
    at = t == 1
    assert t.min() == 1 and t.max() <= 80
    assert at.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert part[at].unique().item() == pytest.approx(0.1 / 0.25)
    assert part[~at].unique().item() == pytest.approx(1 / 0.75)
    r = second.lower(t, second.stage(Progress(0, TOTAL)))
    frozen = Frozen(ds.Denoiser(first, EDM(), "x0"), EDM())
    error = second.error({"student": student, "teacher": frozen}, batch, t, r)
    f = second.denoiser(student)
    x0 = f(batch.x0 + t.float()[:, None] * batch.noise, t).x0
    below = r < 1
    assert below[at].all() and not below.all()
    torch.testing.assert_close(error[below], x0[below] - 7.0)
    alone = METHOD.error({"student": student}, batch, t, r)
    torch.testing.assert_close(error[~below], alone[~below])


def test_a_truncated_run_starts_from_the_function_that_the_first_run_made(tmp_path):
    data = ds.analytic.GaussianMixture()
    images = Images(data.sample(0, range(64)))
    teacher = data.teacher(ds.solvers.DDIM(), ds.grids.quadratic(4))
    method = replace(TRUNCATED, student=MLPConfig(width=8, depth=1))
    config = TrainConfig(batch_size=32, epochs=1, warmup_steps=0, lr=1e-2)
    stages = Stages(method, teacher, images, images, tmp_path, config)
    result: Any = stages.fit()
    first = stages.results[0]
    assert isinstance(first, Teacher) and isinstance(result, Student)
    frozen: Any = stages.trainer.state.modules["teacher"]
    assert frozen.denoiser.prediction == result.method.prediction == Preconditioned()
    for kept, made in zip(frozen.parameters(), first.net.parameters(), strict=True):
        assert torch.equal(kept, made)
    moved = zip(result.net.parameters(), first.net.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)
    assert result.method.times(2)[1] == 0.25 * math.log(1.0)
    assert min(result.method._grid(4)) > 1


def test_the_second_run_is_one_graph_and_does_not_depend_on_how_a_batch_is_cut():
    _, second = TRUNCATED.stages()
    frozen = Frozen(ds.Denoiser(net(), EDM(), Preconditioned()), EDM())
    modules, graphs = nn.ModuleDict({"student": net(), "teacher": frozen}), CompileCounter()
    loss, progress = Loss(second, modules), Progress(60, TOTAL)
    whole, *parts = (loss(rows(n, i), progress) for n, i in ((64, 0), *((16, i) for i in CUTS)))
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    assert torch.equal(torch.compile(loss, fullgraph=True, backend=graphs)(rows(), progress), whole)
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"truncate": 1.0}, r"mid .0.821,. must fall within 1.0, 80"),
        ({"mid": (0.5, 0.9)}, "must fall"),
        ({"mid": (90.0,)}, "must fall"),
        ({"ratio": 0.5}, "ratio must"),
        ({"most": 1.0}, "most must"),
        ({"loss_type": "l2"}, "loss_type must be one of norm, squared"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EasyConsistencyTuning(**fields)
