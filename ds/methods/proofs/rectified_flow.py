"""The proof of RectifiedFlow."""

from typing import Any

from torch import Tensor, nn

from ds.methods.flow.path import straightness
from ds.methods.proof import NORMAL, Check, Formula, exact, normal_pairs


def measure(method: Any, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
    """Check, after reflow, how straight the paths are."""
    if method.feeds == "images":
        return ()

    def velocity(x: Tensor, t: float) -> Tensor:
        return net(x, x.new_full((len(x),), method.time_scale * t))

    return (Check("straightness", straightness(velocity, z), 0.002),)


def identity(method: Any) -> tuple[Check, ...]:
    """With straight paths from noise to the ODE's end, loss and any number of steps are exact.

    The control is the velocity of the data's own paths, before reflow.
    """
    pairs = normal_pairs()
    end, z = pairs.x0, pairs.noise

    def straight(x: Tensor, told: Tensor) -> Tensor:
        t = told[:, None] / method.time_scale
        start = (x - (1 - t) * NORMAL.mean) / ((1 - t) * NORMAL.std + t)
        return start - NORMAL.endpoint(start, 0, 1)

    def bent(x: Tensor, told: Tensor) -> Tensor:
        t = told[:, None] / method.time_scale
        return (x - NORMAL.x0(x, 1 - t, t)) / t

    def backwards(x: Tensor, told: Tensor) -> Tensor:
        return straight(x, method.time_scale - told)

    right, wrong = Formula(straight), Formula(bent)
    own = exact(
        "error on straight pairs",
        method.error(right, pairs),
        pairs_shuffled=method.error(right, pairs._replace(x0=end.roll(1, 0))),
        time_reversed=method.error(Formula(backwards), pairs),
        without_reflow=method.error(wrong, pairs),
    )
    samples = (
        exact(
            f"end of {nfe} steps",
            method.sample(right, z, nfe=nfe) - end,
            without_reflow=method.sample(wrong, z, nfe=nfe) - end,
        )
        for nfe in (1, 3)
    )
    return own, *samples
