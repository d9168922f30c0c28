"""What a network predicts, and what that says about x0 and eps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.schedules import EDM, LinearBeta

SCHEDULE = LinearBeta()
predictions = pytest.mark.parametrize("prediction", ["eps", "x0", "v"])


class Says(nn.Module):
    """A network that gives one answer, and remembers the times it was asked about."""

    shape = (2, 3)

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, t):
        self.asked = t
        return self.answer


def draw(n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 2, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in "ab"]


def exact(prediction, x0, eps, alpha, sigma):
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]


@predictions
@settings(max_examples=25, deadline=None)
@given(t=st.integers(0, 999), seed=st.integers(0, 99))
def test_an_exact_prediction_gives_back_the_image_and_the_noise(prediction, t, seed):
    x0, eps = draw(4, seed)
    alpha, sigma = SCHEDULE.at(t)
    net = Says(exact(prediction, x0, eps, alpha, sigma))
    estimate = Denoiser(net, SCHEDULE, prediction)(alpha * x0 + sigma * eps, t)
    # Rounding of numbers below 8, divided by alpha >= 1/157 or sigma >= 1/100
    for found, truth in zip(estimate, (x0, eps), strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


@predictions
def test_target_is_what_the_estimate_inverts(prediction):
    x0, eps = draw(5)
    t = torch.tensor([0, 1, 250, 800, 999])
    alpha, sigma = SCHEDULE.gather(t, x0)
    denoiser = Denoiser(Says(None), SCHEDULE, prediction)
    denoiser.net.answer = denoiser.target(x0, eps, t)
    estimate = denoiser(alpha * x0 + sigma * eps, t)
    for found, truth in zip(estimate, (x0, eps), strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)  # as above


@predictions
@pytest.mark.parametrize("t", [0, 400, 999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_time_for_all_is_the_same_as_one_each(prediction, t, dtype):
    x, answer = draw(4, dtype=dtype)
    denoiser = Denoiser(Says(answer), SCHEDULE, prediction)
    for one, each in zip(denoiser(x, t), denoiser(x, torch.full((4,), t)), strict=True):
        # Coefficients are rounded to the dtype in one case only; x0 divides that by alpha = 1/157.
        torch.testing.assert_close(one, each, rtol=0, atol=1000 * torch.finfo(dtype).eps)


def test_the_network_is_told_the_time_of_every_sample():
    x, answer = draw(4)
    net = Says(answer)
    Denoiser(net, SCHEDULE)(x, 7)
    assert net.asked.dtype == torch.int64 and net.asked.tolist() == [7, 7, 7, 7]


def test_v_is_the_one_of_progressive_distillation():
    x0, eps = draw(1)
    v = Denoiser(Says(None), SCHEDULE, "v").target(x0, eps, torch.tensor([300]))
    alpha, sigma = SCHEDULE.at(300)
    torch.testing.assert_close(v, alpha * eps - sigma * x0, rtol=1e-14, atol=1e-15)


def test_a_denoiser_has_the_shape_of_its_network():
    assert Denoiser(Says(None), SCHEDULE).shape == (2, 3)


def test_a_time_the_schedule_lacks_is_named():
    x, answer = draw(1)
    with pytest.raises(ValueError, match="t = 1000 does not exist"):
        Denoiser(Says(answer), SCHEDULE)(x, 1000)


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match=r"one of eps, x0, v, .* not 'noise'"):
        Denoiser(Says(None), SCHEDULE, "noise")


@pytest.mark.parametrize("number", [7, np.int64(7), np.uint8(7)])
def test_any_whole_number_is_an_index(number):
    x, answer = draw(4)
    net = Says(answer)
    found = Denoiser(net, SCHEDULE)(x, number)
    assert net.asked.dtype == torch.int64 and net.asked.tolist() == [7, 7, 7, 7]
    assert torch.equal(found.x0, Denoiser(net, SCHEDULE)(x, 7).x0)


@pytest.mark.parametrize("number", [7.5, np.float64(7.5), np.float32(7.5), torch.tensor(7.5)])
@pytest.mark.parametrize(("dtype", "asked"), [(torch.float32,) * 2, (torch.float64,) * 2])
def test_any_real_number_is_a_time(number, dtype, asked):
    x, answer = draw(4, dtype=dtype)
    net = Says(answer)
    found = Denoiser(net, SCHEDULE)(x, number)
    assert net.asked.tolist() == [7.5] * 4
    assert isinstance(number, torch.Tensor) or net.asked.dtype == asked
    alpha, sigma = SCHEDULE.at(7.5)
    expected = (x - sigma * answer) / alpha
    torch.testing.assert_close(found.x0, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)


class Labelled(nn.Module):
    shape = (2, 3)

    def forward(self, x, t, *, y, scale=1.0):
        return scale * y[:, None, None] * torch.ones_like(x)


def test_given_conditions_reach_the_network():
    x, _ = draw(4)
    denoiser = Denoiser(Labelled(), SCHEDULE)
    labels = torch.arange(4.0, dtype=x.dtype)
    given_y = denoiser.given(y=labels)
    assert torch.equal(given_y(x, 5).eps, Labelled()(x, 5, y=labels))
    assert torch.equal(given_y.given(scale=2.0)(x, 5).eps, 2 * given_y(x, 5).eps)
    assert denoiser.cond == {} and given_y.prediction is denoiser.prediction
    with pytest.raises(TypeError, match="'y'"):
        denoiser(x, 5)


def test_a_prediction_that_the_schedule_lacks_is_refused():
    with pytest.raises(ValueError, match="prediction V needs"):
        Denoiser(Says(None), EDM(), "v")
