"""The captured loop against the solver that it stands for; on a CPU its step is simply called."""

import pytest
import torch

import ds
from ds import grids
from ds.denoiser import Denoiser
from ds.engine import DDIMLoop, Engine
from ds.schedule import LinearBeta
from ds.solvers import DDIM
from tests.nets.test_unet import build, relative_rms

GRID = grids.quadratic(6)
SCHEDULE = LinearBeta()


def teacher(net, prediction="eps"):
    return ds.Teacher(Denoiser(net, SCHEDULE, prediction), DDIM(), GRID)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loop_is_ddim(prediction):
    net = build().double()
    z = ds.noise(0, range(3), net.shape).double()
    exact = teacher(net, prediction).sample(z)
    loop = DDIMLoop(Engine(net, GRID, images=3), SCHEDULE, GRID, prediction)
    for _ in range(2):  # a second call starts anew
        assert float((loop(z) - exact).abs().max() / exact.abs().max()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loop_rounds_no_more_than_the_solver(dtype):
    net = build()
    z = ds.noise(0, range(3), net.shape)
    exact = teacher(build().double()).sample(z.double())
    peer = relative_rms(teacher(build().to(dtype)).sample(z), exact)
    loop = DDIMLoop(Engine(net, GRID, images=3, dtype=dtype), SCHEDULE, GRID)
    assert relative_rms(loop(z), exact) <= 2 * peer + torch.finfo(torch.float32).eps


def test_another_batch_size_is_refused():
    loop = DDIMLoop(Engine(build(), GRID, images=3), SCHEDULE, GRID)
    with pytest.raises(ValueError, match=r"^DDIMLoop: z must be \[3, 2, 8, 8\].* not \[4, 2, 8, 8"):
        loop(torch.zeros(4, 2, 8, 8))
