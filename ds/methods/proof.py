"""How a method proves itself: checks with their controls, and the small training of `verify`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from ds.analytic import Gaussian, GaussianMixture
from ds.diffusion.noise import Draws
from ds.nets import AbstractNetConfig
from ds.pairs.sources import AbstractSource, Batch
from ds.system.config import Between, Count, Positive, check

EXACT, WRONG = 1e-12, 1e-2  # an identity in float64 holds within EXACT; its controls miss by WRONG


class Check(NamedTuple):
    """A figure that must meet a bar, and controls that must not.

    A control is the same figure of something known to be wrong. It must reach `miss`, by default
    the bar itself: a bar that the controls meet too shows nothing. `floor` is the figure of a
    perfect result. A `share` makes the bar relative: it is that share of the nearest control's
    figure, and `beside` fills it in. A check of `measure` is held beside the trial's networks that
    `against` names; by default beside all.
    """

    metric: str
    value: float
    bar: float = EXACT
    controls: Mapping[str, float] = {}
    floor: float = 0.0
    miss: float | None = None
    at_least: bool = False  # the value must be at least the bar; else at most
    share: float | None = None
    against: tuple[str, ...] = ()

    def beside(self, controls: Mapping[str, float]) -> "Check":
        """Return the check with these controls, and with its share of the nearest one as bar."""
        made = self._replace(controls=controls)
        return made if self.share is None else made._replace(bar=self.share * made.control)

    @property
    def control(self) -> float:
        """The figure of the control that comes nearest to passing; nan if there is none."""
        nearest = max if self.at_least else min
        return nearest(self.controls.values(), default=float("nan"))

    @property
    def passed(self) -> bool:
        """Whether the value meets the bar and every control misses it. A nan does neither."""
        sign = -1 if self.at_least else 1
        miss = self.bar if self.miss is None else self.miss
        missed = (sign * value > sign * miss for value in self.controls.values())
        return sign * self.value <= sign * self.bar and all(missed)


def exact(metric: str, value: Tensor, **controls: Tensor) -> Check:
    """Return the check that a residual vanishes in float64 where those of the controls do not.

    The figure of a residual is its largest element.
    """
    sizes = {name.replace("_", " "): float(x.abs().max()) for name, x in controls.items()}
    return Check(metric, float(value.abs().max()), EXACT, sizes, miss=WRONG)


class Misuse(NamedTuple):
    """A wrong use of a network that is trained well, by which its samples must become bad.

    `wrap` returns the network in this use. Its distance to the data must be at least `least`.
    """

    wrap: Callable[[nn.Module], nn.Module]
    least: float


@dataclass(frozen=True)
class Trial:
    """The small training by which ds.verify judges a method, on a mixture of Gaussians.

    The student starts as a fresh `net`, by default an MLP, and trains for `steps` steps a stage.
    `changes` are fields of the method that the trial sets, to fit points in the plane. `train`
    holds fields of ds.TrainConfig, and `data` is the mixture. `rows` makes the rows of a seed and a
    number, in place of those of the mixture; only `measure` then knows what is right.

    `bars` gives, for a number of network calls, the largest sliced Wasserstein distance to the
    data. `agreement` is the least share of samples, of the fewest calls, that are in the mode where
    the exact ODE ends. Without bars and rows there is no training.

    Each of `controls` is trained in the same way, and must miss the bar of the fewest calls. It is
    a mapping of fields that make the method wrong, or another method, with all its fields. `rivals`
    are such too, but may be as near: only figures of `measure` are compared with theirs. `shares`
    gives, for a number of calls, the largest distance as a share of the nearest control's. Each of
    `misused` is the trained network in a wrong use, at the fewest calls.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    net: AbstractNetConfig | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    steps: Count = 2000
    bars: Mapping[Count, Positive] = field(default_factory=lambda: {1: 0.15})
    agreement: Annotated[float, Between(0, 1)] = 0.0
    controls: Mapping[str, Any] = field(default_factory=dict)
    rivals: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[Count, Positive] = field(default_factory=dict)
    misused: Mapping[str, Misuse] = field(default_factory=dict)
    data: GaussianMixture = field(default_factory=GaussianMixture)
    rows: Callable[[int, int], AbstractSource] | None = None

    def __post_init__(self):
        check(self, "Trial: ")


class Formula(nn.Module):
    """A function in the place of a network: net(x [N, 3], t [N], **cond)."""

    shape = (3,)

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **cond: Any) -> Tensor:
        return self.function(*args, **cond)


# Three independent normal numbers, whose flow is linear on every path, and points of standard
# noise, in float64. A wrong sign or factor cannot be right for all three variances at once.
STDS: Any = torch.tensor([0.05, 0.5, 2.0], dtype=torch.float64, device="cpu").sqrt()
NORMAL = Gaussian(0.3, STDS, (3,))
_DIRECTION = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64, device="cpu")
NOISE = torch.linspace(-2, 2, 33, dtype=torch.float64, device="cpu")[:, None] * _DIRECTION


def normal_pairs() -> Batch:
    """Return pairs of NOISE and where the ODE of NORMAL takes it, as a teacher would make them."""
    index = torch.arange(len(NOISE), dtype=torch.int64, device="cpu")
    return Batch(NORMAL.endpoint(NOISE, 0, 1), NOISE, index, Draws(0, index))
