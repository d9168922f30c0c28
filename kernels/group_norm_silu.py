"""GroupNorm, with SiLU or without, and its gradient, on x [N, pixels, C]: channels_last memory.

    m = cat(x + shift + residual, skip)     each of the three where it is given; rounded as x is
    xhat = (m - mean) / sqrt(var + eps)     mean and var over the pixels and channels of a group
    y = f(weight * xhat + bias)             f is SiLU or the identity

    g = grad * f'(weight * xhat + bias)     d_bias = sum g      d_weight = sum g * xhat
    d_m = (h - mean(h) - xhat * mean(h * xhat)) / sqrt(var + eps) + grad_merged, h = g * weight
    d_m = cat(d_x, d_skip)                  d_residual = d_x    d_shift = sum over pixels of d_x

Wu & He 2018, arXiv:1803.08494, Eq. 1, 2, 6 and 7.

Rows, never groups: a group of 4 channels is 8 bytes of a pixel, and memory hands over 32. A program
takes as many whole groups as its tile has room for and reads their channels of all pixels. It sums
over pixels first, which leaves one value a channel, then over the channels of a group.

Traffic, in elements of the type of x for each element of x:

                forward                    backward                        where
    one pass    2: m, y                    3: grad, m, d_m                 a slice fits registers
    two passes  3: m for sums, then m, y   5: grad, m for sums, then all   elsewhere

Reading m is reading x, the residual if there is one, and skip; m and grad_merged are one more each
where the caller keeps m, and backward then reads m alone. In two passes the first one writes m and
the other reads it. A shift is one row an image. So a residual and m cost 2 where an addition costs
3, a shift costs nothing where it would cost 2, and concatenation 1 where it would cost 2, for m, or
nothing. What is left out is memory's; a program that lies on one side of the seam loads there only.

and beside it two float32 a channel, written and read: backward for each image, which adds 17 % at
4 x 4 pixels of bfloat16, 4 % at 8 x 8, 0.3 % at 32 x 32; in two passes for each tile, which adds
1 % forward and backward.

What limits it is memory, with little to spare. While an H200 moves an element of bfloat16 once each
way it issues about 27 instructions a lane; forward takes 13 to 21 of them (benchmarks/results/
aot.json), and backward 23 to 39 of the 41 that its traffic leaves. Hence the sigmoid by reciprocal
root, constants where they save instructions, and tiles small enough for two programs a
multiprocessor, so that one loads while the other computes. GPU figures: not measured yet.

Contract: tensors are contiguous (shift: its rows) and on one device. Those with pixels have one
type: float32, float16 or bfloat16; weight, bias and shift have any floating type; statistics and
sums are float32. y alone may also be float8_e4m3fn, half of a write, rounded once, to 448 at most.
The variance is a sum of squares about the mean, never a difference of sums. No atomics: equal
arguments give equal bits, and an image those that it would have alone. NaN and infinity spread over
their group and no further.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile, and those a thread holds: of one tensor forward, of each of two backward. The
# smaller tile leaves room for a second program; the larger is for groups that need it to fit.
FORWARD_TILES, FORWARD_THREAD = (16384, 32768), 64
BACKWARD_TILES, BACKWARD_THREAD = (8192, 16384), 32
# One pass takes images of so many pixels at most: of more, a tile would hold too few channels.
ONE_PASS_PIXELS = 1024
# The widest tiles: 128 bytes of bfloat16 are enough; one pass takes more to be worth a program.
ONE_PASS_CHANNELS, TWO_PASS_CHANNELS = 128, 64
# The float32 tables of sums, by tile or by image, are read in tiles of rows and channels.
TABLE_ROWS, TABLE_CHANNELS = 256, 16

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def sigmoid(z):
    """Compute 1 / (1 + exp(-z)) in 5 instructions; exp and a division would take 10."""
    root = tl.rsqrt(1.0 + tl.exp2(z * -LOG2_E))
    return root * root


@triton.jit
def _members(PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return [BLOCK_G, BLOCK_C]: whether a channel of the slice is in a group of the slice."""
    return (tl.arange(0, BLOCK_C) // PER_GROUP)[None, :] == tl.arange(0, BLOCK_G)[:, None]


@triton.jit
def _group_sums(values, members):
    """Sum [BLOCK_C] to [BLOCK_G]. Others are left out, not multiplied by 0: they may be NaN."""
    return tl.sum(tl.where(members, values[None, :], 0.0), 1)


@triton.jit
def _per_channel(values, members):
    """Give every channel the value of its group: [BLOCK_G] to [BLOCK_C]."""
    return tl.sum(tl.where(members, values[:, None], 0.0), 0)


@triton.jit
def _load_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channel, inside):
    """Load mean and rstd of the groups of channels, and weight and bias of the channels."""
    mean = tl.load(mean_ptr + group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias


@triton.jit
def _slice(
    channels, slices,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return what a program of one pass works on: all pixels of GROUPS groups of an image."""
    image = (tl.program_id(0) // slices).to(tl.int64)
    first_group = tl.program_id(0) % slices * GROUPS
    c = tl.arange(0, BLOCK_C)
    channel = first_group * PER_GROUP + c
    inside = (c < GROUPS * PER_GROUP) & (channel < channels)
    mask = (tl.arange(0, BLOCK_P) < PIXELS)[:, None] & inside[None, :]
    return image, first_group, image * PIXELS, channel, inside, mask


@triton.jit
def _tile(pixels, channels, tiles, slices, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return what a program of two passes works on: BLOCK_P pixels, BLOCK_C channels of an image.

    A row of the tables of sums is an image and a tile of its pixels.
    """
    table_row = (tl.program_id(0) // slices).to(tl.int64)
    image, first_pixel = table_row // tiles, table_row % tiles * BLOCK_P
    channel = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    rows = tl.minimum(pixels - first_pixel, BLOCK_P)
    mask = (tl.arange(0, BLOCK_P) < rows)[:, None] & inside[None, :]
    return image, table_row, image * pixels + first_pixel, channel, inside, mask, rows


@triton.jit
def _at(ptr, pixel, channel, channels, BLOCK_P: tl.constexpr):
    """Return pointers to channels of BLOCK_P pixels, from one on, of a tensor [N, pixels, C]."""
    return ptr + pixel * channels + (tl.arange(0, BLOCK_P)[:, None] * channels + channel[None, :])


@triton.jit
def _load_merged(
    x_ptr, shift_ptr, residual_ptr, skip_ptr, image, pixel, channel, mask,
    split, channels, shift_stride, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Load a tile of cat(x + shift + residual, skip), 0 where the mask is false.

    x ends before channel `split`, where skip starts: anywhere, also within a group.
    """
    left, width = mask, channels
    if skip_ptr is not None:
        left, width = mask & (channel < split)[None, :], split
    x = tl.load(_at(x_ptr, pixel, channel, width, BLOCK_P), mask=left, other=0.0)
    if (shift_ptr is not None) or (residual_ptr is not None):
        total = x.to(tl.float32)
        if shift_ptr is not None:
            shift_ptr += image * shift_stride + channel
            shift = tl.load(shift_ptr, mask=channel < width, other=0.0).to(tl.float32)
            total = tl.where(left, total + shift[None, :], 0.0)
        if residual_ptr is not None:
            residual_ptr = _at(residual_ptr, pixel, channel, width, BLOCK_P)
            total += tl.load(residual_ptr, mask=left, other=0.0).to(tl.float32)
        x = total.to(x.dtype)
    if skip_ptr is not None:
        skip_ptr = _at(skip_ptr, pixel, channel - split, channels - split, BLOCK_P)
        x = tl.load(skip_ptr, mask=mask & (channel >= split)[None, :], other=x)
    return x


@triton.jit
def _store_split(
    d_x_ptr, d_skip_ptr, d_merged, pixel, channel, mask, split, channels, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Store a tile of the gradient of cat(x, skip) in those of x and skip."""
    left, width = mask, channels
    if d_skip_ptr is not None:
        left, width = mask & (channel < split)[None, :], split
        d_skip_ptr = _at(d_skip_ptr, pixel, channel - split, channels - split, BLOCK_P)
        tl.store(d_skip_ptr, d_merged, mask=mask & (channel >= split)[None, :])
    tl.store(_at(d_x_ptr, pixel, channel, width, BLOCK_P), d_merged, mask=left)


@triton.jit
def _column_sums(table_ptr, count, stride, inside, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum rows of a table to [BLOCK_C], always in one order; table_ptr are columns of the first."""
    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, count, BLOCK_T):
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mask = (row < count) & inside[None, :]
        sums += tl.load(table_ptr[None, :] + row * stride, mask=mask, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _groups(
    groups, slices, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Return what a program that merges sums works on: GROUPS groups of an image."""
    image = (tl.program_id(0) // slices).to(tl.int64)
    first_group = tl.program_id(0) % slices * GROUPS
    c = tl.arange(0, BLOCK_C)
    channel = first_group * PER_GROUP + c
    inside = (c < GROUPS * PER_GROUP) & (channel < groups * PER_GROUP)
    return image, first_group, channel, inside


@triton.jit
def _store_groups(
    first_ptr, first, second_ptr, second, image, first_group, groups,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Store two values a group, each in a table [N, groups]."""
    g = tl.arange(0, BLOCK_G)
    valid = (g < GROUPS) & (first_group + g < groups)
    tl.store(first_ptr + image * groups + first_group + g, first, mask=valid)
    tl.store(second_ptr + image * groups + first_group + g, second, mask=valid)


@triton.jit
def _fwd_kernel(
    x_ptr, shift_ptr, residual_ptr, skip_ptr, weight_ptr, bias_ptr,
    y_ptr, mean_ptr, rstd_ptr, merged_ptr,
    split, channels, shift_stride, groups, slices, eps,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One pass forward."""
    image, first_group, pixel, channel, inside, mask = _slice(
        channels, slices, PIXELS, GROUPS, PER_GROUP, BLOCK_P, BLOCK_C
    )
    merged = _load_merged(
        x_ptr, shift_ptr, residual_ptr, skip_ptr, image, pixel, channel, mask,
        split, channels, shift_stride, BLOCK_P,
    )  # fmt: skip
    if merged_ptr is not None:
        tl.store(_at(merged_ptr, pixel, channel, channels, BLOCK_P), merged, mask=mask)
    x = merged.to(tl.float32)

    members = _members(PER_GROUP, BLOCK_G, BLOCK_C)
    count = PIXELS * PER_GROUP
    mean = _group_sums(tl.sum(x, 0), members) / count
    rows = (tl.arange(0, BLOCK_P) < PIXELS)[:, None]
    centred = tl.where(rows, x - _per_channel(mean, members)[None, :], 0.0)
    rstd = tl.rsqrt(_group_sums(tl.sum(centred * centred, 0), members) / count + eps)
    _store_groups(mean_ptr, mean, rstd_ptr, rstd, image, first_group, groups, GROUPS, BLOCK_G)

    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    y = centred * (weight * _per_channel(rstd, members))[None, :] + bias[None, :]
    if SILU:
        y *= sigmoid(y)
    tl.store(_at(y_ptr, pixel, channel, channels, BLOCK_P), y, mask=mask)


@triton.jit
def _fwd_sums_kernel(
    x_ptr, shift_ptr, residual_ptr, skip_ptr, table_ptr, merged_ptr,
    pixels, split, channels, shift_stride, tiles, slices,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Two passes forward, 1 of 3: mean and centred squares of each channel of a tile of pixels."""
    image, table_row, pixel, channel, inside, mask, rows = _tile(
        pixels, channels, tiles, slices, BLOCK_P, BLOCK_C
    )
    merged = _load_merged(
        x_ptr, shift_ptr, residual_ptr, skip_ptr, image, pixel, channel, mask,
        split, channels, shift_stride, BLOCK_P,
    )  # fmt: skip
    if merged_ptr is not None:
        tl.store(_at(merged_ptr, pixel, channel, channels, BLOCK_P), merged, mask=mask)
    x = merged.to(tl.float32)
    mean = tl.sum(x, 0) / rows
    centred = tl.where(mask, x - mean[None, :], 0.0)
    table_ptr += table_row * 2 * channels + channel
    tl.store(table_ptr, mean, mask=inside)
    tl.store(table_ptr + channels, tl.sum(centred * centred, 0), mask=inside)


@triton.jit
def _fwd_merge_kernel(
    table_ptr, mean_ptr, rstd_ptr, pixels, channels, groups, tiles, slices, eps,
    TILE_P: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Two passes forward, 2 of 3: merge tiles and channels to groups.

    The squares about the mean of all are those about the mean of each part, and the squares of what
    the means differ by. Chan et al. 1979, STAN-CS-79-773, Eq. 2.1, for many parts at once.
    """
    image, first_group, channel, inside = _groups(groups, slices, GROUPS, PER_GROUP, BLOCK_C)
    members = _members(PER_GROUP, BLOCK_G, BLOCK_C)
    table_ptr += image * tiles * 2 * channels + channel[None, :]
    count = pixels * 1.0 * PER_GROUP

    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first_tile in range(0, tiles, BLOCK_T):
        t = first_tile + tl.arange(0, BLOCK_T)[:, None]
        mask = (t < tiles) & inside[None, :]
        rows = tl.minimum(pixels - t * TILE_P, TILE_P)
        sums += rows * tl.load(table_ptr + t * 2 * channels, mask=mask, other=0.0)
    mean = _group_sums(tl.sum(sums, 0), members) / count

    centre = _per_channel(mean, members)[None, :]
    squares = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first_tile in range(0, tiles, BLOCK_T):
        t = first_tile + tl.arange(0, BLOCK_T)[:, None]
        mask = (t < tiles) & inside[None, :]
        rows = tl.minimum(pixels - t * TILE_P, TILE_P)
        off = tl.load(table_ptr + t * 2 * channels, mask=mask, other=0.0) - centre
        own = tl.load(table_ptr + (t * 2 + 1) * channels, mask=mask, other=0.0)
        squares += tl.where(mask, own + rows * off * off, 0.0)
    rstd = tl.rsqrt(_group_sums(tl.sum(squares, 0), members) / count + eps)
    _store_groups(mean_ptr, mean, rstd_ptr, rstd, image, first_group, groups, GROUPS, BLOCK_G)


@triton.jit
def _fwd_apply_kernel(
    x_ptr, shift_ptr, residual_ptr, skip_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    pixels, split, channels, shift_stride, groups, tiles, slices,
    PER_GROUP: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Two passes forward, 3 of 3.

    The mean is taken off before scaling: folded into the shift, it would cost precision where it is
    large beside the standard deviation.
    """
    image, _, pixel, channel, inside, mask, _ = _tile(
        pixels, channels, tiles, slices, BLOCK_P, BLOCK_C
    )
    mean, rstd, weight, bias = _load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, image * groups + channel // PER_GROUP, channel,
        inside,
    )  # fmt: skip
    x = _load_merged(
        x_ptr, shift_ptr, residual_ptr, skip_ptr, image, pixel, channel, mask,
        split, channels, shift_stride, BLOCK_P,
    ).to(tl.float32)  # fmt: skip
    y = (x - mean[None, :]) * (weight * rstd)[None, :] + bias[None, :]
    if SILU:
        y *= sigmoid(y)
    tl.store(_at(y_ptr, pixel, channel, channels, BLOCK_P), y, mask=mask)


def _whole_groups(
    pixels: int, channels: int, groups: int, element: int, tiles: tuple[int, ...]
) -> int:
    """Return how many groups a program of one pass takes; 0 where not even one fits a tile.

    As many as fit, so that slices start on sectors of memory, or else on vectors, if at all
    possible, of elements of so many bytes. It depends on the shape of an image only, as then do the
    bits of the result.
    """
    per_group = channels // groups
    if pixels > ONE_PASS_PIXELS:
        return 0
    for alignment in (32, 16, 1):  # bytes
        step = alignment // math.gcd(alignment, per_group * element)
        for tile in tiles:
            widest = min(tile // triton.next_power_of_2(pixels), ONE_PASS_CHANNELS)
            taken = min(widest // per_group, groups)
            if taken < groups:
                taken = taken // step * step
            if taken:
                return taken
    return 0


def _blocks(pixels: int, taken: int, per_group: int) -> dict[str, int]:
    """Return the sizes of a tile that holds the pixels of the groups taken."""
    return {
        "BLOCK_P": triton.next_power_of_2(pixels),
        "BLOCK_G": triton.next_power_of_2(taken),
        "BLOCK_C": triton.next_power_of_2(taken * per_group),
    }


def _warps(elements: int, per_thread: int) -> int:
    return min(max(elements // (32 * per_thread), 1), 16)


class _Cut(NamedTuple):
    """How two passes cut an image: tiles of pixels, slices of channels, slices of groups."""

    tiles: int
    slices: int
    blocks: dict[str, int]
    merge_slices: int
    merge_blocks: dict[str, int]


def _cut(pixels: int, channels: int, groups: int, tile: int) -> _Cut:
    per_group = channels // groups
    block_c = min(triton.next_power_of_2(channels), TWO_PASS_CHANNELS)
    block_p = min(triton.next_power_of_2(pixels), tile // block_c)
    taken = min(max(TABLE_CHANNELS // per_group, 1), groups)
    merge_c = triton.next_power_of_2(taken * per_group)
    return _Cut(
        tiles=triton.cdiv(pixels, block_p),
        slices=triton.cdiv(channels, block_c),
        blocks={"BLOCK_P": block_p, "BLOCK_C": block_c},
        merge_slices=triton.cdiv(groups, taken),
        merge_blocks={
            "GROUPS": taken,
            "BLOCK_T": max(TABLE_ROWS * TABLE_CHANNELS // merge_c, 1),
            "BLOCK_G": triton.next_power_of_2(taken),
            "BLOCK_C": merge_c,
        },
    )


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    keep: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return y, float32 mean and 1 / sqrt(var + eps) of each group [N, groups], and m to keep.

    x is contiguous [N, pixels, split] of a narrow type or float32, with pixels and channels in it;
    so are residual, and skip [N, pixels, C - split]. shift is [N, split]. y and m are
    [N, pixels, C]; y is of `dtype`, if it is given, which float8_e4m3fn also can be.
    """
    images, pixels, split = x.shape
    channels = weight.numel()
    per_group = channels // groups
    weight, bias = weight.contiguous(), bias.contiguous()
    y = torch.empty((images, pixels, channels), dtype=dtype or x.dtype, device=x.device)
    merged = torch.empty_like(y, dtype=x.dtype) if keep else None
    mean = torch.empty((images, groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    sources = x, shift, residual, skip
    widths = split, channels, 0 if shift is None else shift.stride(0)

    # With m to store, the larger tile leaves no registers to round y to another type.
    tiles = FORWARD_TILES[:1] if keep and y.dtype != x.dtype else FORWARD_TILES
    taken = _whole_groups(pixels, channels, groups, x.element_size(), tiles)
    if taken:
        slices = triton.cdiv(groups, taken)
        blocks = _blocks(pixels, taken, per_group)
        _fwd_kernel[(images * slices,)](
            *sources, weight, bias, y, mean, rstd, merged, *widths, groups, slices, eps,
            PIXELS=pixels, GROUPS=taken, PER_GROUP=per_group, SILU=silu, **blocks,
            # With m to store as well, a thread that holds as much of x has too few registers.
            num_warps=_warps(
                blocks["BLOCK_P"] * blocks["BLOCK_C"], FORWARD_THREAD // (2 if keep else 1)
            ),
        )  # fmt: skip
        return y, mean, rstd, merged

    cut = _cut(pixels, channels, groups, FORWARD_TILES[0])
    table = torch.empty((images, cut.tiles, 2, channels), dtype=torch.float32, device=x.device)
    _fwd_sums_kernel[(images * cut.tiles * cut.slices,)](
        *sources, table, merged, pixels, *widths, cut.tiles, cut.slices,
        **cut.blocks, num_warps=_warps(FORWARD_TILES[0], FORWARD_THREAD),
    )  # fmt: skip
    if keep:
        sources, widths = (merged, None, None, None), (channels, channels, 0)
    _finish(
        sources, widths, weight, bias, groups, eps, silu, table, cut.blocks["BLOCK_P"],
        y, mean, rstd,
    )  # fmt: skip
    return y, mean, rstd, merged


def norm_from_sums(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    table: Tensor,
    tile: int,
) -> Tensor:
    """Return y of x [N, pixels, C], the first of whose two passes whoever made x has done.

    table is float32 [N, tiles, 2, C]: mean and centred squares of the channels of `tile` pixels.
    """
    mean = torch.empty((len(x), groups), dtype=torch.float32, device=x.device)
    rstd, y, channels = torch.empty_like(mean), torch.empty_like(x), x.shape[2]
    sources, widths = (x, None, None, None), (channels, channels, 0)
    _finish(sources, widths, weight, bias, groups, eps, silu, table, tile, y, mean, rstd)
    return y


def _finish(sources, widths, weight, bias, groups, eps, silu, table, tile, y, mean, rstd) -> None:
    """Launch the last two of the three kernels of two passes."""
    images, pixels, channels = y.shape
    cut, per_group = _cut(pixels, channels, groups, FORWARD_TILES[0]), channels // groups
    _fwd_merge_kernel[(images * cut.merge_slices,)](
        table, mean, rstd, pixels, channels, groups, table.shape[1], cut.merge_slices, eps,
        TILE_P=tile, PER_GROUP=per_group, **cut.merge_blocks,
    )  # fmt: skip
    _fwd_apply_kernel[(images * cut.tiles * cut.slices,)](
        *sources, weight, bias, y, mean, rstd, pixels, *widths, groups, cut.tiles, cut.slices,
        PER_GROUP=per_group, SILU=silu, **cut.blocks,
        num_warps=_warps(FORWARD_TILES[0], FORWARD_THREAD),
    )  # fmt: skip


@triton.jit
def _centred_and_g(x, grad, mean, rstd, weight, bias, SILU: tl.constexpr):
    """Return the tiles x - mean and g. Multiplying by rstd is left to one value a channel."""
    centred = x - mean[None, :]
    if SILU:
        z = centred * (weight * rstd)[None, :] + bias[None, :]
        s = sigmoid(z)
        grad *= s * (1.0 + z * (1.0 - s))
    return centred, grad


@triton.jit
def _d_merged(centred, g, rstd, weight, mean_h, mean_hx):
    along = (rstd * rstd * mean_hx)[None, :]
    return g * (weight * rstd)[None, :] - (centred * along + (rstd * mean_h)[None, :])


@triton.jit
def _bwd_kernel(
    grad_ptr, x_ptr, shift_ptr, residual_ptr, skip_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    grad_merged_ptr, d_x_ptr, d_skip_ptr, d_shift_ptr, rows_ptr,
    split, channels, shift_stride, groups, slices,
    PIXELS: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One pass backward: d_x, d_skip, d_shift, and this image's part of d_bias and d_weight."""
    image, _, pixel, channel, inside, mask = _slice(
        channels, slices, PIXELS, GROUPS, PER_GROUP, BLOCK_P, BLOCK_C
    )
    mean, rstd, weight, bias = _load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, image * groups + channel // PER_GROUP, channel,
        inside,
    )  # fmt: skip
    x = _load_merged(
        x_ptr, shift_ptr, residual_ptr, skip_ptr, image, pixel, channel, mask,
        split, channels, shift_stride, BLOCK_P,
    ).to(tl.float32)  # fmt: skip
    grad_ptr = _at(grad_ptr, pixel, channel, channels, BLOCK_P)
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    centred, g = _centred_and_g(x, grad, mean, rstd, weight, bias, SILU)

    sum_g, sum_gx = tl.sum(g, 0), tl.sum(g * centred, 0) * rstd
    rows_ptr += image * 2 * channels + channel
    tl.store(rows_ptr, sum_g, mask=inside)
    tl.store(rows_ptr + channels, sum_gx, mask=inside)

    members = _members(PER_GROUP, BLOCK_G, BLOCK_C)
    count = PIXELS * PER_GROUP
    mean_h = _per_channel(_group_sums(sum_g * weight, members) / count, members)
    mean_hx = _per_channel(_group_sums(sum_gx * weight, members) / count, members)
    d_merged = _d_merged(centred, g, rstd, weight, mean_h, mean_hx)
    if grad_merged_ptr is not None:
        grad_merged_ptr = _at(grad_merged_ptr, pixel, channel, channels, BLOCK_P)
        d_merged += tl.load(grad_merged_ptr, mask=mask, other=0.0).to(tl.float32)
    _store_split(d_x_ptr, d_skip_ptr, d_merged, pixel, channel, mask, split, channels, BLOCK_P)
    if d_shift_ptr is not None:
        d_shift = tl.sum(tl.where(mask, d_merged, 0.0), 0)
        tl.store(d_shift_ptr + image * split + channel, d_shift, mask=inside & (channel < split))


@triton.jit
def _bwd_sums_kernel(
    grad_ptr, x_ptr, shift_ptr, residual_ptr, skip_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    table_ptr, pixels, split, channels, shift_stride, groups, tiles, slices,
    PER_GROUP: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Two passes backward, 1 of 4: sums of g and g * xhat of each channel of a tile of pixels."""
    image, table_row, pixel, channel, inside, mask, _ = _tile(
        pixels, channels, tiles, slices, BLOCK_P, BLOCK_C
    )
    mean, rstd, weight, bias = _load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, image * groups + channel // PER_GROUP, channel,
        inside,
    )  # fmt: skip
    x = _load_merged(
        x_ptr, shift_ptr, residual_ptr, skip_ptr, image, pixel, channel, mask,
        split, channels, shift_stride, BLOCK_P,
    ).to(tl.float32)  # fmt: skip
    grad_ptr = _at(grad_ptr, pixel, channel, channels, BLOCK_P)
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    centred, g = _centred_and_g(x, grad, mean, rstd, weight, bias, SILU)
    table_ptr += table_row * 2 * channels + channel
    tl.store(table_ptr, tl.sum(g, 0), mask=inside)
    tl.store(table_ptr + channels, tl.sum(g * centred, 0) * rstd, mask=inside)


@triton.jit
def _bwd_merge_kernel(
    table_ptr, weight_ptr, rows_ptr, mean_h_ptr, mean_hx_ptr,
    pixels, channels, groups, tiles, slices,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Two passes backward, 2 of 4: sum tiles to a row for the image, and channels to groups."""
    image, first_group, channel, inside = _groups(groups, slices, GROUPS, PER_GROUP, BLOCK_C)
    table_ptr += image * tiles * 2 * channels + channel
    sum_g = _column_sums(table_ptr, tiles, 2 * channels, inside, BLOCK_T, BLOCK_C)
    sum_gx = _column_sums(table_ptr + channels, tiles, 2 * channels, inside, BLOCK_T, BLOCK_C)
    rows_ptr += image * 2 * channels + channel
    tl.store(rows_ptr, sum_g, mask=inside)
    tl.store(rows_ptr + channels, sum_gx, mask=inside)

    members = _members(PER_GROUP, BLOCK_G, BLOCK_C)
    count = pixels * 1.0 * PER_GROUP
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    mean_h = _group_sums(sum_g * weight, members) / count
    mean_hx = _group_sums(sum_gx * weight, members) / count
    _store_groups(
        mean_h_ptr, mean_h, mean_hx_ptr, mean_hx, image, first_group, groups, GROUPS, BLOCK_G
    )


@triton.jit
def _bwd_apply_kernel(
    grad_ptr, x_ptr, shift_ptr, residual_ptr, skip_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    mean_h_ptr, mean_hx_ptr, grad_merged_ptr, d_x_ptr, d_skip_ptr, shift_table_ptr,
    pixels, split, channels, shift_stride, groups, tiles, slices,
    PER_GROUP: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Two passes backward, 3 of 4: d_x, d_skip, and the sums of d_x over a tile of pixels."""
    image, table_row, pixel, channel, inside, mask, _ = _tile(
        pixels, channels, tiles, slices, BLOCK_P, BLOCK_C
    )
    group = image * groups + channel // PER_GROUP
    mean, rstd, weight, bias = _load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channel, inside
    )
    mean_h = tl.load(mean_h_ptr + group, mask=inside, other=0.0)
    mean_hx = tl.load(mean_hx_ptr + group, mask=inside, other=0.0)
    x = _load_merged(
        x_ptr, shift_ptr, residual_ptr, skip_ptr, image, pixel, channel, mask,
        split, channels, shift_stride, BLOCK_P,
    ).to(tl.float32)  # fmt: skip
    grad_ptr = _at(grad_ptr, pixel, channel, channels, BLOCK_P)
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    centred, g = _centred_and_g(x, grad, mean, rstd, weight, bias, SILU)
    d_merged = _d_merged(centred, g, rstd, weight, mean_h, mean_hx)
    if grad_merged_ptr is not None:
        grad_merged_ptr = _at(grad_merged_ptr, pixel, channel, channels, BLOCK_P)
        d_merged += tl.load(grad_merged_ptr, mask=mask, other=0.0).to(tl.float32)
    _store_split(d_x_ptr, d_skip_ptr, d_merged, pixel, channel, mask, split, channels, BLOCK_P)
    if shift_table_ptr is not None:
        sums = tl.sum(tl.where(mask, d_merged, 0.0), 0)
        shift_table_ptr += table_row * split + channel
        tl.store(shift_table_ptr, sums, mask=inside & (channel < split))


@triton.jit
def _bwd_shift_kernel(
    table_ptr, d_shift_ptr, tiles, channels, slices, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Two passes backward, 4 of 4, where there is a shift: sum the tiles of an image to d_shift."""
    image = (tl.program_id(0) // slices).to(tl.int64)
    channel = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    table_ptr += image * tiles * channels + channel
    sums = _column_sums(table_ptr, tiles, channels, inside, BLOCK_T, BLOCK_C)
    tl.store(d_shift_ptr + image * channels + channel, sums, mask=inside)


@triton.jit
def _bwd_rows_kernel(
    rows_ptr, d_bias_ptr, d_weight_ptr, images, channels,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Either way, last: sum the rows of all images to d_bias and d_weight."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    rows_ptr += channel
    sum_g = _column_sums(rows_ptr, images, 2 * channels, inside, BLOCK_T, BLOCK_C)
    sum_gx = _column_sums(rows_ptr + channels, images, 2 * channels, inside, BLOCK_T, BLOCK_C)
    tl.store(d_bias_ptr + channel, sum_g, mask=inside)
    tl.store(d_weight_ptr + channel, sum_gx, mask=inside)


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
    split: int,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    grad_merged: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return d_x and d_skip in the type of x, the others in those of what they are gradients of.

    They are d_x, d_weight, d_bias, d_shift and d_skip, the last two None where there is nothing to
    return. Arguments are those of group_norm_silu, with its mean and rstd; grad is contiguous
    [N, pixels, C] of the type of x. With grad_merged, which is like grad, x is the m that was kept.
    """
    images, pixels, _ = x.shape
    channels = weight.numel()
    per_group = channels // groups
    weight, bias = weight.contiguous(), bias.contiguous()
    empty = functools.partial(torch.empty, device=x.device)
    d_x = empty((images, pixels, split), dtype=x.dtype)
    d_skip = empty((images, pixels, channels - split), dtype=x.dtype) if split < channels else None
    d_shift = None if shift is None else empty((images, split), dtype=shift.dtype)
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias)
    rows = empty((images, 2, channels), dtype=torch.float32)
    sources = (x, shift, residual, skip) if grad_merged is None else (x, None, None, None)
    widths = split, channels, 0 if shift is None else shift.stride(0)
    tensors = grad, *sources, weight, bias, mean, rstd

    taken = _whole_groups(pixels, channels, groups, x.element_size(), BACKWARD_TILES)
    if taken:
        slices = triton.cdiv(groups, taken)
        blocks = _blocks(pixels, taken, per_group)
        _bwd_kernel[(images * slices,)](
            *tensors, grad_merged, d_x, d_skip, d_shift, rows, *widths, groups, slices,
            PIXELS=pixels, GROUPS=taken, PER_GROUP=per_group, SILU=silu, **blocks,
            num_warps=min(
                _warps(blocks["BLOCK_P"] * blocks["BLOCK_C"], BACKWARD_THREAD),
                # Of 16 warps a thread has 128 registers, one too few with another tensor to read.
                16 if grad_merged is None else 8,
            ),
        )  # fmt: skip
    else:
        cut = _cut(pixels, channels, groups, BACKWARD_TILES[0])
        warps = _warps(BACKWARD_TILES[0], BACKWARD_THREAD)
        grid, merge_grid = (images * cut.tiles * cut.slices,), (images * cut.merge_slices,)
        sizes = pixels, *widths, groups, cut.tiles, cut.slices
        constants = {"PER_GROUP": per_group, "SILU": silu, **cut.blocks, "num_warps": warps}
        table = empty((images, cut.tiles, 2, channels), dtype=torch.float32)
        shift_table = None
        if shift is not None:
            shift_table = empty((images, cut.tiles, split), dtype=torch.float32)
        mean_h, mean_hx = torch.empty_like(mean), torch.empty_like(mean)
        _bwd_sums_kernel[grid](*tensors, table, *sizes, **constants)
        _bwd_merge_kernel[merge_grid](
            table, weight, rows, mean_h, mean_hx, pixels, channels, groups, cut.tiles,
            cut.merge_slices, PER_GROUP=per_group, **cut.merge_blocks,
        )  # fmt: skip
        _bwd_apply_kernel[grid](
            *tensors, mean_h, mean_hx, grad_merged, d_x, d_skip, shift_table, *sizes, **constants
        )
        if shift is not None:
            slices = triton.cdiv(split, TABLE_CHANNELS)
            _bwd_shift_kernel[(images * slices,)](
                shift_table, d_shift, cut.tiles, split, slices,
                BLOCK_T=TABLE_ROWS, BLOCK_C=TABLE_CHANNELS,
            )  # fmt: skip

    _bwd_rows_kernel[(triton.cdiv(channels, TABLE_CHANNELS),)](
        rows, d_bias, d_weight, images, channels,
        BLOCK_T=TABLE_ROWS, BLOCK_C=TABLE_CHANNELS,
    )  # fmt: skip
    return d_x, d_weight, d_bias, d_shift, d_skip
