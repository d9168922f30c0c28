"""The one interface every solver and method sees: a network, its schedule, and what it predicts."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ds.diffusion.schedules import AbstractSchedule

Prediction = Literal["eps", "x0", "v"]
PREDICTIONS = ("eps", "x0", "v")


class Estimate(NamedTuple):
    """What a denoiser says about x_t = alpha * x0 + sigma * eps, both shaped like x_t.

    Both are given because deriving one from the other divides by alpha or by sigma, and each of
    them is nearly zero at one end of the schedule.
    """

    x0: Tensor
    eps: Tensor


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network with the meaning of its output: denoiser(x_t, t) -> Estimate.

    The network is called as net(x_t [N, *shape], t [N]) and has an attribute `shape`, the shape of
    one sample without the batch. It may predict the noise ("eps", Ho et al. 2020), the clean image
    ("x0"), or v = alpha * eps - sigma * x0 ("v", Salimans & Ho 2022, arXiv:2202.00512, Eq. 11).
    """

    net: nn.Module
    schedule: AbstractSchedule
    prediction: Prediction = "eps"

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"Denoiser: prediction must be one of {', '.join(PREDICTIONS)}, "
                f"not {self.prediction!r}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, for images (C, H, W)."""
        return tuple(self.net.shape)

    def __call__(self, x_t: Tensor, t: int | Tensor) -> Estimate:
        """Estimate x0 and eps from x_t [N, *shape] at the index t, one for all or one each [N].

        An int keeps the loop free of device synchronisation; a tensor serves training.
        """
        if isinstance(t, int):
            alpha, sigma = self.schedule.at(t)
            t = torch.full((x_t.shape[0],), t, dtype=torch.int64, device=x_t.device)
        else:
            alpha, sigma = self.schedule.gather(t, x_t)
        out = self.net(x_t, t)
        if self.prediction == "eps":
            return Estimate((x_t - sigma * out) / alpha, out)
        if self.prediction == "x0":
            return Estimate(out, (x_t - alpha * out) / sigma)
        return Estimate(alpha * x_t - sigma * out, sigma * x_t + alpha * out)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what the network should have predicted at times t [N], shaped like x0."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        alpha, sigma = self.schedule.gather(t, x0)
        return alpha * eps - sigma * x0
