"""Standard normal noise that depends on (seed, index) alone, for indices of any kind.

Sample n of a call is a pure function of (seed, indices[n]) and the shape of one sample. It does
not depend on the batch it is drawn in, on the order, the process or the device, so a store of
pairs needs to keep no noise. The generator, Philox, is specified in ds/ops/noise.py.
"""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from ds import ops
from ds.ops.noise import signed


def noise(
    seed: int,
    indices: Iterable[int] | Tensor,
    shape: Iterable[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise; row n depends on (seed, indices[n]) and nothing else.

    `seed` and the indices are 64-bit unsigned integers; an int64 tensor of indices is taken as
    their bits. Returns [N, *shape]. The underlying integers are the same everywhere; the normals
    differ between devices by a few ulp. Raises ValueError for a seed out of range.
    """
    if not isinstance(indices, Tensor):
        bits = [signed("noise", "index", operator.index(i)) for i in indices]
        indices = torch.tensor(bits, dtype=torch.int64)
    return ops.noise(operator.index(seed), indices.to(device), shape, dtype)
