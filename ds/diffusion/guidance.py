"""Guidance: how a denoiser is drawn towards a label, by its own network or by a classifier.

With r = sigma / alpha, the score of p(x_t | label) is that of p(x_t) plus the gradient of
log p(label | x_t). Guidance multiplies that gradient by a scale. At scale 1 a perfect network or
classifier gives the distribution of the label; a larger scale draws fewer, more typical samples.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ds.diffusion.conditions import check_labels
from ds.diffusion.predictions import Level
from ds.nets.base import NO_CLASS, told
from ds.system.config import Between, Natural, check, tag, to_json

Cond = Mapping[str, Any]
Scale = Annotated[float, Between(-1e6, 1e6)]
Interval = tuple[float, float]
Classifier = Callable[[Tensor, Tensor], Tensor]  # of x_t [N, *shape] and times t [N]: logits [N, K]


class AbstractGuidance(ABC):
    """How a denoiser is guided. A frozen value, as a prediction is."""

    interval: Interval | None
    classes: int

    @property
    def takes(self) -> tuple[str, ...]:
        """The conditions that it needs."""
        return ()

    def evaluations(self, ratio: float) -> int:
        """Return how often the network is evaluated for a row at sigma / alpha."""
        return 1

    @abstractmethod
    def out(self, net: nn.Module, x: Tensor, c_noise: Tensor, cond: Cond, ratio: Level) -> Tensor:
        """Return the network's output for its inputs x [N, *shape] and c_noise [N]."""

    @abstractmethod
    def gradient(self, x: Tensor, t: Tensor, cond: Cond, ratio: Level) -> Tensor | None:
        """Return what the score of x_t [N, *shape] at times t [N] gains; None for nothing."""

    def about(self) -> dict[str, Any]:
        """Return JSON that describes the guidance."""
        return to_json(self)

    @property
    def net(self) -> nn.Module | None:
        """The network that it needs beside the denoiser's, if any."""
        return None

    def _inside(self, ratio: Level) -> Any:
        """Return whether sigma / alpha lies in the interval: a bool, or one for each row."""
        if self.interval is None:
            return True
        low, high = self.interval
        if isinstance(ratio, Tensor):
            return (low < ratio) & (ratio <= high)
        return low < ratio <= high

    def _check(self) -> None:
        name = type(self).__name__
        check(self, f"{name}: ")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"{name}: the interval must rise, from 0 or more, not {self.interval}")


@dataclass(frozen=True)
class ClassifierFree(AbstractGuidance):
    """Step away from what the network says without a label, by one call of twice the rows.

    With the network's outputs u for no label and c for the label, the guided output is
    u + scale * (c - u). Any prediction is affine in its output, so this guides x0, the noise and v
    alike. A learned variance is that of the label. Ho & Salimans 2022, arXiv:2207.12598, Eq. 6,
    whose w is scale - 1. Outside the interval the label alone is asked, with scale 1: Kynkaanniemi
    et al. 2024, arXiv:2404.07724, Eq. 4.
    """

    # 1: the label as it is, 0: no label; None: that of each row, in its condition "guidance"
    scale: Scale | None
    classes: ClassVar[int] = 0
    # lowest and highest sigma / alpha at which to guide, the lowest excluded; None: at all
    interval: Interval | None = None

    def __post_init__(self):
        self._check()

    @property
    def takes(self) -> tuple[str, ...]:
        return ("label", *["guidance"] * (self.scale is None))

    def evaluations(self, ratio: float) -> int:
        return 1 if self.scale in (0, 1) or not self._inside(ratio) else 2

    def out(self, net: nn.Module, x: Tensor, c_noise: Tensor, cond: Cond, ratio: Level) -> Tensor:
        cond, scale = self._parted(cond, x, ratio)
        if not isinstance(scale, Tensor) and scale in (0, 1):
            return net(x, c_noise, **(cond if scale else _unlabelled(cond)))
        twice = {name: _twice(value, len(x)) for name, value in cond.items()}
        twice["label"] = torch.cat([cond["label"], torch.full_like(cond["label"], NO_CLASS)])
        out, null = net(torch.cat([x, x]), torch.cat([c_noise, c_noise]), **twice).chunk(2)
        mean, channels = null[:, : x.shape[1]], x.shape[1]
        mean = mean + scale * (out[:, :channels] - mean)
        return mean if out.shape[1] == channels else torch.cat([mean, out[:, channels:]], 1)

    def gradient(self, x: Tensor, t: Tensor, cond: Cond, ratio: Level) -> None:
        return None

    def _parted(self, cond: Cond, x: Tensor, ratio: Level) -> tuple[Cond, Level]:
        """Return the network's conditions, and the scale: a number, or one for each row of x."""
        _labels(cond, x, "classifier-free")
        scale: Any = self.scale
        if scale is None:
            if "guidance" not in cond:
                raise ValueError(
                    "classifier-free guidance has no scale; set it, or give one for each sample "
                    "with denoiser.given(guidance=...), [N]"
                )
            scale = torch.as_tensor(cond["guidance"], dtype=x.dtype, device=x.device)
            scale = scale.reshape(-1, *[1] * (x.dim() - 1))
            cond = {name: value for name, value in cond.items() if name != "guidance"}
        inside = self._inside(ratio)
        if isinstance(inside, Tensor):
            return cond, torch.where(inside, scale, 1.0).to(x.dtype)
        return cond, scale if inside else 1


def _labels(cond: Cond, x: Tensor, kind: str) -> Tensor:
    """Return the labels; raise ValueError unless there is one for each sample."""
    label = cond.get("label")
    if not isinstance(label, Tensor) or label.shape != (len(x),):
        found = "none" if label is None else list(getattr(label, "shape", ())) or repr(label)
        raise ValueError(
            f"{kind} guidance needs a label for each of {len(x)} samples, not {found}; give them "
            f"with denoiser.given(label=...), int64 [N]"
        )
    return label


def _unlabelled(cond: Cond) -> Cond:
    return {**cond, "label": torch.full_like(cond["label"], NO_CLASS)}


def _twice(value: Any, rows: int) -> Any:
    """Return a condition for twice the rows; what is one for all stays as it is."""
    each = isinstance(value, Tensor) and value.dim() and len(value) == rows
    return torch.cat([value, value]) if each else value


@dataclass(frozen=True)
class ClassifierGuidance(AbstractGuidance):
    """Follow the gradient of a classifier of noisy samples, log p(label | x_t).

    The classifier is called as classifier(x_t [N, *shape], t [N]) -> logits [N, K] with the times
    of the schedule: a noisy classifier network, or a formula. It is differentiated at every call of
    the network, which costs about twice its forward. The labels are those of the condition "label";
    the network is told them too if it takes labels. A row of no class, -1, is not guided.

    eps becomes eps - sigma * scale * gradient, and x0 what follows from that, after any clipping.
    ds.solvers.Ancestral moves the mean by variance * scale * gradient. Dhariwal & Nichol 2021,
    arXiv:2105.05233, Algorithms 1 and 2.
    """

    classifier: Classifier
    scale: Scale
    # lowest and highest sigma / alpha at which to guide, the lowest excluded; None: at all
    interval: Interval | None = None
    classes: Natural = 0  # how many classes the classifier knows; 0: as many as the network has

    def __post_init__(self):
        self._check()

    @property
    def takes(self) -> tuple[str, ...]:
        return ("label",)

    def out(self, net: nn.Module, x: Tensor, c_noise: Tensor, cond: Cond, ratio: Level) -> Tensor:
        if "label" not in told(net)[0]:
            cond = {name: value for name, value in cond.items() if name != "label"}
        return net(x, c_noise, **cond)

    def gradient(self, x: Tensor, t: Tensor, cond: Cond, ratio: Level) -> Tensor | None:
        if not self.scale or (inside := self._inside(ratio)) is False:
            return None
        label = _labels(cond, x, "classifier")
        self._check_device(x)
        with torch.inference_mode(False), torch.enable_grad():
            x, t, label = x.detach().clone().requires_grad_(), t.clone(), label.clone()
            share = self._log_share(self.classifier(x, t), label)
            (slope,) = torch.autograd.grad(share, x)
        slope = self.scale * slope
        return torch.where(inside, slope, 0) if isinstance(inside, Tensor) else slope

    def about(self) -> dict[str, Any]:
        rest = {name: to_json(value) for name, value in vars(self).items() if name != "classifier"}
        name = getattr(self.classifier, "__qualname__", type(self.classifier).__qualname__)
        return {"type": tag(type(self)), "classifier": name, **rest}

    @property
    def net(self) -> nn.Module | None:
        return self.classifier if isinstance(self.classifier, nn.Module) else None

    def _log_share(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the sum of log p(label) over the rows that have a class."""
        if logits.dim() != 2 or len(logits) != len(label):
            raise ValueError(
                f"classifier guidance: the classifier must return logits [{len(label)}, K], not "
                f"{list(logits.shape)}"
            )
        if label.device.type == "cpu":
            check_labels("classifier guidance", label, logits.shape[1])
        share = logits.log_softmax(1).gather(1, label.clamp(min=0)[:, None])[:, 0]
        return torch.where(label == NO_CLASS, 0, share).sum()

    def _check_device(self, x: Tensor) -> None:
        """Raise ValueError for a classifier on another device than the samples."""
        where = next((w.device for w in self.net.parameters()), x.device) if self.net else x.device
        if where != x.device:
            raise ValueError(
                f"classifier guidance: the classifier is on {where}, the samples are on "
                f"{x.device}; move it with classifier.to({str(x.device)!r})"
            )


def ratio_of(alpha: Level, sigma: Level) -> Level:
    """Return sigma / alpha, infinite where alpha is 0."""
    return sigma / alpha if isinstance(alpha, Tensor) or alpha else math.inf
