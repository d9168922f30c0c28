"""The proof of Drifting."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds.analytic import Gaussian, GaussianMixture
from ds.diffusion.noise import Draws, noise
from ds.methods.base import Progress
from ds.methods.neighbours import Kernel, force
from ds.methods.proof import NOISE, Check, Formula, exact
from ds.pairs.sources import Batch

SHARES = (0.3, 0.8)


def identity(method: Any) -> tuple[Check, ...]:
    """Check the forces of both kernels, and that the loss moves samples along them."""
    laplace, gaussian = (
        replace(method, kernel=kernel, bandwidths=SHARES, guidance=2.5, memory=0, features=None)
        for kernel in ("laplace", "gaussian")
    )
    return *_forces(laplace), *_forces(gaussian), _scores(), _slope(laplace)


def _rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return samples [11, 3] and real rows [7, 3], with their labels."""
    x, real = NOISE[::3], 0.7 * NOISE[1::5].flip(1) + 0.3
    count = torch.arange(len(x), dtype=torch.int64, device="cpu")
    return x, real, count % 3 % 2, count[: len(real)] % 3 % 2


def _forces(method: Any) -> Iterator[Check]:
    x, real, labels, theirs = _rows()
    pulls, pushes = (w.double() for w in method.weights(labels, theirs))

    def found(x: Tensor, real: Tensor, *shares: float) -> Tensor:
        away = torch.cat([x, real])
        return force(x, real, away, (pulls, pushes), method.kernel, shares or SHARES)[0]

    def off(**mistake: bool) -> Tensor:
        return found(x, real) - _written_out(method, **mistake)

    wrong = {"self_not_masked": off(itself=True), "fields_swapped": off(swapped=True)}
    if method.kernel == "laplace":
        wrong["one_softmax_only"] = off(once=True)
    yield exact(f"{method.kernel} force, written out", off(), **wrong)

    turn = torch.linalg.qr(NOISE[:3] + torch.eye(3, dtype=torch.float64, device="cpu"))[0]
    x_moved, real_moved = (3 * rows @ turn - 5 for rows in (x, real))
    yield exact(
        f"{method.kernel} force, rows enlarged and moved",
        found(x_moved, real_moved) - found(x, real) @ turn,
        bandwidths_not_enlarged=found(x_moved, real_moved, *(s / 3 for s in SHARES))
        - found(x, real) @ turn,
    )

    def between(p: Tensor, q: Tensor) -> Tensor:
        pulls, pushes = (x.new_ones(len(x), len(rows)) for rows in (p, q))
        return force(x, p, q, (pulls, pushes), method.kernel, SHARES)[0]

    there, back = between(real, x + 0.1), between(x + 0.1, real)
    yield exact(f"{method.kernel} force there and back", there + back, not_back=2 * there)


def _written_out(
    method: Any, *, itself: bool = False, swapped: bool = False, once: bool = False
) -> Tensor:
    """Return the forces as sums over pairs of rows that pull and push, or with a mistake."""
    x, real, labels, theirs = _rows()
    total, n = torch.zeros_like(x), len(x)
    same, alike = labels[:, None] == theirs, labels[:, None] == labels
    samples = alike if itself else alike & ~torch.eye(n, dtype=torch.bool, device="cpu")
    others = (method.guidance - 1) * samples.sum(1, keepdim=True) / len(real)
    w = torch.cat([same.double(), samples.double(), others.expand(n, len(real)).double()], 1)
    rows = torch.cat([real, x, real])
    d = (x[:, None] - rows).square().sum(2).sqrt()
    mean = (w * d).sum() / w.sum()
    for share in SHARES:
        if method.kernel == "gaussian":
            k = w * (-d.square() / (2 * (share * mean) ** 2)).exp()
            pull, push = k[:, : len(real)], k[:, len(real) :]
            a = torch.cat([part / part.sum(1, keepdim=True) for part in (pull, push)], 1)
        else:
            k = (w > 0) * (-d / (share * mean)).exp()
            rowwise, across = k / k.sum(1, keepdim=True), k / k.sum(0).clamp(min=1e-300)
            a = w * (rowwise if once else (rowwise * across).sqrt())
        pairs = a[:, : len(real), None] * a[:, None, len(real) :]
        apart = rows[: len(real), None] - rows[None, len(real) :]
        moved = (pairs[..., None] * apart).sum((1, 2)) / mean * 3**0.5
        if method.kernel == "laplace":
            moved = moved / moved.square().mean().sqrt()
        total = total + moved
    return -total if swapped else total


def _scores() -> Check:
    """Between normal laws, by quadrature, the Gaussian force is the difference of mean shifts."""
    laws = Gaussian(0.3, 0.4, (1,)), Gaussian(-0.2, 1.1, (1,))
    nodes = torch.linspace(-12, 12, 1201, dtype=torch.float64, device="cpu")[:, None]
    x = NOISE[::4, :1]
    density = [(-((nodes.T - law.mean) ** 2) / (2 * law.std**2)).exp() / law.std for law in laws]
    weights = density[0].expand(len(x), -1), density[1].expand(len(x), -1)

    def off(kernel: Kernel, sign: float = 1.0, share: float = 0.3) -> Tensor:
        found, mean = force(x, nodes, nodes, weights, kernel, (share,))
        tau = 0.3 * mean
        p, q = (tau**2 * law.score(x, 1, tau) for law in laws)
        return found * mean - sign * (p - q)

    return exact(
        "mean shifts beside tau^2 * score",
        off("gaussian"),
        sign_flipped=off("gaussian", -1),
        laplace=off("laplace"),
        another_bandwidth=off("gaussian", share=0.4),
    )


def _slope(method: Any) -> Check:
    """A small step down the loss moves the samples along the forces."""
    _, real, _, theirs = _rows()
    z, index = NOISE[:7], torch.arange(7, dtype=torch.int64, device="cpu")
    batch = Batch(real, z, index, Draws(0, index), {"label": theirs})
    made = (0.5 * z - 0.1).requires_grad_()
    # The student is the noise minus this.
    modules = nn.ModuleDict({"student": Formula(lambda x, t, label: z - made)})
    method = replace(method, generator=type(method.generator)())
    slope = torch.autograd.grad(method.loss(modules, batch, Progress(0, 1)), made)[0]
    pulls, pushes = (w.double() for w in method.weights(theirs, theirs))
    x = made.detach()
    found, scale = force(x, real, torch.cat([x, real]), (pulls, pushes), method.kernel, SHARES)
    down = -slope * scale * x.numel() / 2
    return exact("step down the loss beside the force", down - found, uphill=down + found)


def measure(method: Any) -> tuple[Check, ...]:
    """Compare forces of many samples with scores, in the plane and in 64 dimensions."""
    return shifts(200_000), far()


def shifts(count: int) -> Check:
    """Compare the mean shift to samples of the mixture with its score: only itself pushes a row."""
    data = GaussianMixture()
    real, x = data.sample(5, range(count)), noise(7, range(64), data.shape)
    weights = x.new_ones(len(x), count), torch.eye(len(x), dtype=x.dtype, device="cpu")

    def off(kernel: Kernel, share: float) -> float:
        found, scale = force(x, real, x, weights, kernel, (share,))
        tau = float(0.3 * scale * 2**0.5)
        wanted = tau**2 * data.score(x, 1, tau)
        found = found * scale if kernel == "gaussian" else _scaled(found, wanted)
        return float((found - wanted).norm() / wanted.norm())

    wrong = {"laplace kernel": off("laplace", 0.3), "bandwidth off by 10%": off("gaussian", 0.33)}
    return Check("mean shift of samples beside the score", off("gaussian", 0.3), 0.01, wrong)


def far(count: int = 2000) -> Check:
    """Compare how far the Laplace force is from scores in 64 dimensions and in the plane."""

    def off(size: int) -> float:
        laws = Gaussian(0.5, 0.7, (size,)), Gaussian(0.0, 1.0, (size,))
        real, away = (law.sample(5 + k, range(count)) for k, law in enumerate(laws))
        x = laws[1].sample(7, range(64))
        ones = x.new_ones(len(x), count)
        found, scale = force(x, real, away, (ones, ones), "laplace", (0.5,))
        tau = float(0.5 * scale * size**0.5)
        wanted = laws[0].score(x, 1, tau) - laws[1].score(x, 1, tau)
        return float((_scaled(found, wanted) - wanted).norm() / wanted.norm())

    plane = off(2)
    return Check("laplace force beside scores, 64-D", off(64), 0.5 * plane, {"plane": plane})


def _scaled(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the multiple of a force that comes nearest to what is wanted."""
    return found * (found * wanted).sum() / found.square().sum()
