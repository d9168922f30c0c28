"""Scores of samples against a closed-form truth, each beside its floor and its control."""

from typing import NamedTuple

import torch
from torch import Tensor

from ds.analytic import AbstractData, GaussianMixture
from ds.evaluation.metrics import energy_distance, mode_agreement, r2, sliced_wasserstein


class Score(NamedTuple):
    """One figure with what a perfect result and a worthless one would have got."""

    name: str
    value: float
    floor: float
    control: float


def scores(data: AbstractData, z: Tensor, output: Tensor, target: Tensor) -> list[Score]:
    """Judge a generator on points: output and target [N, D] for the same noise z [N, D].

    Distribution: sliced Wasserstein and energy distance to exact samples. The floor is exact
    samples against exact samples, the control the noise itself. Pairing: R2 and, for a mixture,
    the share of points in the mode of their target. The floor is perfect, the control compares
    each output with its neighbour's target.
    """
    n = len(z)
    exact, again = data.sample(1, range(n)), data.sample(2, range(n))
    shuffled = target.roll(1, 0)
    rows = [
        Score(f.__name__, f(output, exact), f(again, exact), f(z, exact))
        for f in (sliced_wasserstein, energy_distance)
    ]
    rows.append(Score("r2", r2(output, target), 1.0, r2(output, shuffled)))
    if isinstance(data, GaussianMixture):
        centres = data.centres(output)
        agree, control = (mode_agreement(output, t, centres) for t in (target, shuffled))
        rows.append(Score("mode_agreement", agree, 1.0, control))
    return rows


def table(rows: list[Score]) -> str:
    """Lay scores out as text, one a line."""
    lines = [f"{'':20}{'value':>10}{'floor':>10}{'control':>10}"]
    lines += [f"{r.name:20}{r.value:10.4f}{r.floor:10.4f}{r.control:10.4f}" for r in rows]
    return "\n".join(lines)


def even_noise(count: int, dim: int, seed: int = 0) -> Tensor:
    """Return standard normal points [count, dim], float32, that fill space evenly.

    They are a scrambled Sobol sequence under the inverse normal distribution function. Data made of
    4,096 of them has the sliced Wasserstein floor of about 100,000 random points.
    """
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    u = points.draw(count, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    return torch.special.ndtri(u).float()
