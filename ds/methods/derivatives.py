"""Derivatives of networks along a direction, which the targets of some methods hold."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ds.methods.networks import SharedDropout
from ds.system.ambient import tf32

Way = Literal["exact", "central"]
STEP = 2e-3  # where central differences in float32 err least, by about 1e-4 of the derivative


def along(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    *,
    net: nn.Module,
    way: Way = "exact",
    step: float = STEP,
) -> tuple[Tensor, Tensor]:
    """Return function(*inputs) [N, ...] and its derivative as the inputs move along `tangents`.

    The value has a gradient, the derivative has none. `net` is the network that the function calls.
    Autocast is off inside: a derivative is a small difference of large numbers. All calls have the
    same dropout masks. Raises ValueError for the exact derivative of a network that recomputes its
    norms in backward, which PyTorch cannot do.

    exact     forward mode, through ds.ops as well: one call, about twice as long
    central   (f(x + step * v) - f(x - step * v)) / (2 * step): three calls, for a network that
              forward mode cannot pass. Its error grows as step**2, that of rounding as 1 / step. So
              TF32 is off in it; but compiled code keeps PyTorch's setting of TF32.
    """
    device = inputs[0].device
    with torch.autocast(device.type, enabled=False):
        if way == "exact":
            if any(getattr(module, "recompute", False) for module in net.modules()):
                raise ValueError(
                    "recompute_norms: PyTorch recomputes nothing below a derivative in forward "
                    "mode; leave it out, or set the method's derivative to central"
                )
            value, derivative = torch.func.jvp(function, inputs, tangents)[:2]
            return value, derivative.detach()
        dropout = SharedDropout(net, device=device)
        with dropout:
            value = function(*inputs)
        moved = []
        for far in (step, -step):
            with dropout, torch.no_grad(), tf32(False):
                x = (x + far * v for x, v in zip(inputs, tangents, strict=True))
                moved.append(function(*x))
        return value, (moved[0] - moved[1]) / (2 * step)
