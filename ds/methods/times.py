"""Densities of random times: each row of a batch has a time of its own, from a stream of draws."""

import math

import torch
from torch import Tensor

from ds.diffusion.noise import Draws


def grid(draws: Draws, stream: int, count: int) -> Tensor:
    """Return which of `count` times each row has, int64 [N] from 0 on; all come equally often."""
    return (draws.uniform(stream) * count).long()


def logit_normal(draws: Draws, stream: int, mean: float, std: float) -> Tensor:
    """Return times from 0 to 1, float32 [N]: sigmoids of normal numbers of this mean and std.

    Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    return torch.sigmoid(mean + std * draws.normal(stream, ()))


def log_normal(draws: Draws, stream: int, mean: float, std: float) -> Tensor:
    """Return noise levels, float32 [N], whose logarithms are normal with this mean and std.

    Karras et al. 2022, arXiv:2206.00364, Table 1.
    """
    return (mean + std * draws.normal(stream, ())).exp()


def cut_log_normal(
    draws: Draws, stream: int, mean: float, std: float, least: float, most: float
) -> Tensor:
    """Return noise levels of the density of `log_normal` from `least` to `most`, float64 [N]."""
    start, end = (math.erf((math.log(x) - mean) / (std * 2**0.5)) for x in (least, most))
    normal = torch.erfinv(start + (end - start) * draws.uniform(stream))
    return (mean + std * 2**0.5 * normal).exp().clamp(least, most)


def late(draws: Draws, stream: int, start: float, end: float, width: float = 0.02) -> Tensor:
    """Return noise levels from `start` to `end`, float64 [N], that come more often near the start.

    The density of x = log(level / start) is proportional to (x**2 + width**2)**-0.5. That is the
    limit of Student's distribution for few degrees of freedom. Lee et al. 2024, arXiv:2410.14895,
    whose code has 0.01 of them, the scale 0.2, and so the width 0.2 * 0.01**0.5.
    """
    most = math.asinh(math.log(end / start) / width)
    return start * (width * torch.sinh(most * draws.uniform(stream))).exp()


def two_ended(draws: Draws, stream: int, rate: float = 4.0, margin: float = 1e-5) -> Tensor:
    """Return times that come more often near both ends, float64 [N], `margin` or more from each.

    Their density is proportional to exp(rate * t) + exp(rate * (1 - t)), which is a cosh around the
    middle. Lee et al. 2024, arXiv:2405.20320, section 4.1.
    """
    even = 2 * draws.uniform(stream) - 1
    return 0.5 + torch.asinh(even * math.sinh(rate * (0.5 - margin))) / rate


def pair(
    draws: Draws,
    streams: tuple[int, int, int],
    equal: float,
    start: tuple[float, float],
    end: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return times t and the steps h = t - r that go back from them, float32 [N] each.

    `start` and `end` are the mean and std of logit-normal times. Without `end`, t is the later and
    r the earlier of two from `start`. With it, r is from `end`, and cut to t where it is later. A
    share `equal` of the rows has h = 0 besides. Geng et al. 2025, arXiv:2505.13447, section 4.3;
    `end` is as in the authors' later code.
    """
    t = logit_normal(draws, streams[0], *start)
    r = logit_normal(draws, streams[1], *(end or start))
    later = t if end else torch.maximum(t, r)
    apart = draws.uniform(streams[2]) >= equal
    return later, apart * (later - torch.minimum(t, r))
