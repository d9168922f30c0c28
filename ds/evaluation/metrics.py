"""Distances between two sets of samples, and scores of matched pairs.

Every function takes whole sets, computes in float64 and returns Python numbers. Nothing is
drawn at random except fixed directions from an explicit seed, and sums over pairs run over
blocks of a fixed size, so the same two sets always give the same figure. A distance to an
independent sample of the same distribution is not zero: print that floor next to the score.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SPLITS = 10  # of an Inception Score
NEAREST = 3  # neighbours that a ball of precision and recall reaches to
_BLOCK = 2048  # rows; one block of pairs in float64 is 32 MiB
_CHUNK = 256  # MiB of distances that precision and recall hold at a time


class PrecisionRecall(NamedTuple):
    """Fidelity (fakes that look real) and coverage (reals the fakes can reach), both in [0, 1]."""

    precision: float
    recall: float


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians fitted to two sets of features.

    x is [N, D], y is [M, D]; the covariances are the unbiased ones (N - 1). On the pool3
    features of the Inception network this is FID. Heusel et al. 2017, arXiv:1706.08500, Eq. 6.
    Raises ValueError for fewer than two samples, unlike widths, and features not finite.
    """
    x, y = _checked("frechet_distance", x, y)
    return frechet_distance_from_moments(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


def frechet_distance_from_moments(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Return |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)).

    The means are [D], the symmetric covariances [D, D], which may be singular. With
    cov1 = R R^T the product has the eigenvalues of the symmetric R^T cov2 R, so that no root of
    a matrix without symmetry is needed.
    Dowson & Landau 1982, "The Frechet distance between multivariate normal distributions".
    Raises ValueError for unlike shapes and for moments that are not finite.
    """
    size = mu1.numel()
    for moment, shape in ((mu1, (size,)), (mu2, (size,)), (cov1, (size,) * 2), (cov2, (size,) * 2)):
        if moment.shape != shape:
            raise ValueError(
                f"frechet_distance: a moment has shape {tuple(moment.shape)} where {shape} is "
                "needed; means are [D] and covariances [D, D]"
            )
        if not moment.isfinite().all():
            raise ValueError("frechet_distance: a mean or covariance is not finite")
    mu1, cov1, mu2, cov2 = (moment.double() for moment in (mu1, cov1, mu2, cov2))
    factor = _factor(cov1)
    root_trace = torch.linalg.eigvalsh(factor.T @ cov2 @ factor).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root_trace)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    x is [N, D], y is [M, D]. On Inception features this is KID: here over all pairs, where
    other tools average random subsets. Unbiased, so slightly negative for like sets.
    Gretton et al. 2012, JMLR 13, Eq. 3, with the kernel of Binkowski et al. 2018,
    arXiv:1801.01401, section 4.
    Raises ValueError for fewer than two samples, unlike widths, and features not finite.
    """
    x, y = _checked("kernel_distance", x, y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(features: Tensor) -> Tensor:
        itself = ((features.square().sum(1) / features.shape[1] + 1) ** 3).sum()
        n = len(features)
        return (_pair_sum(kernel, features, features) - itself) / (n * (n - 1))

    across = _pair_sum(kernel, x, y) / (len(x) * len(y))
    return float(within(x) + within(y) - 2 * across)


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Return the mean and the standard deviation over splits of exp(E KL(p(y|x) | p(y))).

    logits is [N, K]; each split is a run of consecutive rows with its own marginal p(y).
    Salimans et al. 2016, arXiv:1606.03498, section 4. Raises ValueError for fewer rows than splits.
    """
    score = InceptionScore(len(logits), splits)
    score.add(logits)
    return score.result()


class InceptionScore:
    """The inception_score of n rows of logits that come in parts."""

    def __init__(self, n: int, splits: int = SPLITS):
        self._n = n
        self._ends = [n // splits * i + min(i, n % splits) for i in range(1, splits + 1)]
        self._marginals: list[Tensor | float] = [0.0] * splits
        self._entropies: list[Tensor | float] = [0.0] * splits
        self.count = 0  # of rows so far

    def add(self, logits: Tensor) -> None:
        """Add rows of logits [N, K]."""
        begin = self.count
        for i, (start, end) in enumerate(pairwise([0, *self._ends])):
            part = logits[max(start - begin, 0) : max(end - begin, 0)].double().softmax(1)
            self._marginals[i] = self._marginals[i] + part.sum(0)
            self._entropies[i] = self._entropies[i] + torch.special.entr(part).sum()
        self.count += len(logits)

    def result(self) -> tuple[float, float]:
        """Return the mean and the standard deviation; ValueError for fewer rows than splits."""
        if self._n < len(self._ends):
            raise ValueError(
                f"inception_score: {self._n} rows cannot make {len(self._ends)} splits"
            )
        scores = []
        for i, (start, end) in enumerate(pairwise([0, *self._ends])):
            # The mean of KL(p | q), with q the mean of p, is the entropy of q less that of p.
            marginal = torch.as_tensor(self._marginals[i]) / (end - start)
            own = torch.as_tensor(self._entropies[i]) / (end - start)
            scores.append((torch.special.entr(marginal).sum() - own).exp())
        return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return the unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'|.

    x is [N, D], y is [M, D]. Zero in the mean for like sets, so slightly negative about half
    the time: a sample's distance to itself is left out. No root is taken.
    Szekely & Rizzo 2013, "Energy statistics", J. Stat. Plan. Inference 143.
    Raises ValueError for fewer than two samples, unlike widths, and values not finite.
    """
    x, y = _checked("energy_distance", x, y)

    def within(samples: Tensor) -> Tensor:
        return _pair_sum(_distances, samples, samples) / (len(samples) * (len(samples) - 1))

    across = _pair_sum(_distances, x, y) / (len(x) * len(y))
    return float(2 * across - within(x) - within(y))


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Return the root mean square of the 1-D 2-Wasserstein distances along random directions.

    x is [N, D], y is [M, D]. The directions are uniform on the sphere and depend on seed, D and
    projections only; each 1-D distance is exact, for N unlike M too.
    Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    Raises ValueError for no samples, unlike widths, values not finite and projections < 1.
    """
    x, y = _checked("sliced_wasserstein", x, y, least=1)
    if projections < 1:
        raise ValueError(f"sliced_wasserstein: projections must be at least 1, not {projections}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(
        x.shape[1], projections, generator=generator, dtype=torch.float64, device="cpu"
    )
    directions = (directions / directions.norm(dim=0)).to(x.device)
    x, y = (x @ directions).sort(0).values, (y @ directions).sort(0).values
    # Both quantile functions are steps; `level` holds where either one jumps, in units of 1/(NM),
    # as integers, so that no rounding can pair the wrong samples.
    n, m = len(x), len(y)
    steps = (
        torch.arange(1, count + 1, dtype=torch.int64, device="cpu") * other
        for count, other in ((n, m), (m, n))
    )
    level = torch.cat([*steps]).unique().to(x.device)
    width = level.diff(prepend=level.new_zeros(1)).double() / (n * m)
    gap = x[(level - 1) // m] - y[(level - 1) // n]  # [levels, projections]
    return float((width @ gap.square()).mean().sqrt())


def precision_recall(real: Tensor, fake: Tensor, k: int = NEAREST) -> PrecisionRecall:
    """Return the improved precision and recall of fake [M, D] against real [N, D].

    A sample is covered by a set if it lies in the ball of one of its members, which reaches to
    that member's k-th nearest other member. Precision is the share of fakes covered by the
    reals, recall the share of reals covered by the fakes.
    Kynkaanniemi et al. 2019, arXiv:1904.06991, Eqs. 1 and 2.
    Raises ValueError for k < 1, k samples or fewer, unlike widths, and features not finite.
    """
    if k < 1:
        raise ValueError(f"precision_recall: k must be at least 1, not {k}")
    real, fake = _checked("precision_recall", real, fake, least=k + 1)
    return PrecisionRecall(precision=_covered(fake, real, k), recall=_covered(real, fake, k))


def r2(prediction: Tensor, target: Tensor) -> float:
    """Return the share of variance explained, 1 - |p - t|^2 / |t - mean t|^2.

    Both are [N, ...]; the sums run over the whole set and the mean over its N rows. 1 is
    perfect, 0 is no better than the mean target, and there is no lower end.
    Raises ValueError for unlike shapes, and for targets that are all alike.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"r2: prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must "
            "have the same shape"
        )
    prediction, target = prediction.double(), target.double()
    spread = (target - target.mean(0)).square().sum()
    if not spread > 0:
        raise ValueError(f"r2: the targets vary by {float(spread)}; give at least two that differ")
    return float(1 - (prediction - target).square().sum() / spread)


def mode_agreement(a: Tensor, b: Tensor, means: Tensor) -> float:
    """Return the share of rows of a and b [N, D] whose nearest mean [K, D] is the same.

    It scores pairs: a generator with the right distribution but the wrong map from noise to
    sample does no better than chance. Raises ValueError for unlike shapes and no rows.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"mode_agreement: {tuple(a.shape)} and {tuple(b.shape)} must be the same shape [N, D]"
        )
    a, means = _checked("mode_agreement", a, means, least=1)
    b, means = _checked("mode_agreement", b, means, least=1)
    return float((_distances(a, means).argmin(1) == _distances(b, means).argmin(1)).double().mean())


def _checked(name: str, x: Tensor, y: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Return both sets in float64 [N, D] and [M, D], or raise ValueError."""
    for features in (x, y):
        if features.dim() != 2 or not features.is_floating_point():
            raise ValueError(
                f"{name}: needs float tensors [N, D], not {features.dtype} {tuple(features.shape)}"
            )
        if len(features) < least:
            raise ValueError(f"{name}: needs {least} samples or more a set, not {len(features)}")
        bad = (~features.isfinite().all(1)).nonzero()
        if len(bad):
            raise ValueError(f"{name}: {len(bad)} rows are not finite, the first is {int(bad[0])}")
    if x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"{name}: both sets must have the same width D > 0, not {x.shape[1]} and {y.shape[1]}"
        )
    return x.double(), y.double()


def _pair_sum(pairwise: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of pairwise(x_i, y_j) over all i and j, holding one block of pairs."""
    blocks = (pairwise(a, b).sum() for a in x.split(_BLOCK) for b in y.split(_BLOCK))
    return torch.stack(list(blocks)).sum()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Squared norms minus products would be faster, but loses the small distances to cancellation.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _factor(cov: Tensor) -> Tensor:
    """Return R [D, rank] with cov = R R^T."""
    values, vectors = torch.linalg.eigh(cov)
    # A singular covariance has rounding errors in place of zeros, whose roots are not small.
    keep = values > len(cov) * torch.finfo(cov.dtype).eps * values[-1]
    return vectors[:, keep] * values[keep].sqrt()


def _covered(samples: Tensor, members: Tensor, k: int) -> float:
    """Return the share of samples inside the union of the members' k-th neighbour balls."""
    centre = members.mean(0)
    others, own = samples - centre, members - centre
    rows = max(1, _CHUNK * 2**20 // (8 * len(own)))
    # A member is the nearest to itself, or as near as its copies are.
    nearest = [_products(part, own).kthvalue(k + 1).values for part in own.split(rows)]
    # Distances here are roots of differences of squared norms, so that of a copy is not quite
    # zero. Without this slack a member with k twins, whose ball is a point, would miss them.
    eps = torch.finfo(torch.float64).eps
    slack = (eps * own.shape[1]) ** 0.5 * own.square().sum(1).max().sqrt()
    radii = torch.cat(nearest) + slack
    inside = [(_products(part, own) <= radii).any(1).sum() for part in others.split(rows)]
    return float(torch.stack(inside).sum()) / len(samples)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return the distances of rows [N, M] by a matrix product, fast where D is large."""
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")
