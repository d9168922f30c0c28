import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.metrics import pairwise_distances, r2_score
from sklearn.neighbors import NearestNeighbors

from ds.evaluation import metrics

SETS = [
    metrics.frechet_distance,
    metrics.kernel_distance,
    metrics.energy_distance,
    metrics.sliced_wasserstein,
    metrics.precision_recall,
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size, rank, seed):
    root = normal(size, rank, seed=seed)
    return root @ root.T / rank


# The exact value, from the singular values of the centred data, of which the covariance is not
# formed: sets smaller than their width are where covariances are singular.
def frechet_of_small_sets(x, y):
    a, b = x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    overlap = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt(n * m)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return float(shift + a.square().sum() / n + b.square().sum() / m - 2 * overlap)


def naive_kernel_distance(x, y):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(rows):
        values = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(values) / len(values)

    x, y = x.tolist(), y.tolist()
    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * across


def naive_energy_distance(x, y):
    def within(rows):
        values = [math.dist(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(values) / len(values)

    x, y = x.tolist(), y.tolist()
    across = sum(math.dist(a, b) for a in x for b in y) / (len(x) * len(y))
    return 2 * across - within(x) - within(y)


def naive_covered(samples, members, k):
    samples, members = samples.tolist(), members.tolist()
    radii = [sorted(math.dist(m, other) for other in members)[k] for m in members]
    inside = [
        any(math.dist(s, m) <= r for m, r in zip(members, radii, strict=True)) for s in samples
    ]
    return sum(inside) / len(inside)


def test_frechet_distance_of_standard_gaussians_is_eight():
    zero, one, eye = torch.zeros(4), torch.ones(4), torch.eye(4)
    assert metrics.frechet_distance_from_moments(zero, eye, one, 4 * eye) == pytest.approx(8, 1e-14)


def test_frechet_distance_of_commuting_covariances_is_closed_form():
    basis = torch.linalg.qr(normal(5, 5)).Q
    a, b = torch.tensor([4.0, 1, 9, 16, 0]).double(), torch.tensor([1.0, 25, 4, 0, 0]).double()
    expected = float((a.sqrt() - b.sqrt()).square().sum()) + 5 * 0.25
    got = metrics.frechet_distance_from_moments(
        torch.zeros(5), basis * a @ basis.T, torch.full((5,), 0.5), basis * b @ basis.T
    )
    assert got == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_agrees_with_scipy_and_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    cov1, cov2 = covariance(24, 40, seed=1), covariance(24, 30, seed=2)
    mu1, mu2 = normal(24, seed=3), normal(24, seed=4)
    got = metrics.frechet_distance_from_moments(mu1, cov1, mu2, cov2)
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy())
    traces = float(cov1.trace() + cov2.trace()) - 2 * float(np.trace(root).real)
    assert got == pytest.approx(float((mu1 - mu2).square().sum()) + traces, rel=1e-10)
    assert got == pytest.approx(float(_compute_fid(mu1, cov1, mu2, cov2)), rel=1e-10)


def test_frechet_distance_fits_the_unbiased_moments():
    x, y = normal(60, 6, seed=1), 2 * normal(45, 6, seed=2) + 1
    moments = [m for s in (x, y) for m in (s.mean(0), torch.from_numpy(np.cov(s.numpy().T)))]
    expected = metrics.frechet_distance_from_moments(*moments)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rows", [2, 5, 50])
def test_frechet_distance_survives_singular_covariances(rows):
    x, y = normal(rows, 80, seed=1).exp(), normal(60, 80, seed=2).exp()
    expected = frechet_of_small_sets(x, y)
    # A root of a rounded zero is about 1e-8 times the largest eigenvalue.
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-7)
    assert metrics.frechet_distance(y, x) == pytest.approx(expected, rel=1e-7)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_constant_sets_is_that_of_their_means():
    assert metrics.frechet_distance(torch.zeros(9, 3), torch.ones(5, 3)) == pytest.approx(3)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ((torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4)), r"\(4,\) where \(3,\)"),
        ((torch.zeros(3), torch.eye(2), torch.zeros(3), torch.eye(3)), r"\(2, 2\) where \(3, 3\)"),
        ((torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2) / 0), "not finite"),
    ],
)
def test_frechet_distance_refuses_wrong_moments(moments, message):
    with pytest.raises(ValueError, match=message):
        metrics.frechet_distance_from_moments(*moments)


def test_kernel_distance_agrees_with_the_naive_sum():
    x, y = normal(23, 7, seed=1), normal(31, 7, seed=2).abs()
    assert metrics.kernel_distance(x, y) == pytest.approx(naive_kernel_distance(x, y), rel=1e-10)


def test_kernel_distance_agrees_with_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(80, 20, seed=1).abs(), normal(80, 20, seed=2).abs() + 0.1
    assert metrics.kernel_distance(x, y) == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)


def test_kernel_distance_has_no_bias():
    # Of 400 pairs of tiny sets; with the diagonal left in, the mean would be near +1.4.
    figures = [
        metrics.kernel_distance(normal(5, 4, seed=2 * i), normal(5, 4, seed=2 * i + 1))
        for i in range(400)
    ]
    assert abs(np.mean(figures)) < 4 * np.std(figures) / math.sqrt(len(figures))


def test_energy_distance_agrees_with_the_naive_sum():
    x, y = normal(23, 3, seed=1), normal(31, 3, seed=2) + 0.5
    assert metrics.energy_distance(x, y) == pytest.approx(naive_energy_distance(x, y), rel=1e-12)


def test_energy_distance_of_points_is_twice_their_distance():
    assert metrics.energy_distance(torch.zeros(3, 1), torch.full((4, 1), 2.5)) == 5


def test_energy_distance_of_shifted_gaussians_is_closed_form():
    shift = 2.0
    # X - Y is N(shift, 2), and E|N(m, s^2)| = s sqrt(2/pi) exp(-m^2/2s^2) + m erf(m/(s sqrt 2)).
    across = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    expected = 2 * across - 4 / math.sqrt(math.pi)
    got = metrics.energy_distance(normal(4000, 1, seed=1), normal(4000, 1, seed=2) + shift)
    assert got == pytest.approx(expected, abs=0.1)  # the standard error is about 0.03


def test_sliced_wasserstein_of_shifted_samples_is_the_shift():
    x = normal(500, 1)
    assert metrics.sliced_wasserstein(x, x + 0.75) == pytest.approx(0.75, rel=1e-12)
    # In D dimensions a direction sees the shift times its cosine, 1/D in the mean of squares.
    x, shift = normal(100, 16), normal(16, seed=1)
    got = metrics.sliced_wasserstein(x, x + shift, projections=20000)
    assert got == pytest.approx(float(shift.norm()) / 4, rel=0.03)


def test_sliced_wasserstein_of_scaled_gaussians_is_the_difference_of_scales():
    got = metrics.sliced_wasserstein(normal(20000, 2, seed=1), 3 * normal(20000, 2, seed=2))
    assert got == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 8), (7, 5), (1, 9)])
def test_sliced_wasserstein_of_unlike_sizes_is_that_of_repeated_samples(n, m):
    x, y = normal(n, 3, seed=1), normal(m, 3, seed=2)
    alike = metrics.sliced_wasserstein(x.repeat_interleave(m, 0), y.repeat(n, 1))
    assert metrics.sliced_wasserstein(x, y) == pytest.approx(alike, rel=1e-12)


def test_sliced_wasserstein_depends_on_its_seed_and_leaves_the_global_one_alone():
    x, y = normal(50, 8, seed=1), normal(50, 8, seed=2) * torch.arange(8)
    before = torch.get_rng_state()
    first, again, other = (metrics.sliced_wasserstein(x, y, 4, seed=s) for s in (3, 3, 4))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("width", [2, 20])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_agrees_with_brute_force(width, k):
    real, fake = normal(70, width, seed=1), 0.9 * normal(50, width, seed=2)
    fake[:, 0] += 2
    got = metrics.precision_recall(real, fake, k)
    assert got == (naive_covered(fake, real, k), naive_covered(real, fake, k))
    assert 0 < got.recall < got.precision < 1


@pytest.mark.parametrize("chunk", [0, 256])  # MiB: a row at a time, or all of them
def test_precision_recall_agrees_with_scikit_learn(chunk, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    sets = {"recall": normal(300, 64, seed=1), "precision": 0.9 * normal(200, 64, seed=2)}
    got = metrics.precision_recall(*sets.values(), k=3)
    for name, samples, members in zip(sets, sets.values(), reversed(sets.values()), strict=True):
        radii = NearestNeighbors(n_neighbors=3).fit(members).kneighbors()[0][:, -1]
        inside = (pairwise_distances(samples, members) <= radii).any(1)
        assert getattr(got, name) == inside.mean()


def test_a_lost_mode_costs_recall_and_not_precision():
    fake = normal(400, 2, seed=2)
    real = torch.cat([normal(400, 2, seed=1), normal(400, 2, seed=3) + 50])
    got = metrics.precision_recall(real, fake)
    assert got.precision > 0.9
    assert got.recall == pytest.approx(0.5, abs=0.05)


def test_precision_recall_does_not_see_a_common_shift():
    real, fake = normal(70, 20, seed=1), 1.5 * normal(50, 20, seed=2)
    shifted = metrics.precision_recall(real + 1e7, fake + 1e7)
    assert shifted == metrics.precision_recall(real, fake)


@pytest.mark.parametrize("offset", [0, 1000])
def test_precision_recall_counts_copies_as_covered(offset):
    # With k twins a ball is a single point, which only its own copies lie in.
    real = normal(100, 64).repeat_interleave(4, 0) + offset
    assert metrics.precision_recall(real, real.flip(0)) == (1, 1)


def test_r2_agrees_with_scikit_learn():
    target = normal(40, 2, 3, seed=1)
    prediction = target + 0.4 * normal(40, 2, 3, seed=2)
    expected = r2_score(
        target.flatten(1).numpy(), prediction.flatten(1).numpy(), multioutput="variance_weighted"
    )
    assert metrics.r2(prediction, target) == pytest.approx(expected, rel=1e-12)
    assert metrics.r2(target, target) == 1
    assert metrics.r2(target.mean(0).expand(40, 2, 3), target) == pytest.approx(0, abs=1e-12)


def test_r2_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match=r"\(3, 2\) and target \(3, 1\)"):
        metrics.r2(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="at least two that differ"):
        metrics.r2(torch.zeros(3, 2), torch.ones(3, 2))


def test_mode_agreement_counts_pairs_in_the_same_mode():
    means = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    a = means[[0, 1, 2, 2]] + 0.5
    b = means[[0, 1, 0, 2]] - 0.5
    assert metrics.mode_agreement(a, b, means) == 0.75
    assert metrics.mode_agreement(a, a, means) == 1


def test_one_pair_has_a_mode_too():
    means = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert metrics.mode_agreement(means[:1] + 0.1, means[:1], means) == 1
    with pytest.raises(ValueError, match="mode_agreement"):
        metrics.mode_agreement(means[:0], means[:0], means)


@pytest.mark.parametrize(("n", "splits"), [(11, 3), (12, 4), (5, 5), (7, 1)])
def test_the_inception_score_is_its_formula_over_runs_of_rows(n, splits):
    """The first splits have a row more; the deviation is that of all splits, not a sample's."""
    p, scores = (3 * normal(n, 4)).softmax(1), []
    for part in p.tensor_split(splits):
        kl = (part * (part / part.mean(0)).log()).sum(1)
        scores.append(kl.mean().exp().item())
    mean, deviation = metrics.inception_score(p.log(), splits)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert deviation == pytest.approx(np.std(scores), rel=1e-9, abs=1e-12)
    with pytest.raises(ValueError, match=f"{n} rows cannot make {n + 1} splits"):
        metrics.inception_score(p.log(), n + 1)


def test_mode_agreement_of_unrelated_pairs_is_chance():
    means = normal(4, 2) * 10
    labels = torch.randint(4, (2, 4000), generator=torch.Generator().manual_seed(0))
    assert metrics.mode_agreement(*means[labels], means) == pytest.approx(0.25, abs=0.03)


def test_mode_agreement_refuses_unlike_shapes():
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 2\)"):
        metrics.mode_agreement(torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="same width"):
        metrics.mode_agreement(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(5, 3))


@pytest.mark.parametrize("metric", SETS)
def test_order_of_samples_does_not_matter(metric):
    x, y = normal(60, 5, seed=1), normal(50, 5, seed=2).exp()
    shuffled = metric(x.flip(0), y.roll(7, 0))
    assert shuffled == pytest.approx(metric(x, y), rel=1e-10)


@pytest.mark.parametrize("metric", [metrics.kernel_distance, metrics.energy_distance])
def test_block_size_does_not_matter(metric, monkeypatch):
    x, y = normal(60, 5, seed=1), normal(50, 5, seed=2).exp()
    whole = metric(x, y)
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    assert metric(x, y) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("metric", SETS)
def test_same_figure_twice_and_for_float32(metric):
    x, y = normal(60, 5, seed=1).float(), normal(50, 5, seed=2).float() + 1
    assert metric(x, y) == metric(x, y) == metric(x.double(), y.double())


@pytest.mark.parametrize("metric", SETS[:4])
def test_floor_of_like_sets_is_far_below_a_small_change(metric):
    reference, same = normal(2000, 4, seed=1), normal(2000, 4, seed=2)
    shrunk = 0.7 * same
    assert abs(metric(reference, same)) < 0.25 * metric(reference, shrunk)


@pytest.mark.parametrize("metric", SETS)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(9, 3), torch.zeros(9, 4), "not 3 and 4"),
        (torch.zeros(9, 0), torch.zeros(9, 0), "D > 0"),
        (torch.zeros(0, 3), torch.zeros(9, 3), "not 0"),
        (torch.zeros(9, 3), torch.zeros(9), r"\(9,\)"),
        (torch.zeros(9, 3).long(), torch.zeros(9, 3), "torch.int64"),
        (torch.zeros(9, 3), torch.tensor([[0.0], [math.nan]]).expand(2, 3), "first is 1|needs 4"),
        (torch.full((9, 3), math.inf), torch.zeros(9, 3), "9 rows are not finite"),
    ],
)
def test_wrong_features_are_refused(metric, x, y, message):
    with pytest.raises(ValueError, match=f"{metric.__name__}: .*({message})"):
        metric(x, y)


@pytest.mark.parametrize("metric", SETS[:3])
def test_one_sample_is_refused_where_a_spread_is_needed(metric):
    with pytest.raises(ValueError, match="needs 2 samples or more a set, not 1"):
        metric(torch.zeros(5, 3), torch.zeros(1, 3))


def test_wrong_settings_are_refused():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="projections must be at least 1, not 0"):
        metrics.sliced_wasserstein(x, x, projections=0)
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        metrics.precision_recall(x, x, k=0)
    with pytest.raises(ValueError, match="needs 4 samples or more a set, not 3"):
        metrics.precision_recall(x, x, k=3)
