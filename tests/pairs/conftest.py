"""A small teacher for the tests of stores."""

import pytest
import torch

import ds
from tests.pairs.test_store import TINY


@pytest.fixture(scope="module")
def unet() -> ds.Teacher:
    """A small real U-Net that predicts x0, so that its images stay within the grey levels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TINY.build().eval()
        with torch.no_grad():
            for w in net.parameters():
                w.add_(0.05 * torch.randn_like(w))
    denoiser = ds.Denoiser(net, ds.schedule.LinearBeta(), "x0")
    return ds.Teacher(denoiser, ds.solvers.DDIM(), ds.grids.quadratic(10))
