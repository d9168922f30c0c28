"""The loop against the model that it stands for; on a CPU its step is simply called."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import ds
from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.predictions import Eps, LearnedVariance, Preconditioned, TrigFlow, Velocity
from ds.diffusion.schedules import EDM, Linear, LinearBeta, Trig
from ds.diffusion.solvers import DDIM
from ds.engine import Engine, Loop, Recurrence
from ds.methods import DenoisingStudent, MeanFlow
from ds.nets.base import NO_CLASS
from ds.training.presets import SOLVERS
from tests.nets.test_unet import TINY, build, relative_rms

GRID = grids.quadratic(6)
SCHEDULE = LinearBeta()
# How many of the last calls each solver looks back to.
MEMORY = {
    "ddim": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m": 3, "dpmpp_2s": 2, "dpmpp_3s": 2, "unipc": 3,
}  # fmt: skip


def teacher(net, prediction="eps", solver="ddim", grid=GRID):
    return ds.Teacher(Denoiser(net, SCHEDULE, prediction), SOLVERS[solver], grid)


def loop_of(model, **options):
    recurrence = Recurrence.of(model)
    return Loop(Engine(model.net, recurrence.times, images=3, **options), recurrence)


def distance(found, exact):
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_is_the_solver(solver, prediction):
    net = build().double()
    z = ds.noise(0, range(3), net.shape).double()
    model = teacher(net, prediction, solver)
    exact, loop = model.sample(z), loop_of(model)
    for _ in range(2):  # a second call starts anew
        assert distance(loop(z), exact) < 1e-10


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_looks_back_no_further_than_it_must(solver):
    grid = grids.quadratic(100)
    model = teacher(build(), solver=solver, grid=grid)
    found = Recurrence.of(model)
    assert found.memory == MEMORY[solver]
    assert len(found.times) == model.nfe
    assert found.table.abs().max() < 2  # nothing large is to cancel


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(EDM(), Preconditioned()), (Linear(), Velocity(999.0)), (Trig(0.5), TrigFlow(0.5))],
    ids=["edm", "linear", "trig"],
)
def test_the_loop_is_the_solver_in_continuous_time(schedule, prediction, solver):
    """The network sees scaled states there, and times that are no whole numbers."""
    net = build().double()
    z = ds.noise(0, range(3), net.shape).double()
    grid = grids.karras(6, schedule)
    model = ds.Teacher(Denoiser(net, schedule, prediction), SOLVERS[solver], grid)
    exact, loop = model.sample(z), loop_of(model)
    for _ in range(2):
        assert distance(loop(z), exact) < 1e-6  # of times embedded in float32


def test_a_student_is_a_loop_of_one_step():
    net = build().double()
    z = ds.noise(0, range(3), net.shape).double()
    model = ds.Student(net, DenoisingStudent(t=7))
    assert Recurrence.of(model).times == (7,)
    assert distance(loop_of(model)(z), model.sample(z)) < 1e-10


TOLD = replace(TINY, conditions=("h",), frequencies=(6.0, 0.5))


def test_a_loop_is_told_the_conditions_of_each_image():
    net = build(replace(TOLD, classes=3, out_channels=4)).double()
    model = teacher(net, LearnedVariance(Eps()))
    h = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64)
    cond = {"h": h, "label": torch.tensor([2, NO_CLASS, 0])}
    z = ds.noise(0, range(3), model.shape).double()
    loop = loop_of(model)
    for _ in range(2):
        assert distance(loop(z, **cond), model.sample(z, cond=cond)) < 1e-10
        cond = {**cond, "label": cond["label"].flip(0)}
    with pytest.raises(ValueError, match="takes the conditions h, label, not h; pass"):
        loop(z, h=h)
    bound = replace(model, denoiser=model.denoiser.given(h=h))
    with pytest.raises(ValueError, match=r"^a loop needs .* given to each sample; h is bound"):
        Recurrence.of(bound)


def test_a_guided_teacher_is_refused_and_its_engine_knows_its_times():
    model = teacher(build(replace(TINY, classes=3)))
    model = replace(model, denoiser=ds.Guided(model.denoiser, 2.0))
    with pytest.raises(ValueError, match=r"^a loop needs one network call .* is guided"):
        Recurrence.of(model)
    engine = model.engine(4).net
    cond, z = {"label": torch.tensor([2, 0])}, ds.noise(0, range(2), model.shape)
    exact = replace(model, denoiser=replace(model.denoiser, net=build(engine.config).double()))
    exact = exact.sample(z.double(), cond=cond)
    assert relative_rms(model.using(engine).sample(z, cond=cond), exact) < 1e-5
    assert sorted(engine._times.tolist()) == sorted(GRID)


class Uneven(MeanFlow):
    """MeanFlow in steps of other lengths, which it tells its network as h."""

    def times(self, nfe: int) -> grids.Grid:
        return (1.0, 0.4, 0.3) if nfe == 3 else super().times(nfe)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_loop_tells_a_network_what_its_method_does_in_each_step(classes):
    net = build(replace(TOLD, classes=classes)).double()
    model = ds.Student(net, Uneven(), nfe=3)
    z, label = ds.noise(0, range(3), model.shape).double(), torch.tensor([2, 0, 1])
    cond = {"label": label} if classes else {}
    exact, loop = model.sample(z, cond=cond), loop_of(model)
    assert distance(loop(z, **cond), exact) < 1e-6  # of times embedded in float32
    loop._own["h"].fill_(0.6)
    assert distance(loop(z, **cond), exact) > 1e-3


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loop_rounds_no_more_than_the_solver(dtype, solver):
    z = ds.noise(0, range(3), build().shape)
    exact = teacher(build().double(), solver=solver).sample(z.double())
    peer = relative_rms(teacher(build().to(dtype), solver=solver).sample(z), exact)
    loop = loop_of(teacher(build(), solver=solver), dtype=dtype)
    assert relative_rms(loop(z), exact) <= 2 * peer + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_3m"])
def test_an_image_that_is_not_finite_does_not_reach_the_next_batch(solver):
    model = teacher(build().double(), solver=solver)
    z = ds.noise(0, range(3), model.shape).double()
    loop = loop_of(model)
    assert loop(torch.full_like(z, torch.nan)).isnan().all()
    assert distance(loop(z), model.sample(z)) < 1e-10


@dataclass(frozen=True)
class Clipped(DDIM):
    """DDIM that clips what it moves to, which no recurrence does."""

    def step(self, *args):
        x, state = super().step(*args)
        return x.clamp(-1, 1), state


class Flipped(DenoisingStudent):
    """A method whose pixels are not where the network saw them."""

    def sample(self, net: nn.Module, z, **options):
        return super().sample(net, z, **options).flip(1)


@pytest.mark.parametrize(
    "model",
    [
        ds.Teacher(Denoiser(build(), SCHEDULE), Clipped(), GRID),
        ds.Student(build(), Flipped()),
        ds.Teacher(Denoiser(build(), SCHEDULE), DDIM(eta=0.5), GRID),
        ds.Teacher(Denoiser(build(), SCHEDULE), ds.solvers.Clipped(DDIM()), GRID),
        ds.Teacher(Denoiser(build(), SCHEDULE), ds.solvers.Clipped(DDIM(), quantile=0.9), GRID),
    ],
    ids=["clipped", "flipped", "stochastic", "x0 clipped", "x0 thresholded"],
)
def test_what_is_not_linear_is_refused(model):
    with pytest.raises(ValueError, match=r"^a loop needs samples that are linear in the noise"):
        Recurrence.of(model)


def test_another_batch_size_is_refused():
    with pytest.raises(ValueError, match=r"^Loop: z must be \[3, 2, 8, 8\].* not \[4, 2, 8, 8"):
        loop_of(teacher(build()))(torch.zeros(4, 2, 8, 8))
