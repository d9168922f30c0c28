"""Standard normal noise [N, size]; row n depends on (seed, indices[n]) and nothing else.

    r = Philox4x32-10(counter = (block, 0, index), key = seed)      u_k = (r_k + 1/2) / 2**32
    z = sqrt(-2 ln u_0) (cos, sin)(2 pi u_1),  sqrt(-2 ln u_2) (cos, sin)(2 pi u_3)

Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.

A lane makes whole blocks of four elements, which are neighbors in memory. Words become floats where
nothing is lost: if u is close to 1, ln u is computed from the exact 1 - u, and an angle is measured
from the nearest axis. So the float32 polynomials of Cephes suffice. Their relative error is at most
4 * 2**-23, near zeros as well. CUDA's own sine would need memory for large angles, and there are
none here.

Traffic: only the indices are read, and every element is written once. An element takes about 50
instructions (benchmarks/results/aot.json), more than an H100 issues while it writes 4 bytes, so
arithmetic is the limit. GPU figures: not measured yet.

Contract: indices are contiguous int64; all 64 bits of an index and of the seed matter. Noise is
float32, float16 or bfloat16. No atomics: equal arguments give equal bits, and a row gives the bits
that it would give alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 256  # of four elements, a program

TURN = tl.constexpr(1.46291807926715968e-9)  # 2 pi / 2**32
ROOT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)


@triton.jit
def _minus_two_log(word):
    """Compute -2 ln u for u = (word + 1/2) / 2**32.

    With u = 2**e * (1 + f) and f from sqrt(1/2) - 1 to sqrt(2) - 1, ln u = e ln 2 + ln(1 + f).
    """
    scaled = word.to(tl.float32) + 0.5
    above = scaled.to(tl.int32, bitcast=True) - ROOT_HALF
    e = (above >> 23) - 32
    mantissa = ((above & 0x7FFFFF) + ROOT_HALF).to(tl.float32, bitcast=True)
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * -(2.0**-32)  # u - 1
    f = tl.where(e == 0, rest, mantissa - 1.0)
    e = e.to(tl.float32)
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    p = p * f * (f * f) - e * 2.12194440e-4 - 0.5 * (f * f)
    return ((p + f) + e * 0.693359375) * -2.0


@triton.jit
def _box_muller(radius, angle):
    """Return the two normals of two words.

    The angle is split into the nearest quarter of a turn and a rest of at most an eighth.
    """
    r = tl.sqrt(_minus_two_log(radius))
    quarter = (angle + 0x20000000) >> 30
    left = (angle - (quarter << 30)).to(tl.int32, bitcast=True)
    x = (left.to(tl.float32) + 0.5) * TURN
    square = x * x
    sine = square * -1.9515295891e-4 + 8.3321608736e-3
    sine = sine * square - 1.6666654611e-1
    sine = sine * square * x + x
    cosine = square * 2.443315711809948e-5 - 1.388731625493765e-3
    cosine = cosine * square + 4.166664568298827e-2
    cosine = cosine * (square * square) - 0.5 * square + 1.0
    odd = (quarter & 1) != 0
    along, across = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -along, along)
    second = tl.where((quarter & 2) != 0, -across, across)
    return r * first, r * second


@triton.jit
def normals(block, index, seed_low, seed_high):
    """Return the normals of blocks [B] of an index, [4 * B] in order.

    The seed is given as two int32 of its bits. Their values must not select another compilation.
    """
    c0, zero = block.to(tl.uint32), block.to(tl.uint32) * 0
    low, high = zero + index.to(tl.uint32), zero + (index >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox_impl(
        c0, zero, low, high, seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    )
    z0, z1 = _box_muller(r0, r1)
    z2, z3 = _box_muller(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _noise_kernel(indices_ptr, z_ptr, size, tiles, seed_low, seed_high, BLOCKS: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    z = normals(block, tl.load(indices_ptr + row), seed_low, seed_high)
    offset = tile * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    tl.store(z_ptr + row * size + offset, z, mask=offset < size)


def halves(seed: int) -> dict[str, int]:
    """Return the low and the high 32 bits of a seed, signed, as arguments of a kernel."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return {"seed_low": low - (low >> 31 << 32), "seed_high": high - (high >> 31 << 32)}


def noise(indices: Tensor, seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return noise [N, size] of a dtype for contiguous int64 indices [N]."""
    z = torch.empty((len(indices), size), dtype=dtype, device=indices.device)
    tiles = triton.cdiv(size, 4 * BLOCKS)
    if z.numel():
        _noise_kernel[(len(indices) * tiles,)](
            indices_ptr=indices, z_ptr=z, size=size, tiles=tiles, **halves(seed), BLOCKS=BLOCKS
        )
    return z
