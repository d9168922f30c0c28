"""Standard normal noise that depends on (seed, index) alone, by a counter-based generator.

    key     = (seed low, seed high)                         32-bit words
    counter = (block, 0, index low, index high)             one block makes four elements
    r       = Philox4x32-10(counter, key)                   four 32-bit words
    u_k     = (r_k + 1/2) / 2**32
    z       = sqrt(-2 ln u_0) (cos, sin)(2 pi u_1),  sqrt(-2 ln u_2) (cos, sin)(2 pi u_3)

Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Op, Unsupported, triton_kernels

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def noise(
    seed: int, indices: Tensor, shape: Iterable[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw standard normal noise [N, *shape]; row n depends on (seed, indices[n]) and nothing else.

    `seed` is a 64-bit unsigned integer, indices [N] int64, taken as the bits of such. The integers
    behind the noise are the same everywhere. The reference computes the normals in float64, from
    which those of the kernels differ by 4 * 2**-23 of their size at most, before they are rounded
    to a narrower dtype.

    Raises:
        ValueError: the seed is out of range, indices are of another kind, or dtype is not floating.
    """
    shape = tuple(shape)
    bits = signed("noise", "seed", seed)
    z = _op(indices, bits, math.prod(shape), dtype)
    return z.view(len(indices), *shape)


def signed(name: str, what: str, value: int) -> int:
    """Return the signed 64-bit integer with the bits of an unsigned one, or raise ValueError."""
    if not 0 <= value < 2**64:
        raise ValueError(f"{name}: {what} must lie in 0 .. 2**64 - 1, not {value}")
    return value - 2**64 if value >= 2**63 else value


def reference(indices: Tensor, seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """Compute in float64 and round once."""
    blocks = -(-size // 4)
    words = philox(_counters(indices, blocks), (seed & _MASK, seed >> 32 & _MASK))
    u = [(w.double() + 0.5) * 2.0**-32 for w in words]
    normals = []
    for first, second in (u[:2], u[2:]):
        r, phi = (-2 * first.log()).sqrt(), (2 * math.pi) * second
        normals += [r * phi.cos(), r * phi.sin()]
    z = torch.stack(normals, dim=-1).flatten(1)  # [N, blocks, 4] -> [N, blocks * 4]
    return z[:, :size].to(dtype).contiguous()


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


def _counters(indices: Tensor, blocks: int) -> tuple[Tensor, ...]:
    indices = indices[:, None]
    block = torch.arange(blocks, dtype=torch.int64, device=indices.device).expand(len(indices), -1)
    return block, torch.zeros_like(block), indices & _MASK, (indices >> 32) & _MASK


def fake(indices, seed, size, dtype):
    return indices.new_empty((indices.shape[0], size), dtype=dtype)


_op = Op(
    "noise(Tensor indices, int seed, int size, ScalarType dtype) -> Tensor",
    """
    indices [N] int64
    size >= 0 : size must be 0 or more, not {size}
    dtype.is_floating_point : dtype must be floating point, not {dtype}
    """,
    reference,
    fake,
)


@_op.backend("cpu", "cpu")
def _():
    kernel = _native.cpu_library().ds_noise

    def launch(indices, seed, size, dtype):
        if dtype not in (torch.float32, torch.bfloat16):
            raise Unsupported(f"it makes float32 or bfloat16, not {dtype}")
        indices = indices.contiguous()
        z = fake(indices, seed, size, dtype)
        is_bf16 = dtype == torch.bfloat16
        error = kernel(indices.data_ptr(), z.data_ptr(), seed, len(indices), size, is_bf16)
        _native.check("noise", error)
        return z

    return launch


@_op.backend("triton", "cuda")
def _():
    kernels = triton_kernels("noise")

    def launch(indices, seed, size, dtype):
        if dtype not in _native.TYPES:
            raise Unsupported(f"it makes float32, float16 or bfloat16, not {dtype}")
        with torch.cuda.device_of(indices):
            return kernels.noise(indices.contiguous(), seed, size, dtype)

    return launch
