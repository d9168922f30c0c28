"""Paths between noise tensors, for sheets and animations."""

from itertools import pairwise

import torch
from torch import Tensor

from ds.system.config import Natural, require
from ds.system.cost import check_memory


def nearest(labels: Tensor, between: int) -> Tensor:
    """Return labels [N] along the path of `great_circle`: each tensor has that of the nearer end.

    The tensor in the middle of an odd number has that of the first end. A class has no middle.
    """
    require("nearest", Natural, between=between)
    steps = (len(labels) - 1) * (between + 1)
    place = torch.arange(steps + 1, dtype=torch.int64, device=labels.device)
    return labels[(2 * place + between).div(2 * (between + 1), rounding_mode="floor")]


def great_circle(z: Tensor, between: int) -> Tensor:
    """Return a path through noise tensors z [N, *shape], with `between` more from each to the next.

    The path has (N - 1) * (between + 1) + 1 tensors. Steps are even in angle: a straight line would
    leave the shell on which normal noise lies. Shoemake 1985, "Animating rotation with quaternion
    curves", section 3.3.
    """
    require("great_circle", Natural, between=between)
    # Each in float64 and, put together, once more.
    check_memory("great_circle: a path", 2 * 8 * (len(z) - 1) * (between + 1) * z[0].numel())
    share = torch.linspace(0, 1, between + 2, dtype=torch.float64, device=z.device)[:-1]
    share = share.reshape(-1, *[1] * (z.dim() - 1))
    path = []
    for a, b in pairwise(z.double()):
        angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
        path.append((((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin())
    return torch.cat([*path, z[-1:].double()]).to(z.dtype)
