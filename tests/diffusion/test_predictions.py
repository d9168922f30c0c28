"""What networks predict, on every schedule: round trips, published formulas, and the ends."""

import math

import pytest
import torch

from ds import analytic
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.predictions import (
    X0,
    Bounded,
    Eps,
    Preconditioned,
    Rescaled,
    Score,
    TrigFlow,
    V,
    Velocity,
    as_prediction,
)
from ds.diffusion.schedules import EDM, VP, Linear, LinearBeta, Trig
from ds.diffusion.solvers import DDIM
from ds.methods.proof import Formula

SCHEDULES = [LinearBeta(), EDM(), VP(), Linear(), Trig(), Trig(0.5)]
PREDICTIONS = [
    Eps(),
    Score(),
    X0(),
    V(),
    Velocity(),
    Velocity(999.0),
    Preconditioned(0.5),
    Preconditioned(0.15, 250.0),
    Bounded(0.5),
    Bounded(0.15, 250.0, 0.01),
    TrigFlow(1.0),
    TrigFlow(0.5),
]
CASES = [
    (p, s)
    for p in PREDICTIONS
    for s in SCHEDULES
    if not (p == V() and s in (EDM(), Linear(), Trig(0.5)))
]
every_case = pytest.mark.parametrize(("prediction", "schedule"), CASES, ids=repr)
LAMS = (-2.0, 0.0, 1.5, 3.0)


def draw(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 3, generator=generator, dtype=torch.float64)


RESCALED = [Rescaled(EDM(), Preconditioned(0.5)), Rescaled(Linear(), Velocity())]


@pytest.mark.parametrize(
    ("prediction", "schedule"), [*CASES, *((p, s) for p in RESCALED for s in SCHEDULES)], ids=repr
)
def test_target_and_estimate_are_inverse(prediction, schedule):
    x0, eps = draw()
    for lam in LAMS:
        alpha, sigma = schedule.at(schedule.time(lam))
        out = prediction.target(x0, eps, alpha, sigma)
        found = prediction.estimate(alpha * x0 + sigma * eps, out, alpha, sigma)
        for part, truth in zip(found, (x0, eps), strict=True):
            torch.testing.assert_close(part, truth, rtol=0, atol=1e-12)


@every_case
def test_an_exact_network_means_the_same_under_every_prediction(prediction, schedule):
    """D(x / alpha, sigma / alpha) is one function, whatever the schedule and the prediction."""
    data = analytic.GaussianMixture()
    denoiser = data.teacher(DDIM(), (schedule.noise,), schedule, prediction).denoiser
    y, _ = draw()[:, :, :2]
    for lam in LAMS:
        t = schedule.time(lam)
        alpha, sigma = schedule.at(t)
        truth = data.x0(y, 1.0, sigma / alpha), data.eps(y, 1.0, sigma / alpha)
        # one time for all; one each
        for when in (t, torch.full((len(y),), t, dtype=torch.float64)):
            for part, exact in zip(denoiser(alpha * y, when), truth, strict=True):
                torch.testing.assert_close(part, exact, rtol=0, atol=1e-9)


@every_case
@pytest.mark.parametrize("path", [Linear(), EDM()], ids=repr)
def test_a_network_of_one_schedule_means_the_same_on_another_path(prediction, schedule, path):
    data, (y, _) = analytic.Gaussian(0.3, 0.7, (3,)), draw()
    net = data.teacher(DDIM(), (schedule.noise,), schedule, prediction).net
    for lam in LAMS:
        t = path.time(lam)
        alpha, sigma = path.at(t)
        truth = data.x0(y, 1.0, sigma / alpha), data.eps(y, 1.0, sigma / alpha)
        for when in (t, torch.full((len(y),), t, dtype=torch.float64)):
            found = Denoiser(net, path, Rescaled(schedule, prediction))(alpha * y, when)
            for part, exact in zip(found, truth, strict=True):
                torch.testing.assert_close(part, exact, rtol=0, atol=1e-12)


def test_edm_on_the_straight_path_is_fed_x_and_the_time_of_the_paper():
    t, sd = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 0.5
    x = draw(3)[0]
    sigma, each = t / (1 - t), (1 - t)[:, None]
    fed, told = Rescaled(EDM(), Preconditioned(sd)).inputs(x, t, each, t[:, None])
    torch.testing.assert_close(fed, x / each / (sigma[:, None] ** 2 + sd**2).sqrt())
    torch.testing.assert_close(told, sigma.log() / 4)


def test_preconditioning_is_that_of_edm():
    sigma, sd = 0.7, 0.5
    x, out = draw()
    prediction = Preconditioned(sd)
    fed, c_noise = prediction.inputs(x, torch.full((6,), sigma), 1.0, sigma)
    total = sigma**2 + sd**2
    torch.testing.assert_close(fed, x / math.sqrt(total))
    torch.testing.assert_close(c_noise, torch.full((6,), math.log(sigma) / 4, dtype=x.dtype))
    expected = sd**2 / total * x + sigma * sd / math.sqrt(total) * out
    torch.testing.assert_close(prediction.estimate(x, out, 1.0, sigma).x0, expected)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("prediction", [Preconditioned(0.3), TrigFlow(0.3)], ids=repr)
def test_input_and_target_of_a_preconditioned_network_have_variance_1(prediction, schedule):
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for lam in LAMS:
        alpha, sigma = schedule.at(schedule.time(lam))
        # of independent data of deviation 0.3 and noise of deviation 1, in which both are linear
        fed = [
            prediction.inputs(x, one[0], alpha, sigma)[0] for x in (0.3 * alpha * one, sigma * one)
        ]
        target = [
            prediction.target(*pair, alpha, sigma) for pair in ((0.3 * one, zero), (zero, one))
        ]
        for parts in (fed, target):
            assert float(sum(part**2 for part in parts)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("t", [0.2, 0.9, 1.4])
def test_the_output_of_trigflow_is_the_velocity_on_the_arc(t):
    schedule, (x0, eps) = Trig(0.5), draw()

    def x(t):
        alpha, sigma = schedule.at(t)
        return alpha * x0 + sigma * eps

    slope = (x(t + 1e-6) - x(t - 1e-6)) / 2e-6
    found = TrigFlow(0.5).target(x0, eps, *schedule.at(t))
    torch.testing.assert_close(0.5 * found, slope, rtol=0, atol=1e-8)
    fed, angle = TrigFlow(0.5).inputs(x(t), torch.full((6,), t), *schedule.at(t))
    torch.testing.assert_close(fed, x(t) / 0.5)
    torch.testing.assert_close(angle, torch.full((6,), t, dtype=torch.float64))


def test_trigflow_is_minus_the_preconditioned_output():
    x0, eps = draw()
    for name in ("target", "estimate"):
        ours = getattr(TrigFlow(0.5), name)(x0, eps, 0.6, 0.8)
        theirs = getattr(Preconditioned(0.5), name)(x0, -eps, 0.6, 0.8)
        if name == "target":
            theirs = -getattr(Preconditioned(0.5), name)(x0, eps, 0.6, 0.8)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_level_of_a_bounded_prediction_returns_x_to_the_bit(dtype):
    net = Formula(lambda x, t: 1e3 * x)
    for prediction, same in ((Bounded(), True), (Preconditioned(), False)):
        denoiser, x = Denoiser(net, EDM(), prediction), 100 * draw()[0].to(dtype)
        for t in (0.002, torch.full((len(x),), 0.002, dtype=torch.float64)):
            assert torch.equal(denoiser(x, t).x0, x) is same
        assert not torch.equal(denoiser(x, 0.003).x0, x)


def test_far_above_its_smallest_level_a_bounded_prediction_is_edm_s():
    x, out = draw()
    for one, other in zip(
        Bounded().estimate(x, out, 1.0, 80.0),
        Preconditioned().estimate(x, out, 1.0, 80.0),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_velocity_is_fed_its_scale_of_time():
    x, t = torch.zeros(2, 1), torch.tensor([0.5, 1.0])
    assert Velocity(999.0).inputs(x, t, 0.0, 1.0)[1].tolist() == [499.5, 999.0]


@pytest.mark.parametrize(
    "prediction", [X0(), Velocity(), Preconditioned(), TrigFlow(), V()], ids=repr
)
def test_where_there_is_no_signal_the_estimate_is_finite(prediction):
    x, out = draw()
    x0, eps = prediction.estimate(x, out, 0.0, 1.0)
    assert x0.isfinite().all()
    torch.testing.assert_close(eps, x)


@pytest.mark.parametrize(
    "prediction", [Eps(), Velocity(), Preconditioned(), TrigFlow(), V()], ids=repr
)
def test_where_there_is_no_noise_the_estimate_is_x_itself(prediction):
    x, out = draw()
    x0, eps = prediction.estimate(x, out, 1.0, 0.0)
    torch.testing.assert_close(x0, x)
    assert eps.isfinite().all()


@pytest.mark.parametrize("schedule", [EDM(), Linear(), Trig(0.5)], ids=repr)
def test_v_needs_a_schedule_that_preserves_variance(schedule):
    with pytest.raises(ValueError, match=r"V needs alpha\*\*2 .* use Velocity"):
        V().check(schedule)


def test_short_names_and_values_are_predictions():
    assert [as_prediction(p) for p in ("eps", "x0", "v", TrigFlow())] == [
        Eps(),
        X0(),
        V(),
        TrigFlow(),
    ]
