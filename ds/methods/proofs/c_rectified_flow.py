"""The proof of CRectifiedFlow."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds.diffusion.noise import Draws
from ds.methods.base import Progress
from ds.methods.proof import NORMAL, Check, Formula, exact, normal_pairs
from ds.nets.potential import Potential, fenchel_young
from ds.pairs.sources import AbstractSource, Batch, Noise

# Points z of standard noise coupled with x0 = L R z: a rotation by 90 degrees, then the root of a
# covariance. Lines between them hardly cross, and yet the coupling is far from optimal.
COVARIANCE = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64, device="cpu")
_LEFT = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64, device="cpu")
ROTATED = torch.linalg.cholesky(COVARIANCE) @ _LEFT
# The least E|noise - x0|**2: tr(1) + tr(COVARIANCE) - 2 tr(its root).
OPTIMUM = float(2 + 2 - 2 * torch.linalg.eigvalsh(COVARIANCE).sqrt().sum())


class Rotated(AbstractSource):
    """Pairs of fresh noise and ROTATED times it."""

    feeds = "pairs"

    def __init__(self, seed: int, count: int):
        self.noise = Noise(count, (2,), seed=seed)

    def __len__(self) -> int:
        return len(self.noise)

    def read(self, rows: Sequence[int]) -> Tensor:
        return self.noise.read(rows)

    def indices(self, rows: Sequence[int], draws: Sequence[int]) -> Tensor:
        return self.noise.indices(rows, draws)

    def prepare(self, images: Tensor, indices: Tensor, draws: Draws) -> Batch:
        batch = self.noise.prepare(images, indices, draws)
        return batch._replace(x0=batch.noise @ ROTATED.T.to(batch.noise))

    def fingerprint(self) -> str:
        return f"rotated {self.noise.fingerprint()}"


def measure(method: Any, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
    """Check what the coupling of Rotated has become: its cost, and that of x0 as before."""
    x0 = method.sample(net, z, nfe=100)
    cost = float((z - x0).square().sum(1).mean())
    off, before = (float((x.T.cov() - COVARIANCE).abs().max()) for x in (x0, z))
    return (
        Check("cost of the coupling", cost, 1.2, floor=OPTIMUM, miss=5.0),
        Check("error of the covariance", off, 0.15, {"the noise's": before}),
    )


def identity(method: Any) -> tuple[Check, ...]:
    """With the potential of a coupling that is optimal, the loss vanishes.

    For the quadratic cost that is the coupling of NORMAL, for the quartic one a mere factor.
    """
    pairs, factor = normal_pairs(), 0.3
    shrunk = pairs._replace(x0=factor * pairs.noise)

    def straight(x: Tensor, told: Tensor) -> Tensor:
        t = told[:, None] / method.time_scale
        start = (x - (1 - t) * NORMAL.mean) / ((1 - t) * NORMAL.std + t)
        return start - NORMAL.endpoint(start, 0, 1)

    def affine(x: Tensor, told: Tensor) -> Tensor:  # its potential has the slope `straight`
        return straight(x, told) + straight(0 * x, told)

    def cubic(x: Tensor, told: Tensor) -> Tensor:  # the same for the quartic cost and the factor
        t = told[:, None] / method.time_scale
        v = (1 - factor) * x / ((1 - t) * factor + t)
        return v * v.square().mean(1, keepdim=True) / 2

    def loss(cost: Any, formula: Any, rows: Batch) -> Tensor:
        modules = nn.ModuleDict({"student": Potential(Formula(formula), cost)})
        return replace(method, cost=cost).loss(modules, rows, Progress(0, 1))

    def shuffled(rows: Batch) -> Batch:
        return rows._replace(x0=rows.x0.roll(1, 0))

    end, right = pairs.x0, Potential(Formula(affine))
    return (
        exact(
            "quadratic loss of straight pairs",
            loss("quadratic", affine, pairs),
            pairs_shuffled=loss("quadratic", affine, shuffled(pairs)),
            sign_of_velocity=loss("quadratic", lambda x, t: -affine(x, t), pairs),
        ),
        exact(
            "quartic loss of straight pairs",
            loss("quartic", cubic, shrunk),
            pairs_shuffled=loss("quartic", cubic, shuffled(shrunk)),
            potential_of_the_other_cost=loss("quartic", affine, pairs),
        ),
        exact(
            "quadratic loss - square / 2",
            fenchel_young(end, pairs.noise, "quadratic") - (end - pairs.noise).square().mean(1) / 2,
            quartic_loss=fenchel_young(end, pairs.noise, "quartic")
            - (end - pairs.noise).square().mean(1) / 2,
        ),
        exact(
            "slope of the quartic loss in 1-D",
            _slope(lambda v: v**3),
            potential_of_the_other_cost=_slope(lambda v: v),
            velocity_too_small=_slope(lambda v: (0.9 * v) ** 3),
        ),
        exact(
            "end of 3 steps",
            method.sample(right, pairs.noise, nfe=3) - end,
            network_itself=method.sample(right.net, pairs.noise, nfe=3) - end,
        ),
    )


def _slope(gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the slope of the quartic loss where the velocity of points is the mean one.

    In one dimension every cost has that velocity, and so every potential: f' = c'(v). Four rows
    with data and noise at plus and minus one deviation have the moments of all normal ones.
    """
    one = torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu")
    t = torch.linspace(0.1, 0.9, 16, dtype=torch.float64, device="cpu")[:, None]
    x0, z = (one.mul(0.5).repeat(2).repeat(16, 1), one.repeat_interleave(2).repeat(16, 1))
    x = (1 - t) * x0 + t * z
    mean = (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2) * x
    off = torch.zeros(2, dtype=torch.float64, device="cpu", requires_grad=True)
    p = gradient(mean) + off[0] * x + off[1]
    rows = fenchel_young(p.reshape(-1, 1), (z - x0).reshape(-1, 1), "quartic")
    return torch.autograd.grad(rows.mean(), off)[0]
