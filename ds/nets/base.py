"""What a network's configuration must offer so that a directory of weights can be read back."""

from abc import ABC, abstractmethod

from torch import nn


class AbstractNetConfig(ABC):
    """A frozen dataclass that rebuilds its network; the network keeps it as `config`."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network with freshly drawn weights."""
