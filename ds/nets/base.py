"""What every network's configuration offers, so that a directory of weights can be read back."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

NO_CLASS = -1  # the label of a sample that has no class


class AbstractNetConfig(ABC):
    """A frozen dataclass that rebuilds its network; the network keeps it as `config`.

    `conditions` are the names of the numbers, beside the time, that its forward takes for each
    sample: net(x [N, *shape], t [N], h=[N]). One with `classes` takes `label`, int64 [N], too.
    """

    conditions: tuple[str, ...] = ()
    classes: int = 0  # labels are 0 to classes - 1, or NO_CLASS; 0: none are taken

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network with freshly drawn weights."""

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of everything that forward takes beside x and t."""
        return (*self.conditions, *["label"] * (self.classes > 0))

    @property
    def may_take(self) -> dict[str, tuple[int, ...]]:
        """The names of what forward may be told besides, with the shape of each for a sample."""
        return {}


def told(net: nn.Module) -> tuple[tuple[str, ...], int]:
    """Return what a network takes beside x and t, and its number of classes.

    Its own attributes `takes` and `classes` say so, else those of its configuration; a network
    with neither takes nothing.
    """

    def said(name: str, otherwise: Any) -> Any:
        return getattr(net, name, getattr(getattr(net, "config", None), name, otherwise))

    return said("takes", ()), said("classes", 0)
