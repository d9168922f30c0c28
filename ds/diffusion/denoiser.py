"""The one interface every solver and method sees: a network, its schedule, and what it predicts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ds.diffusion.conditions import check_labels
from ds.diffusion.guidance import (
    AbstractGuidance,
    Classifier,
    ClassifierFree,
    ClassifierGuidance,
    Interval,
    ratio_of,
)
from ds.diffusion.predictions import (
    AbstractPrediction,
    Estimate,
    LearnedVariance,
    Level,
    Prediction,
    as_prediction,
    time_dtype,
)
from ds.diffusion.schedules import AbstractSchedule
from ds.nets.base import told


class Parts(NamedTuple):
    """What a denoiser knows of x_t: x0 and eps before a classifier's gradient, and the rest."""

    x0: Tensor
    eps: Tensor
    alpha: Level
    sigma: Level
    share: Tensor | None  # of a learned variance, see LearnedVariance.share
    gradient: Tensor | None  # what a classifier adds to the score

    @property
    def estimate(self) -> Estimate:
        """x0 and eps, with the gradient. Dhariwal & Nichol 2021, arXiv:2105.05233, Algorithm 2."""
        if self.gradient is None:
            return Estimate(self.x0, self.eps)
        if not isinstance(self.alpha, Tensor) and not self.alpha:
            raise ValueError(
                "classifier guidance says nothing of x0 where alpha is 0; start the grid at a time "
                "with some signal"
            )
        shift = self.sigma * self.gradient
        return Estimate(self.x0 + self.sigma / self.alpha * shift, self.eps - shift)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network with the meaning of its output: denoiser(x_t, t) -> Estimate.

    The network is called as net(x [N, *shape], c_noise [N], **cond), where x and c_noise are what
    the prediction feeds it: x_t and t for "eps", "x0" and "v". It has an attribute `shape`, the
    shape of one sample without the batch. `prediction` is a value of ds.predictions or one of the
    short names; it is kept as a value. A label or a classifier may guide it, see ds.Guided and
    ds.ClassifierGuided. Raises ValueError for a prediction that the schedule lacks.
    """

    net: nn.Module
    schedule: AbstractSchedule
    prediction: AbstractPrediction | Prediction = "eps"
    cond: Mapping[str, Any] = field(default_factory=dict)
    guidance: AbstractGuidance | None = None

    def __post_init__(self):
        prediction = as_prediction(self.prediction)
        object.__setattr__(self, "prediction", prediction)
        prediction.check(self.schedule)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, for images (C, H, W)."""
        return tuple(cast(Iterable[int], self.net.shape))

    def given(self, **cond: Any) -> "Denoiser":
        """Return the same denoiser with conditions for its network, such as label [N].

        Raises ValueError for a label on the CPU that does not exist; elsewhere the network's output
        for it is NaN.
        """
        label, classes = cond.get("label"), told(self.net)[1]
        looked_at = classes and not torch.compiler.is_compiling()
        if looked_at and isinstance(label, Tensor) and label.device.type == "cpu":
            check_labels("denoiser.given", label, classes)
        return replace(self, cond={**self.cond, **cond})

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Estimate:
        """Estimate x0 and eps from x_t [N, *shape] at time t, one for all or one each [N].

        A number, Python's or NumPy's, keeps a loop free of device synchronisation; a tensor serves
        training. Raises ValueError for a number that is not a time of the schedule.
        """
        return self.parts(x_t, t).estimate

    def parts(self, x_t: Tensor, t: float | Tensor) -> Parts:
        """Return all that is known of x_t at time t, as a call takes them.

        A call makes an Estimate of it. Solvers that need more than that take the parts.
        """
        if isinstance(t, Tensor):
            t = t.expand(x_t.shape[0])
            alpha, sigma = self.schedule.gather(t, x_t)
        else:
            alpha, sigma = self.schedule.at(t)
            t = time_of_each(x_t, t)
        prediction = as_prediction(self.prediction)
        x, c_noise = prediction.inputs(x_t, t, alpha, sigma)
        if self.guidance is None:
            out, gradient = self.net(x, c_noise, **self.cond), None
        else:
            ratio = ratio_of(alpha, sigma)
            out = self.guidance.out(self.net, x, c_noise, self.cond, ratio)
            gradient = self.guidance.gradient(x_t, t, self.cond, ratio)
        x0, eps = prediction.estimate(x_t, out, alpha, sigma)
        share = prediction.share(out) if isinstance(prediction, LearnedVariance) else None
        return Parts(x0, eps, alpha, sigma, share, gradient)

    def c_noise(self, t: float) -> float:
        """Return what the network is told at time t: t itself for "eps", "x0" and "v"."""
        x = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
        prediction, levels = as_prediction(self.prediction), self.schedule.at(t)
        return prediction.inputs(x, time_of_each(x, t), *levels)[1].item()

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what the network should have predicted at times t [N], shaped like x0."""
        return as_prediction(self.prediction).target(x0, eps, *self.schedule.gather(t, x0))


def Guided(denoiser: Denoiser, scale: float | None, interval: Interval | None = None) -> Denoiser:
    """Return a denoiser with classifier-free guidance; see ds.diffusion.guidance.ClassifierFree.

    Its network takes "label" and knows -1 as no label. A scale of None is that of each row, in the
    condition "guidance". A guided call evaluates the network twice, in one batch. Raises
    ValueError for a network that says it has no classes, for a denoiser that is guided already, and
    for an interval that does not rise.
    """
    net = denoiser.net
    says = hasattr(net, "takes") or hasattr(getattr(net, "config", None), "takes")
    if says and "label" not in told(net)[0]:
        raise ValueError(
            f"Guided: needs a network with classes, which this {type(net).__name__} does not have; "
            f"a classifier can guide it, ds.ClassifierGuided"
        )
    return _guided(denoiser, ClassifierFree(scale, interval))


def ClassifierGuided(
    denoiser: Denoiser,
    classifier: Classifier,
    scale: float,
    interval: Interval | None = None,
    *,
    classes: int = 0,
) -> Denoiser:
    """Return a denoiser with classifier guidance; see ds.diffusion.guidance.ClassifierGuidance.

    classifier(x_t [N, *shape], t [N]) -> logits [N, K] is a network of noisy samples, such as
    ds.load_classifier reads, or a formula; t is the schedule's time. `classes` says how many it
    knows, where it does not itself and labels are to be drawn. Raises ValueError as `Guided` does.
    """
    classes = classes or getattr(getattr(classifier, "config", None), "num_classes", 0)
    return _guided(denoiser, ClassifierGuidance(classifier, scale, interval, classes))


def _guided(denoiser: Denoiser, guidance: AbstractGuidance) -> Denoiser:
    if denoiser.guidance is not None:
        raise ValueError(
            f"{type(guidance).__name__}: the denoiser is guided already, by {denoiser.guidance}; "
            f"guide one without guidance, dataclasses.replace(denoiser, guidance=None)"
        )
    return replace(denoiser, guidance=guidance)


def time_of_each(x: Tensor, t: float) -> Tensor:
    """Return time t for every sample of x [N, *shape], [N]: int64 for a whole number, else real."""
    if isinstance(t, Integral):
        return torch.full((x.shape[0],), int(t), dtype=torch.int64, device=x.device)
    return torch.full((x.shape[0],), float(t), dtype=time_dtype(x), device=x.device)
