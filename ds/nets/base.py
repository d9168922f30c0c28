"""What every network's configuration offers, so that a directory of weights can be read back."""

from abc import ABC, abstractmethod

from torch import nn


class AbstractNetConfig(ABC):
    """A frozen dataclass that rebuilds its network; the network keeps it as `config`.

    `conditions` are the names of the numbers, beside the time, that its forward takes for each
    sample: net(x [N, *shape], t [N], h=[N]). Labels y are int64 [N], for a network with classes.
    """

    conditions: tuple[str, ...] = ()

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network with freshly drawn weights."""

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of everything that forward takes beside x and t."""
        return self.conditions
