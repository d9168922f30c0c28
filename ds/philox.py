"""Standard normal noise that depends on (seed, index) alone, by a counter-based generator.

Sample n of a call is a pure function of (seed, indices[n]) and the shape of one sample. It does
not depend on the batch it is drawn in, on the order, the process or the device, so a store of
pairs needs to keep no noise.

    key     = (seed low, seed high)                         32-bit words
    counter = (block, 0, index low, index high)             one block makes four elements
    r       = Philox4x32-10(counter, key)                   four 32-bit words
    u_k     = (r_k + 1/2) / 2**32
    z       = sqrt(-2 ln u_0) (cos, sin)(2 pi u_1),  sqrt(-2 ln u_2) (cos, sin)(2 pi u_3)

Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


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
    are computed in float64 and rounded once. Raises ValueError for a seed out of range.
    """
    shape = tuple(shape)
    size = math.prod(shape)
    blocks = -(-size // 4)
    words = philox(_counters(indices, blocks, device), _split(_unsigned(seed, "seed")))
    u = [(w.double() + 0.5) * 2.0**-32 for w in words]
    radius, angle = (u[0].log(), u[2].log()), (u[1], u[3])
    normals = []
    for log_u, turn in zip(radius, angle, strict=True):
        r, phi = (-2 * log_u).sqrt(), (2 * math.pi) * turn
        normals += [r * phi.cos(), r * phi.sin()]
    z = torch.stack(normals, dim=-1).flatten(1)[:, :size]  # [N, blocks, 4] -> [N, size]
    return z.to(dtype).reshape(len(z), *shape)


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Apply Philox4x32-10 to four counter words under a two-word key.

    Words are unsigned 32-bit values held in int64 tensors of one shape, or ints.
    """
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64) for c in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product; halves of `a` keep int64 from overflowing."""
    low = (a & 0xFFFF) * m
    middle = (a >> 16) * m + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _counters(indices: Iterable[int] | Tensor, blocks: int, device) -> tuple[Tensor | int, ...]:
    if not isinstance(indices, Tensor):
        # Above 2**63 the int64 with the same bits is negative; masks below undo the sign.
        indices = torch.tensor(
            [i - 2**64 if i >= 2**63 else i for i in (_unsigned(i, "index") for i in indices)],
            dtype=torch.int64,
        )
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise ValueError(
            f"noise: indices must be a 1-D int64 tensor, not {indices.dtype} with "
            f"{indices.dim()} dimensions"
        )
    indices = indices.to(device)[:, None]
    block = torch.arange(blocks, device=indices.device).expand(len(indices), -1)
    return block, torch.zeros_like(block), indices & _MASK, (indices >> 32) & _MASK


def _unsigned(value: int, what: str) -> int:
    value = operator.index(value)
    if not 0 <= value < 2**64:
        raise ValueError(f"noise: {what} must lie in 0 .. 2**64 - 1, not {value}")
    return value


def _split(value: int) -> tuple[int, int]:
    return value & _MASK, value >> 32
