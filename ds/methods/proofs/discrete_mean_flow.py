"""The proof of DiscreteMeanFlow."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ds.methods.proof import Check, Formula
from ds.methods.proofs.mean_flow import steps, u, v


def identity(method: Any) -> tuple[Check, ...]:
    """The error of the exact u falls as the square of the step, and small steps make MeanFlow's."""
    kinds = (replace(method, even_in=kind) for kind in ("time", "sigma"))
    return tuple(check for kind in kinds for check in (_order(kind), _limit(kind)))


def _order(method: Any) -> Check:
    """Check the power of the step with which the error falls: it is 2, or 1 if half of it is."""
    x, t, h = steps()

    def away(net: Callable[..., Tensor]) -> float:
        """Return how far the power is from 2."""
        sizes = []
        for stage in (9, 10):
            share = replace(method, ratio=2.0).share(t, h, stage)
            sizes.append(method.error(Formula(net), x, v(x, t), t, h, {}, share).square().mean())
        return abs(math.log2(sizes[0] / sizes[1]) / 2 - 2)

    controls = {
        "state not moved": away(lambda _, s, h: u(x, s, h)),
        "time not moved": away(lambda y, *_, **__: u(y, t, h)),
    }
    return Check(f"order less 2, even in {method.even_in}", away(u), 0.2, controls, miss=0.5)


def _limit(method: Any) -> Check:
    """Compare a small step with MeanFlow, for a network that is wrong."""
    x, t, h = steps()
    net = Formula(lambda x, t, h: (1.3 + h[:, None]) * u(x, t, h) + t[:, None] ** 2)
    share = replace(method, ratio=1e4).share(t, h, 1)
    error = method.error(net, x, v(x, t), t, h, {}, share) * ((1 + share) / share)[:, None]
    wanted = replace(method.last, derivative="exact").error(net, x, v(x, t), t, h, {})
    flipped = 2 * (net(x, t, h=h) - v(x, t)) - wanted

    def far(other: Tensor) -> float:
        return float((error - other).norm() / other.norm())

    controls = {"sign of derivative flipped": far(flipped)}
    metric = f"away from MeanFlow's, even in {method.even_in}"
    return Check(metric, far(wanted), 1e-3, controls, miss=1e-2)
