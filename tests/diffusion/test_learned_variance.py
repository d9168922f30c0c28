"""Networks of twice the channels: what reads the first half, and what the second."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from torch import nn

import ds
from ds import grids, predictions, solvers
from ds.analytic import Gaussian
from ds.diffusion.schedules import LinearBeta
from ds.engine import times
from ds.evaluation.solver_search import frontier
from ds.methods import (
    ConsistencyDistillation,
    Denoising,
    DenoisingStudent,
    MeanFlow,
    RectifiedFlow,
)
from ds.methods.base import mean_half
from ds.nets.base import AbstractNetConfig
from ds.training.presets import SolveConfig
from tests.nets.test_unet import TINY, build

LEARNED = predictions.LearnedVariance()


@dataclasses.dataclass(frozen=True)
class PixelsConfig(AbstractNetConfig):
    """A network of a pixel at a time, with a learned variance where out_channels is 2 * 3."""

    tag: ClassVar[str] = "pixels"

    out_channels: int | None = None
    conditions: tuple[str, ...] = ()

    def build(self):
        return Pixels(self)


class Pixels(nn.Module):
    shape = (3, 4, 4)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.inner = nn.Conv2d(3, 8, 1)
        self.conv_out = nn.Conv2d(8, config.out_channels or 3, 1)

    def forward(self, x, t, **cond):
        assert x.shape[1:] == self.shape
        return self.conv_out(self.inner(x.to(self.inner.weight)).sin()).to(x.dtype)


def teacher(prediction=LEARNED, solver=None):
    torch.manual_seed(0)
    net = PixelsConfig(out_channels=6).build()
    denoiser = ds.Denoiser(net, LinearBeta(), prediction)
    return ds.Teacher(denoiser, solver or solvers.DDIM(), grids.uniform(4))


@pytest.mark.parametrize("inner", [predictions.Eps(), predictions.X0(), predictions.V()])
def test_the_first_half_is_the_prediction(inner):
    whole = teacher(predictions.LearnedVariance(inner)).denoiser
    half = dataclasses.replace(whole, net=mean_half(whole.net), prediction=inner)
    x = ds.noise(0, range(2), whole.shape)
    for t in (300, torch.tensor([3, 700])):
        found, expected = whole.parts(x, t), half(x, t)
        torch.testing.assert_close(found.estimate, expected, rtol=1e-4, atol=1e-4)
        out = whole.net(x, torch.zeros(2))
        assert torch.equal(found.share, (out[:, 3:] + 1) / 2)
        assert half.parts(x, t).share is None
    assert torch.equal(
        whole.target(x, -x, torch.tensor([5, 6])), half.target(x, -x, torch.tensor([5, 6]))
    )
    assert whole.prediction.needs_signal == inner.needs_signal


@pytest.mark.parametrize("solver", [solvers.DDIM(), solvers.Heun(), solvers.Clipped()], ids=repr)
def test_solvers_and_engines_take_it(solver):
    model = teacher(solver=solver)
    z = ds.noise(0, range(2), model.shape)
    assert model.sample(z).shape == z.shape
    assert len(times(model)) == model.nfe
    images = ds.Sampler(model, batch_size=2)(0, range(3))
    assert images.shape == (3, 4, 4, 3)


def test_a_search_for_solvers_takes_it():
    model = teacher()
    among = [SolveConfig(steps=4), SolveConfig(steps=4, solver="heun")]
    found = frontier(
        model.denoiser, ds.noise(0, range(2), model.shape), SolveConfig(steps=3), among
    )
    assert len(found.rows) == 3


@pytest.mark.parametrize(
    "method", [DenoisingStudent(), MeanFlow(), RectifiedFlow(), ConsistencyDistillation()], ids=repr
)
def test_the_student_of_a_learned_variance_has_the_mean_half(method):
    model = teacher()
    modules = method.on(model).init(model)
    student, shape = modules["student"], (2, *model.shape)
    assert student.config.out_channels is None and student.conv_out.weight.shape[0] == 3
    assert student.conv_out.weight.requires_grad
    x, t = ds.noise(1, range(2), model.shape), torch.zeros(2)
    torch.testing.assert_close(student(x, t), model.net(x, t)[:, :3])
    assert model.net.conv_out.weight.shape[0] == 6 and shape == student(x, t).shape


@pytest.mark.parametrize("inner", [predictions.Eps(), predictions.X0(), predictions.V()])
def test_the_student_of_the_paper_starts_as_that_of_the_prediction(inner):
    whole = teacher(predictions.LearnedVariance(inner))
    half = ds.Denoiser(mean_half(whole.net), LinearBeta(), inner)
    assert DenoisingStudent().on(whole) == DenoisingStudent().on(
        dataclasses.replace(whole, denoiser=half)
    )


def test_a_network_that_cannot_be_halved_is_one_clear_line():
    model = teacher()
    del model.net.config
    with pytest.raises(ValueError, match="leaves it out, which this Pixels cannot; set `student`"):
        RectifiedFlow().init(model)


def test_a_variance_is_learned_once():
    with pytest.raises(ValueError, match="learned variance already"):
        predictions.LearnedVariance(LEARNED)
    with pytest.raises(ValueError, match="prediction must be"):
        predictions.LearnedVariance("eps")


def test_exact_data_has_no_learned_variance():
    with pytest.raises(ValueError, match="no learned variance"):
        Gaussian().teacher(solvers.DDIM(), (10, 0), prediction=LEARNED)


def test_the_mean_half_of_a_u_net_is_what_it_said_of_the_mean():
    net = build(dataclasses.replace(TINY, out_channels=4)).double()
    half = mean_half(net)
    x = ds.noise(0, range(3), net.shape, dtype=torch.float64)
    t = torch.tensor([999, 0, 37])
    torch.testing.assert_close(half(x, t), net(x, t)[:, :2], rtol=1e-12, atol=1e-12)
    assert half.config == TINY and not half.training


def test_a_teacher_goes_on_learning_its_prediction_alone():
    with pytest.raises(ValueError, match="this teacher has LearnedVariance"):
        Denoising().init(teacher())
