"""The closed forms against autograd, quadrature, Monte Carlo and another integrator."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import distributions as D

from ds import noise
from ds.analytic import Gaussian, GaussianField, GaussianMixture
from ds.diffusion import grids
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM
from ds.evaluation.scores import scores, table

SMALL = [Gaussian(shape=(3,)), GaussianField(size=4), GaussianMixture()]
every_data = pytest.mark.parametrize("data", SMALL, ids=lambda d: type(d).__name__)
LEVELS = [(0.999, math.sqrt(1 - 0.999**2)), (0.6, 0.8), (0.05, math.sqrt(1 - 0.05**2))]
every_level = pytest.mark.parametrize(("alpha", "sigma"), LEVELS)


def spectrum(size, power, std):
    """The variance of each Fourier mode, written out mode by mode."""
    frequency = [k if k < size / 2 else k - size for k in range(size)]
    law = np.array([[(1 + math.hypot(a, b)) ** -power for b in frequency] for a in frequency])
    return std**2 * law / law.mean()


def log_density(data, x, alpha, sigma):
    """log p(x_t), from torch.distributions and an explicit covariance."""
    if isinstance(data, Gaussian):
        variance = torch.tensor(alpha**2 * data.std**2 + sigma**2, dtype=x.dtype)
        return D.Normal(alpha * data.mean, variance.sqrt()).log_prob(x).sum(-1)
    if isinstance(data, GaussianMixture):
        means = torch.tensor(data.means, dtype=x.dtype)
        variance = torch.tensor(alpha**2 * data.std**2 + sigma**2, dtype=x.dtype)
        parts = D.Independent(D.Normal(alpha * means, variance.sqrt()), 1)
        shares = D.Categorical(torch.tensor(data.weights, dtype=x.dtype))
        return D.MixtureSameFamily(shares, parts).log_prob(x)
    # The covariance of two pixels is the transform of the spectrum at their distance.
    n = data.size
    by_distance = np.fft.ifft2(spectrum(n, data.power, data.std)).real
    pixels = [(i, j) for i in range(n) for j in range(n)]
    covariance = torch.tensor([[by_distance[a - c, b - d] for c, d in pixels] for a, b in pixels])
    noisy = alpha**2 * covariance + sigma**2 * torch.eye(n * n, dtype=x.dtype)
    zero = torch.zeros(n * n, dtype=x.dtype)
    return D.MultivariateNormal(zero, noisy).log_prob(x.flatten(1))


def noised(data, alpha, sigma, n=20):
    clean = data.sample(0, range(n)).double()
    return alpha * clean + sigma * noise(1, range(n), data.shape, dtype=torch.float64)


@every_data
@every_level
def test_the_score_is_the_gradient_of_the_log_density(data, alpha, sigma):
    x = noised(data, alpha, sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(data, x, alpha, sigma).sum(), x)
    found = data.score(x.detach(), alpha, sigma)
    # Rounding of a covariance of condition 1e3 at most
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)


@every_data
def test_the_noise_prediction_is_minus_sigma_times_the_score(data):
    x = noised(data, 0.6, 0.8)
    expected = -0.8 * data.score(x, 0.6, 0.8)
    torch.testing.assert_close(data.eps(x, 0.6, 0.8), expected, rtol=1e-14, atol=1e-15)


@every_level
@pytest.mark.parametrize("x", [-1.5, 0.0, 0.4])
def test_the_mixture_s_mean_noise_is_that_of_a_quadrature(x, alpha, sigma):
    means, weights, std = (-1.0, 0.5), (0.3, 0.7), 0.2
    data = GaussianMixture(means=((-1.0,), (0.5,)), weights=weights, std=std)

    def joint(eps):  # the density of this noise together with x_t = x, up to a factor
        x0 = (x - sigma * eps) / alpha
        prior = sum(
            w * math.exp(-(((x0 - m) / std) ** 2) / 2) for m, w in zip(means, weights, strict=True)
        )
        return prior * math.exp(-(eps**2) / 2)

    # Where a mode of the data wants the noise to be
    spots = sorted({min(9, max(-9, (x - alpha * m) / sigma)) for m in means})
    mean, mass = (
        quad(f, -10, 10, points=spots, epsabs=0, epsrel=1e-10, limit=400)[0]
        for f in (lambda eps: eps * joint(eps), joint)
    )
    found = data.eps(torch.tensor([[x]], dtype=torch.float64), alpha, sigma)
    assert float(found) == pytest.approx(mean / mass, abs=1e-8)


@pytest.mark.parametrize("data", [Gaussian(shape=(2,), std=0.5), GaussianMixture()])
def test_the_mean_noise_is_that_of_monte_carlo(data):
    alpha, sigma, n = 0.6, 0.8, 200_000
    x = torch.tensor([0.3, -0.5], dtype=torch.float64)
    eps = (x - alpha * data.sample(5, range(n)).double()) / sigma
    weight = (-eps.square().sum(1) / 2).softmax(0)[:, None]  # how likely that noise is
    mean = (weight * eps).sum(0)
    deviation = (weight * (eps - mean)).square().sum(0).sqrt()  # of a self-normalised estimate
    assert ((data.eps(x[None], alpha, sigma)[0] - mean).abs() < 5 * deviation).all()


@every_data
@pytest.mark.parametrize("shape", ["each", "one"])
def test_levels_may_be_tensors(data, shape):
    x = noised(data, 0.6, 0.8, n=4)
    alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in (0.6, 0.8))
    if shape == "each":
        alpha, sigma = (v.expand(4).reshape(4, *[1] * (x.dim() - 1)) for v in (alpha, sigma))
    expected = data.eps(x, 0.6, 0.8)
    torch.testing.assert_close(data.eps(x, alpha, sigma), expected, rtol=1e-14, atol=1e-15)


@every_data
@pytest.mark.parametrize("level", [LinearBeta().at(800), (0.0, 1.0)], ids=["index 800", "noise"])
def test_the_endpoint_is_that_of_another_integrator(data, level):
    """Follow d x / d theta with alpha = cos(theta), sigma = sin(theta) instead of sigma / alpha."""
    z = noise(2, range(12), data.shape, dtype=torch.float64)
    alpha, sigma = level

    def velocity(theta, flat):
        a, s = math.cos(theta), math.sin(theta)
        x = torch.from_numpy(flat).reshape(z.shape)
        return (a * data.eps(x, a, s) - s * data.x0(x, a, s)).flatten().numpy()

    path = solve_ivp(
        velocity,
        (math.atan2(sigma, alpha), 0),
        z.flatten().numpy(),
        "DOP853",
        rtol=1e-11,
        atol=1e-11,
    )
    found = data.endpoint(z, alpha, sigma)
    exact = torch.from_numpy(path.y[:, -1]).reshape(z.shape)
    # 1e-9 is what GaussianMixture promises; paths that part between modes widen errors tenfold.
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)


def test_a_field_with_a_flat_spectrum_is_independent_pixels():
    field, pixels = GaussianField(power=0, std=0.3), Gaussian(0.0, 0.3, (1, 16, 16))
    z = noise(0, range(4), (1, 16, 16), dtype=torch.float64)
    for law in (lambda data: data.eps(z, 0.6, 0.8), lambda data: data.endpoint(z, 0.6, 0.8)):
        torch.testing.assert_close(law(field), law(pixels), rtol=0, atol=1e-14)  # two FFTs


@every_data
def test_the_teacher_s_network_is_the_exact_prediction(data):
    teacher = data.teacher(DDIM(), grids.uniform(3))
    x, t = noised(data, 0.6, 0.8, n=3), torch.tensor([0, 500, 999])
    for i in range(3):
        expected = data.eps(x[i : i + 1], *LinearBeta().at(int(t[i])))
        torch.testing.assert_close(teacher.net(x, t)[i : i + 1], expected, rtol=1e-12, atol=1e-14)


def test_gaussian_samples_have_their_mean_and_deviation():
    data, n = Gaussian(mean=0.1, std=0.15), 4000
    x = data.sample(0, range(n)).double()
    assert float(x.mean()) == pytest.approx(0.1, abs=5 * 0.15 / math.sqrt(x.numel()))
    assert float(x.std()) == pytest.approx(0.15, abs=5 * 0.15 / math.sqrt(2 * x.numel()))


def test_mixture_samples_have_the_masses_of_the_modes():
    data, n = GaussianMixture(), 50_000
    x = data.sample(0, range(n))
    mode = torch.cdist(x, torch.tensor(data.means)).argmin(1)
    for share, weight in zip(mode.bincount() / n, data.weights, strict=True):
        assert float(share) == pytest.approx(weight, abs=5 * math.sqrt(weight * (1 - weight) / n))


def test_mixture_samples_have_the_width_of_the_modes():
    data, n = GaussianMixture(), 50_000
    x, means = data.sample(0, range(n)), torch.tensor(data.means)
    away = x - means[torch.cdist(x, means).argmin(1)]
    # The modes are five widths or more from their borders, so none of it is cut off.
    assert float(away.double().std()) == pytest.approx(0.12, abs=5 * 0.12 / math.sqrt(4 * n))


def test_field_samples_have_the_spectrum_of_the_power_law():
    data, n = GaussianField(), 2000
    modes = np.fft.fft2(data.sample(0, range(n)).double().numpy(), norm="ortho")
    found = (np.abs(modes) ** 2).mean((0, 1))
    # The square of a normal deviates by sqrt(2) of its mean; 256 modes stay within 5 sigma.
    np.testing.assert_allclose(found, spectrum(16, 2.0, 0.5), rtol=5 * math.sqrt(2 / n))


def test_a_pixel_of_the_field_has_the_variance_asked_for():
    like = torch.zeros(1, dtype=torch.float64)
    assert float(GaussianField(std=0.5).spectrum(like).mean()) == pytest.approx(0.25, rel=1e-14)


@every_data
def test_a_sample_depends_on_its_index_alone(data):
    assert torch.equal(data.sample(3, [7, 2]), data.sample(3, range(8))[[7, 2]])


@pytest.fixture(scope="module")
def judged():
    """The figures of a perfect generator."""
    data, n = GaussianMixture(), 3000
    z = noise(0, range(n), data.shape)
    target = data.endpoint(z, *LinearBeta().at(800))
    return {row.name: row for row in scores(data, z, target, target)}


@pytest.mark.parametrize(
    ("name", "floor"),
    # 3,000 points: masses deviate by 0.007, and so many moved by 1.5 are a distance of 0.12.
    [("sliced_wasserstein", 0.15), ("energy_distance", 0.003), ("r2", 0), ("mode_agreement", 0)],
)
def test_a_perfect_generator_reaches_the_floor(judged, name, floor):
    row = judged[name]
    perfect = 0 if name in ("sliced_wasserstein", "energy_distance") else 1
    assert row.floor == pytest.approx(perfect, abs=floor)
    assert row.value == pytest.approx(perfect, abs=floor)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("sliced_wasserstein", 0.3, 0.6),  # the noise itself: 0.40 for 10,000 points
        ("energy_distance", 0.03, 1),
        ("r2", -1.2, -0.8),  # an independent draw has twice the variance
        ("mode_agreement", 0.18, 0.25),  # two independent draws agree with sum w^2 = 0.215
    ],
)
def test_a_worthless_generator_is_told_from_a_good_one(judged, name, low, high):
    assert low < judged[name].control < high


def test_data_without_modes_has_no_mode_agreement():
    data = Gaussian(shape=(2,))
    z = noise(0, range(20), (2,))
    names = [row.name for row in scores(data, z, z, z)]
    assert names == ["sliced_wasserstein", "energy_distance", "r2"]


def test_the_table_prints_value_floor_and_control(judged):
    head, *lines = table(list(judged.values())).splitlines()
    assert head.split() == ["value", "floor", "control"]
    for line, row in zip(lines, judged.values(), strict=True):
        name, *figures = line.split()
        assert name == row.name
        assert figures == [f"{x:.4f}" for x in (row.value, row.floor, row.control)]


ENDS = [*LEVELS, (1.0, 0.0), (0.0, 1.0), (1.0, 20.0), (0.3, 0.7)]


@every_data
@pytest.mark.parametrize(("alpha", "sigma"), ENDS)
def test_the_guesses_of_data_and_noise_add_up_to_x(data, alpha, sigma):
    x = noised(data, alpha, sigma)
    found = alpha * data.x0(x, alpha, sigma) + sigma * data.eps(x, alpha, sigma)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


@every_data
def test_without_signal_the_guess_is_the_mean_of_the_data(data):
    x = noised(data, 0.0, 1.0, n=3)
    found = data.x0(x, 0.0, 1.0)
    mean = data.sample(0, range(50_000)).double().mean(0)
    torch.testing.assert_close(found, mean.expand_as(found), rtol=0, atol=0.03)  # 5 deviations
    torch.testing.assert_close(found, found[:1].expand_as(found))


@every_data
@pytest.mark.parametrize("start", [(0.05, 0.9), (0.0, 1.0), (1.0, 30.0), (0.2, 0.8)])
def test_flows_compose_and_do_not_depend_on_the_path(data, start):
    z = noise(2, range(5), data.shape, dtype=torch.float64) * start[1]
    whole = data.endpoint(z, *start)
    middle = (0.7, 0.35)
    torch.testing.assert_close(data.flow(data.flow(z, start, middle), middle, (1.0, 0.0)), whole)
    # twice the scale is the same point
    twice = data.flow(2 * z, (2 * start[0], 2 * start[1]), (0.5, 0.0))
    torch.testing.assert_close(2 * twice, whole, rtol=1e-7, atol=1e-9)


@every_data
def test_a_flow_turns_back(data):
    clean = data.sample(0, range(5)).double()
    level = (0.6, 0.8)
    there = data.flow(clean, (1.0, 0.0), level)
    torch.testing.assert_close(data.endpoint(there, *level), clean, rtol=0, atol=1e-7)


@every_data
def test_a_flow_moves_at_the_velocity_of_the_denoiser(data):
    """On the straight path dx/dt = E[eps | x] - E[x0 | x]; levels may be tensors, one a row."""
    x = noised(data, 0.4, 0.6, n=3)
    shape = (3, *[1] * (x.dim() - 1))
    few = {"least_steps": 5} if isinstance(data, GaussianMixture) else {}

    def moved(t):
        t = t.reshape(shape)
        start = torch.full_like(t, 0.4), torch.full_like(t, 0.6)
        return data.flow(x, start, (1 - t, t), **few)

    t = torch.full((3,), 0.6, dtype=torch.float64)
    _, slope = torch.func.jvp(moved, (t,), (torch.ones_like(t),))
    expected = data.eps(x, 0.4, 0.6) - data.x0(x, 0.4, 0.6)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS[1:])
@pytest.mark.parametrize("data", [SMALL[0], SMALL[2]], ids=lambda d: type(d).__name__)
def test_the_posterior_of_the_data_is_that_of_bayes(data, alpha, sigma):
    """p(x0 | x_t) = p(x0) * p(x_t | x0) / p(x_t)."""
    like = {"dtype": torch.float64}
    x, x0 = torch.linspace(-0.9, 0.7, *data.shape, **like), torch.randn(20, *data.shape, **like)
    of_noise = D.Normal(alpha * x0, torch.tensor(sigma, **like)).log_prob(x).sum(-1)
    expected = log_density(data, x0, 1, 0) + of_noise - log_density(data, x[None], alpha, sigma)
    if isinstance(data, Gaussian):
        found = data.posterior(x[None], alpha, sigma)
        density = D.Normal(found.mean, torch.tensor(found.std, **like)).log_prob(x0).sum(-1)
    else:
        density = log_density(data.posterior(x, alpha, sigma), x0, 1, 0)
    torch.testing.assert_close(density, expected, rtol=1e-10, atol=1e-10)


def test_the_total_variance_of_a_mixture_is_that_of_its_samples():
    data = GaussianMixture()
    found = data.sample(0, range(20_000)).var(0).sum().item()
    assert data.total_variance == pytest.approx(found, rel=0.02)


def test_the_mixture_that_every_bar_is_about_stays_the_same():
    data = GaussianMixture()
    centre = torch.tensor(data.weights, dtype=torch.float64) @ data.centres(torch.zeros(0).double())
    assert centre.tolist() == pytest.approx([0.1, 0.285], abs=1e-15)
    assert sum(data.weights) == pytest.approx(1, abs=1e-15)
    assert data.total_variance == pytest.approx(1.699075, rel=1e-14)
    assert (data.std, data.classes) == (0.12, (0, 0, 1, 1, 2, 2))


def test_a_class_is_the_mixture_of_its_modes():
    data, x = GaussianMixture(), noise(3, range(30), (2,), dtype=torch.float64)
    y = torch.arange(30) % 3
    found = data.x0(x, 0.6, 0.8, y), data.eps(x, 0.6, 0.8, y), data.endpoint(x, 0.6, 0.8, label=y)
    for label in range(3):
        own = slice(2 * label, 2 * label + 2)
        weights = torch.tensor(data.weights[own])
        alone = GaussianMixture(data.means[own], tuple((weights / weights.sum()).tolist()))
        rows = y == label
        expected = (f(x[rows], 0.6, 0.8) for f in (alone.x0, alone.eps, alone.endpoint))
        for part, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(part[rows], exact, rtol=0, atol=1e-6)  # float32 weights


def test_samples_of_a_class_are_of_its_modes():
    data, n = GaussianMixture(), 30_000
    y = torch.arange(n) % 3
    x = data.sample(0, range(n), y)
    mode = torch.cdist(x, torch.tensor(data.means)).argmin(1)
    assert torch.equal(mode // 2, y)
    shares = [float((mode == k).sum() / (y == k // 2).sum()) for k in range(6)]
    assert shares == pytest.approx([0.6, 0.4, 4 / 7, 3 / 7, 2 / 3, 1 / 3], abs=0.025)


def test_a_teacher_takes_classes():
    data = GaussianMixture()
    teacher = data.teacher(DDIM(), grids.uniform(3))
    z, y = noise(0, range(6), (2,)), torch.arange(6) % 3
    x0 = teacher.denoiser.given(label=y)(z, 400).x0
    torch.testing.assert_close(x0, data.x0(z, *LinearBeta().at(400), y), rtol=0, atol=1e-5)


def test_no_class_is_the_mixture_of_all_modes():
    data, x = GaussianMixture(), noise(3, range(6), (2,), dtype=torch.float64)
    label = torch.tensor([-1, 0, -1, 1, -1, 2])
    no_class = label == -1
    found, exact = data.eps(x, 0.6, 0.8, label), data.eps(x, 0.6, 0.8)
    torch.testing.assert_close(found[no_class], exact[no_class], rtol=0, atol=1e-12)
    assert (found - exact)[~no_class].abs().amin() > 1e-6


def test_a_conditional_teacher_says_that_it_takes_a_label():
    data = GaussianMixture()
    teacher = data.teacher(DDIM(), grids.uniform(3), conditional=True)
    assert (teacher.net.classes, teacher.net.takes) == (3, ("label",))
    assert data.teacher(DDIM(), grids.uniform(3)).net.classes == 0
    with pytest.raises(ValueError, match="has no classes; leave `conditional` out"):
        Gaussian().teacher(DDIM(), grids.uniform(3), conditional=True)
