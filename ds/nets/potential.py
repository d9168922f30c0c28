"""A network whose output is the velocity of a potential, for flows that keep a cost low."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ds.nets.base import AbstractNetConfig, told
from ds.system.config import check

Cost = Literal["quadratic", "quartic"]
POWERS = {"quadratic": 2, "quartic": 4}


@dataclass(frozen=True, kw_only=True)
class PotentialConfig(AbstractNetConfig):
    """A network that is used as a potential."""

    tag: ClassVar[str] = "potential"

    net: AbstractNetConfig  # the network that the potential is made of
    cost: Cost = "quadratic"  # the cost that the velocity keeps low

    def __post_init__(self):
        check(self, "PotentialConfig: ")

    def build(self) -> "Potential":
        return Potential(self.net.build(), self.cost)


class Potential(nn.Module):
    """A velocity `grad c*(grad f)`, where a network makes f: net(x [N, *shape], t [N], **cond).

    f(x, t) = <x, net(x, t)> / 2 is a number for each row, whatever the network, and

        grad f = (net(x, t) + J(x, t)^T x) / 2

    takes a backward pass beside the forward one. A network that is the gradient field of a
    quadratic, as the velocity of normal data is, stays what it was. Its activations must be smooth,
    as the SiLU of all networks here is: the slope of a ReLU's f is constant in pieces, and its loss
    has no derivative there.

    The cost of rows of d elements, with q = 2 or 4, and the gradient of its conjugate are

        c(v) = d * (|v|**2 / d)**(q/2) / q        grad c*(p) = p * (|p|**2 / d)**(q*/2 - 1)

    with 1/q + 1/q* = 1. The cost is `|v|**q / q` but for a factor that keeps images and points
    alike of ordinary size, and its gradient is p itself for q = 2.

    The derivative is computed without autocast, and where gradients are off as well.
    """

    def __init__(self, net: nn.Module, cost: Cost = "quadratic"):
        super().__init__()
        self.net, self.cost = net, cost

    @property
    def config(self) -> PotentialConfig:
        """What rebuilds it; AttributeError for a network that has none."""
        return PotentialConfig(net=self.net.config, cost=self.cost)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.net.shape)  # type: ignore[arg-type]

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of everything that forward takes beside x and t."""
        return told(self.net)[0]

    @property
    def classes(self) -> int:
        """The number of classes of its labels."""
        return told(self.net)[1]

    def forward(self, x: Tensor, t: Tensor, *, slope: bool = False, **cond: Any) -> Tensor:
        """Return the velocity [N, *shape]; with `slope`, grad f, of which losses are made."""
        with torch.autocast(x.device.type, enabled=False):
            # A view of x: what counts the operations of modules cannot have a leaf in a derivative.
            out, pull = torch.func.vjp(lambda x: self.net(x.view_as(x), t, **cond), x)
            p = (out + pull(x.to(out.dtype))[0]) / 2
        if slope:
            return p
        size = _size(p) ** (_dual(self.cost) / 2 - 1)
        return p * size.reshape(-1, *[1] * (p.dim() - 1))


def fenchel_young(p: Tensor, v: Tensor, cost: Cost) -> Tensor:
    """Return (c*(p) - <p, v> + c(v)) / d of every row, [N]: at least 0, and 0 if v = grad c*(p).

    For the quadratic cost that is half the mean square of p - v.
    """
    power, dual = POWERS[cost], _dual(cost)
    product = (p * v).flatten(1).mean(1)
    return _size(p) ** (dual / 2) / dual - product + _size(v) ** (power / 2) / power


def _dual(cost: Cost) -> float:
    """Return the power of a cost's conjugate."""
    return POWERS[cost] / (POWERS[cost] - 1)


def _size(x: Tensor) -> Tensor:
    """Return the mean square of every row, and for 0 a number whose roots have derivatives."""
    return x.flatten(1).square().mean(1) + torch.finfo(x.dtype).tiny
