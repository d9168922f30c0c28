"""The one interface every solver and method sees: a network, its schedule, and what it predicts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds.diffusion.predictions import (
    AbstractPrediction,
    Estimate,
    Prediction,
    as_prediction,
    time_dtype,
)
from ds.diffusion.schedules import AbstractSchedule


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network with the meaning of its output: denoiser(x_t, t) -> Estimate.

    The network is called as net(x [N, *shape], c_noise [N], **cond), where x and c_noise are what
    the prediction feeds it: x_t and t for "eps", "x0" and "v". It has an attribute `shape`, the
    shape of one sample without the batch. `prediction` is a value of ds.predictions or one of the
    short names; it is kept as a value. Raises ValueError for a prediction that the schedule lacks.
    """

    net: nn.Module
    schedule: AbstractSchedule
    prediction: AbstractPrediction | Prediction = "eps"
    cond: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        prediction = as_prediction(self.prediction)
        object.__setattr__(self, "prediction", prediction)
        prediction.check(self.schedule)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, for images (C, H, W)."""
        return tuple(cast(Iterable[int], self.net.shape))

    def given(self, **cond: Any) -> "Denoiser":
        """Return the same denoiser with conditions for its network, such as labels y [N]."""
        return replace(self, cond={**self.cond, **cond})

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Estimate:
        """Estimate x0 and eps from x_t [N, *shape] at time t, one for all or one each [N].

        A number, Python's or NumPy's, keeps a loop free of device synchronisation; a tensor serves
        training. Raises ValueError for a number that is not a time of the schedule.
        """
        if isinstance(t, Tensor):
            t = t.expand(x_t.shape[0])
            alpha, sigma = self.schedule.gather(t, x_t)
        else:
            alpha, sigma = self.schedule.at(t)
            t = time_of_each(x_t, t)
        prediction = as_prediction(self.prediction)
        x, c_noise = prediction.inputs(x_t, t, alpha, sigma)
        return prediction.estimate(x_t, self.net(x, c_noise, **self.cond), alpha, sigma)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what the network should have predicted at times t [N], shaped like x0."""
        return as_prediction(self.prediction).target(x0, eps, *self.schedule.gather(t, x0))


def time_of_each(x: Tensor, t: float) -> Tensor:
    """Return time t for every sample of x [N, *shape], [N]: int64 for a whole number, else real."""
    if isinstance(t, Integral):
        return torch.full((x.shape[0],), int(t), dtype=torch.int64, device=x.device)
    return torch.full((x.shape[0],), float(t), dtype=time_dtype(x), device=x.device)
