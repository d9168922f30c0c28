"""Random numbers that depend on (seed, index) alone, for indices of any kind.

Sample n of a call is a pure function of (seed, indices[n]) and the shape of one sample. It does
not depend on the batch it is drawn in, on the order, the process or the device, so a store of
pairs needs to keep no noise. The generator, Philox, is specified in ds/ops/noise.py.
"""

import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ds import ops
from ds.ops.noise import philox, signed


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
        indices = as_bits(indices)
    return ops.noise(operator.index(seed), indices.to(device), shape, dtype)


def as_bits(indices: Iterable[int]) -> Tensor:
    """Return 64-bit unsigned indices as an int64 tensor [N] of their bits."""
    bits = [signed("noise", "index", operator.index(i)) for i in indices]
    return torch.tensor(bits, dtype=torch.int64, device="cpu")


def uniform(seed: int, indices: Tensor) -> Tensor:
    """Draw numbers uniform in [0, 1), float64 [N]; number n depends on (seed, indices[n]) only.

    They are those of `noise` under the normal distribution function, with the same seed. indices
    are int64 [N]. Raises ValueError for a seed out of range.
    """
    z = noise(seed, indices, (), device=indices.device)
    return 0.5 * torch.erfc(z.double() / math.sqrt(2))  # of float32 normals, so it is never 1


def words(seed: int, indices: Tensor) -> Tensor:
    """Draw whole numbers, even in 0 .. 2**32 - 1, int64 [N], on the device of the indices.

    Number n depends on (seed, indices[n]) only, and is the same on every device. indices are int64
    [N]. Raises ValueError for a seed out of range.
    """
    low = 2**32 - 1
    key = signed("words", "seed", operator.index(seed))
    zero = torch.zeros_like(indices)
    counter = (zero, zero, indices & low, indices >> 32 & low)
    return philox(counter, (key & low, key >> 32 & low))[0]


class Draws(NamedTuple):
    """The random numbers of rows, each a function of (seed, index) and of the stream it is from.

    `index`, int64 [N], numbers the draws of a run: no two of its rows have the same. Different uses
    of a row take different streams, 64-bit numbers.
    """

    seed: int
    index: Tensor

    def normal(self, stream: int, shape: Iterable[int]) -> Tensor:
        """Return standard normal numbers, float32 [N, *shape]."""
        return noise(self.seed ^ stream, self.index, shape, device=self.index.device)

    def uniform(self, stream: int) -> Tensor:
        """Return numbers uniform in [0, 1), float64 [N]."""
        return uniform(self.seed ^ stream, self.index)
