"""The proof of DenoisingStudent."""

from typing import Any

from torch import Tensor, nn

from ds.methods.base import Progress
from ds.methods.proof import NORMAL, Check, Formula, exact, normal_pairs
from ds.pairs.sources import Batch


def identity(method: Any) -> tuple[Check, ...]:
    """With the way to the ODE's end as the network, the loss of the ODE's pairs vanishes."""
    pairs, moved = normal_pairs(), normal_pairs().x0.roll(1, 0)

    def loss(pairs: Batch, sign: float = 1.0) -> Tensor:
        net = Formula(lambda z, t: sign * (z - NORMAL.endpoint(z, 0, 1)))
        return method.loss(nn.ModuleDict({"student": net}), pairs, Progress(0, 1))

    wrong = {"pairs_shuffled": loss(pairs._replace(x0=moved)), "way_reversed": loss(pairs, -1)}
    return (exact("loss of the ODE's pairs", loss(pairs), **wrong),)
