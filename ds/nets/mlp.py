"""A multilayer perceptron for points: the smallest network that a method can train."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.nets.base import CONTEXT, AbstractNetConfig
from ds.nets.embedding import (
    Frequencies,
    beside,
    check_conditions,
    check_frequencies,
    check_names,
    one_hot,
    sinusoids,
)
from ds.system.config import Between, Count, Natural, check


@dataclass(frozen=True, kw_only=True)
class MLPConfig(AbstractNetConfig):
    """The shape of an MLP for points of `dim` numbers."""

    tag: ClassVar[str] = "mlp"

    dim: Count = 2
    out_dim: Count | None = None  # numbers that it returns; None: dim
    width: Count = 128  # of each hidden layer
    depth: Annotated[int, Between(1, 256)] = 4  # hidden layers
    # numbers the network is told beside the time, such as h; "context" is another point
    conditions: tuple[str, ...] = ()
    classes: Natural = 0  # number of classes of labels; 0: no labels
    embedding: Annotated[int, Between(4, 2**16)] = 16  # width of the embedding of a number
    # highest and lowest frequency of the embedding; these suit times from about -2 to 2
    frequencies: Frequencies = (6.0, 0.5)

    def __post_init__(self):
        check(self, "MLPConfig: ")
        check_frequencies("MLPConfig: ", self.frequencies)
        check_names("MLPConfig: ", self.conditions)

    @property
    def shape(self) -> tuple[int]:
        return (self.dim,)

    @property
    def columns(self) -> dict[str, int]:
        """The columns of the first layer, by what they are told, in order."""
        even = self.embedding // 2 * 2
        numbers = dict.fromkeys(("t", *self.numbers), even)
        return {"x": self.dim, CONTEXT: self.inputs - self.dim, **numbers, "label": self.classes}

    def build(self) -> "MLP":
        return MLP(self)


class MLP(nn.Module):
    """An MLP with SiLU: net(x [N, dim], t [N], **cond) -> [N, out_dim].

    t and the numbers among the conditions enter by their embeddings, a context [N, dim] as it is,
    and `label`, int64 [N], by a row of 0 and 1, which is all 0 for NO_CLASS.
    """

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = c = config
        layers = [nn.Linear(sum(c.columns.values()), c.width), nn.SiLU()]
        for _ in range(c.depth - 1):
            layers += [nn.Linear(c.width, c.width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(c.width, c.out_dim or c.dim))

    @property
    def shape(self) -> tuple[int]:
        """The shape of one point."""
        return self.config.shape

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        c = self.config
        check_conditions(c, cond, x.shape[0])  # len(x) would fix the batch of an export
        numbers = [t, *(cond[name] for name in c.numbers)]
        told = [sinusoids(number, c.embedding, c.frequencies) for number in numbers]
        if c.classes:
            told.append(one_hot(cond["label"], c.classes))
        rows = [part.to(x.dtype).expand(x.shape[0], -1) for part in told]
        return self.layers(torch.cat([beside(x, cond), *rows], 1))

    def weights_for(self, config: MLPConfig) -> dict[str, Tensor]:
        """Return the weights with which a network that is told more makes nothing of it."""
        weights, first = self.state_dict(), "layers.0.weight"
        own = self.config.columns
        parts = dict(zip(own, weights[first].split([*own.values()], 1), strict=True))
        none = weights[first].new_zeros(self.config.width, 0)
        wider = [
            F.pad(parts.get(name, none), (0, count - own.get(name, 0)))
            for name, count in config.columns.items()
        ]
        return {**weights, first: torch.cat(wider, 1)}
