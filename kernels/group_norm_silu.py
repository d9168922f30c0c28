"""GroupNorm, with SiLU or without, on x [N, pixels, C]: channels_last memory.

    m = cat(x + shift + residual, skip)     each of the three where it is given; rounded as x is
    xhat = (m - mean) / sqrt(var + eps)     mean and var over the pixels and channels of a group
    y = f(weight * xhat + bias)             f is SiLU or the identity

Wu & He 2018, arXiv:1803.08494, Eq. 1, 2, 6 and 7. The gradient is in group_norm_silu_backward.py.

Traffic, in elements of the type of x for each element of x:

                forward                    backward                        where
    one pass    2: m, y                    3: grad, m, d_m                 a slice fits registers
    two passes  3: m for sums, then m, y   5: grad, m for sums, then all   elsewhere

To read m is to read x, the residual and skip, if given. If the caller keeps m, forward writes one
more and backward reads m alone, and reads grad_merged. In two passes, the first pass writes m and
the second reads it. A shift is one row an image. So a residual and m cost 2 where a separate
addition costs 3; a shift costs nothing instead of 2; concatenation costs 1 instead of 2 if m is
kept, and nothing otherwise. Masked elements are not loaded: a program on one side of the seam
between x and skip reads that side only.

Two float32 a channel are also written and read. Backward has them for each image: 17 % more at
4 x 4 pixels of bfloat16, 4 % at 8 x 8, 0.3 % at 32 x 32. Two passes have them for each tile: 1 %
more, forward and backward.

Memory is the limit, but not by much. In the time in which an H200 moves an element of bfloat16 in
and out, it issues about 27 instructions a lane. Forward takes 13 to 21 of them (benchmarks/results/
aot.json), backward 23 to 39 of the 41 that its traffic allows. Hence the sigmoid by a reciprocal
root, constants where they save instructions, and tiles small enough for two programs a
multiprocessor: one loads while the other computes. GPU figures: not measured yet.

weight and bias are [C], or [N, C]: then a program reads the row of its image, and each image's row
of sums is its gradient.

Contract: tensors are contiguous (shift: its rows) and on one device. Those with pixels share one
type: float32, float16 or bfloat16. weight, bias and shift have any floating type; statistics and
sums are float32. y alone may also be float8_e4m3fn, half of a write, rounded once, to 448 at most.
The variance is a sum of squares about the mean, never a difference of sums. No atomics: equal
arguments give equal bits, and an image gives the bits that it would give alone. NaN and infinity
spread over their group and no further.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from ds.ops.kernels.group_norm_tiles import (
    Cut,
    affine_arguments,
    at,
    group_sums,
    load_channels,
    load_merged,
    load_parameter,
    members_of_groups,
    one_pass_blocks,
    one_pass_slice,
    per_channel,
    sigmoid,
    slice_of_groups,
    source_arguments,
    store_groups,
    two_pass_tile,
    warps,
    whole_groups,
)
from torch import Tensor

# Elements of a tile, and of a thread's part of it. The smaller tile leaves room for a second
# program on a multiprocessor; the larger one is for groups that do not fit the smaller.
FORWARD_TILES, FORWARD_THREAD = (16384, 32768), 64


class Norm(NamedTuple):
    """A GroupNorm with its parameters, [C] or [N, C], and whether SiLU follows it."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    silu: bool

    def affine(self) -> dict[str, Tensor | int | None]:
        """Return the parameters as arguments of a kernel."""
        return affine_arguments(self.weight, self.bias)


def group_norm_silu(
    x: Tensor,
    norm: Norm,
    keep: bool = False,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return y, float32 mean and 1 / sqrt(var + eps) of each group [N, groups], and m if kept.

    x and residual are contiguous [N, pixels, split] in float32, float16 or bfloat16, with at least
    one pixel and one channel; skip is [N, pixels, C - split] and shift is [N, split]. y and m are
    [N, pixels, C]. y has `dtype` if given, which may be float8_e4m3fn.
    """
    images, pixels, _ = x.shape
    channels = norm.weight.shape[-1]
    y = torch.empty((images, pixels, channels), dtype=dtype or x.dtype, device=x.device)
    merged = torch.empty_like(y, dtype=x.dtype) if keep else None
    source = source_arguments(x, channels, shift, residual, skip)

    # With m to store, the larger tile leaves no registers to round y to another type.
    tiles = FORWARD_TILES[:1] if keep and y.dtype != x.dtype else FORWARD_TILES
    taken = whole_groups(pixels, channels, norm.groups, x.element_size(), tiles)
    if taken:
        return y, *_one_pass(source, norm, taken, y, merged), merged
    cut = Cut.of(pixels, channels, norm.groups, FORWARD_TILES[0])
    table = torch.empty((images, cut.tiles, 2, channels), dtype=torch.float32, device=x.device)
    _fwd_sums_kernel[(images * cut.tiles * cut.slices,)](
        **source,
        table_ptr=table,
        merged_ptr=merged,
        pixels=pixels,
        tiles=cut.tiles,
        slices=cut.slices,
        **cut.blocks,
        num_warps=warps(FORWARD_TILES[0], FORWARD_THREAD),
    )
    if keep:
        source = source_arguments(merged, channels)
    return y, *_finish(source, norm, table, cut.blocks["BLOCK_P"], y), merged


def norm_from_sums(x: Tensor, norm: Norm, table: Tensor, tile: int) -> Tensor:
    """Return y of x [N, pixels, C], given the sums that the first of two passes makes.

    table is float32 [N, tiles, 2, C]: mean and centred squares of the channels of `tile` pixels.
    """
    y = torch.empty_like(x)
    _finish(source_arguments(x, x.shape[2]), norm, table, tile, y)
    return y


def _one_pass(
    source: dict, norm: Norm, taken: int, y: Tensor, merged: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel of one pass, whose programs take this many groups; return mean and rstd."""
    images, pixels, channels = y.shape
    mean, rstd = _statistics(y, norm)
    per_group, slices = channels // norm.groups, triton.cdiv(norm.groups, taken)
    blocks = one_pass_blocks(pixels, taken, per_group)
    # With m to store as well, a thread that holds as much of x has too few registers.
    per_thread = FORWARD_THREAD if merged is None else FORWARD_THREAD // 2
    _fwd_kernel[(images * slices,)](
        **source,
        **norm.affine(),
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        merged_ptr=merged,
        groups=norm.groups,
        slices=slices,
        eps=norm.eps,
        PIXELS=pixels,
        GROUPS=taken,
        PER_GROUP=per_group,
        SILU=norm.silu,
        **blocks,
        num_warps=warps(blocks["BLOCK_P"] * blocks["BLOCK_C"], per_thread),
    )
    return mean, rstd


def _finish(source: dict, norm: Norm, table: Tensor, tile: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the last two of the three kernels of two passes; return mean and rstd."""
    images, pixels, channels = y.shape
    mean, rstd = _statistics(y, norm)
    cut = Cut.of(pixels, channels, norm.groups, FORWARD_TILES[0])
    common = {
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "pixels": pixels,
        "groups": norm.groups,
        "PER_GROUP": channels // norm.groups,
    }
    _fwd_merge_kernel[(images * cut.merge_slices,)](
        **common,
        table_ptr=table,
        channels=channels,
        tiles=table.shape[1],
        slices=cut.merge_slices,
        eps=norm.eps,
        TILE_P=tile,
        **cut.merge_blocks,
    )
    _fwd_apply_kernel[(images * cut.tiles * cut.slices,)](
        **common,
        **source,
        **norm.affine(),
        y_ptr=y,
        tiles=cut.tiles,
        slices=cut.slices,
        SILU=norm.silu,
        **cut.blocks,
        num_warps=warps(FORWARD_TILES[0], FORWARD_THREAD),
    )
    return mean, rstd


def _statistics(y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return room for mean and rstd of each group."""
    mean = torch.empty((len(y), norm.groups), dtype=torch.float32, device=y.device)
    return mean, torch.empty_like(mean)


@triton.jit
def _fwd_kernel(
    x_ptr,
    shift_ptr,
    residual_ptr,
    skip_ptr,
    weight_ptr,
    bias_ptr,
    affine_stride,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    merged_ptr,
    split,
    channels,
    shift_stride,
    groups,
    slices,
    eps,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One pass forward."""
    image, first_group, pixel, channel, inside, mask = one_pass_slice(
        channels, slices, PIXELS, GROUPS, PER_GROUP, BLOCK_P, BLOCK_C
    )
    source = x_ptr, shift_ptr, residual_ptr, skip_ptr, split, channels, shift_stride
    merged = load_merged(source, image, pixel, channel, mask, BLOCK_P)
    if merged_ptr is not None:
        tl.store(at(merged_ptr, pixel, channel, channels, BLOCK_P), merged, mask=mask)
    x = merged.to(tl.float32)

    members = members_of_groups(PER_GROUP, BLOCK_G, BLOCK_C)
    count = PIXELS * PER_GROUP
    mean = group_sums(tl.sum(x, 0), members) / count
    rows = (tl.arange(0, BLOCK_P) < PIXELS)[:, None]
    centred = tl.where(rows, x - per_channel(mean, members)[None, :], 0.0)
    rstd = tl.rsqrt(group_sums(tl.sum(centred * centred, 0), members) / count + eps)
    store_groups(mean_ptr, mean, rstd_ptr, rstd, image, first_group, groups, GROUPS, BLOCK_G)

    weight = load_parameter(weight_ptr, affine_stride, image, channel, inside)
    bias = load_parameter(bias_ptr, affine_stride, image, channel, inside)
    y = centred * (weight * per_channel(rstd, members))[None, :] + bias[None, :]
    if SILU:
        y *= sigmoid(y)
    tl.store(at(y_ptr, pixel, channel, channels, BLOCK_P), y, mask=mask)


@triton.jit
def _fwd_sums_kernel(
    x_ptr,
    shift_ptr,
    residual_ptr,
    skip_ptr,
    table_ptr,
    merged_ptr,
    pixels,
    split,
    channels,
    shift_stride,
    tiles,
    slices,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Two passes forward, 1 of 3: mean and centred squares of each channel of a tile of pixels."""
    image, table_row, pixel, channel, inside, mask, rows = two_pass_tile(
        pixels, channels, tiles, slices, BLOCK_P, BLOCK_C
    )
    source = x_ptr, shift_ptr, residual_ptr, skip_ptr, split, channels, shift_stride
    merged = load_merged(source, image, pixel, channel, mask, BLOCK_P)
    if merged_ptr is not None:
        tl.store(at(merged_ptr, pixel, channel, channels, BLOCK_P), merged, mask=mask)
    x = merged.to(tl.float32)
    mean = tl.sum(x, 0) / rows
    centred = tl.where(mask, x - mean[None, :], 0.0)
    table_ptr += table_row * 2 * channels + channel
    tl.store(table_ptr, mean, mask=inside)
    tl.store(table_ptr + channels, tl.sum(centred * centred, 0), mask=inside)


@triton.jit
def _fwd_merge_kernel(
    table_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    channels,
    groups,
    tiles,
    slices,
    eps,
    TILE_P: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Two passes forward, 2 of 3: merge tiles and channels to groups.

    The squares about the common mean are the squares about the mean of each part, plus the squares
    of the differences of the means. Chan et al. 1979, STAN-CS-79-773, Eq. 2.1, for many parts.
    """
    image, first_group, channel, inside = slice_of_groups(
        groups, slices, GROUPS, PER_GROUP, BLOCK_C
    )
    members = members_of_groups(PER_GROUP, BLOCK_G, BLOCK_C)
    table_ptr += image * tiles * 2 * channels + channel[None, :]
    count = pixels * 1.0 * PER_GROUP

    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first_tile in range(0, tiles, BLOCK_T):
        t = first_tile + tl.arange(0, BLOCK_T)[:, None]
        mask = (t < tiles) & inside[None, :]
        rows = tl.minimum(pixels - t * TILE_P, TILE_P)
        sums += rows * tl.load(table_ptr + t * 2 * channels, mask=mask, other=0.0)
    mean = group_sums(tl.sum(sums, 0), members) / count

    centre = per_channel(mean, members)[None, :]
    squares = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first_tile in range(0, tiles, BLOCK_T):
        t = first_tile + tl.arange(0, BLOCK_T)[:, None]
        mask = (t < tiles) & inside[None, :]
        rows = tl.minimum(pixels - t * TILE_P, TILE_P)
        off = tl.load(table_ptr + t * 2 * channels, mask=mask, other=0.0) - centre
        own = tl.load(table_ptr + (t * 2 + 1) * channels, mask=mask, other=0.0)
        squares += tl.where(mask, own + rows * off * off, 0.0)
    rstd = tl.rsqrt(group_sums(tl.sum(squares, 0), members) / count + eps)
    store_groups(mean_ptr, mean, rstd_ptr, rstd, image, first_group, groups, GROUPS, BLOCK_G)


@triton.jit
def _fwd_apply_kernel(
    x_ptr,
    shift_ptr,
    residual_ptr,
    skip_ptr,
    weight_ptr,
    bias_ptr,
    affine_stride,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    split,
    channels,
    shift_stride,
    groups,
    tiles,
    slices,
    PER_GROUP: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Two passes forward, 3 of 3: y.

    The mean is subtracted before scaling. Folded into the bias, it would cost precision if it is
    large compared with the standard deviation.
    """
    image, _, pixel, channel, inside, mask, _ = two_pass_tile(
        pixels, channels, tiles, slices, BLOCK_P, BLOCK_C
    )
    group = image * groups + channel // PER_GROUP
    mean, rstd, weight, bias = load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, affine_stride, image, group, channel, inside
    )
    source = x_ptr, shift_ptr, residual_ptr, skip_ptr, split, channels, shift_stride
    x = load_merged(source, image, pixel, channel, mask, BLOCK_P).to(tl.float32)
    y = (x - mean[None, :]) * (weight * rstd)[None, :] + bias[None, :]
    if SILU:
        y *= sigmoid(y)
    tl.store(at(y_ptr, pixel, channel, channels, BLOCK_P), y, mask=mask)
