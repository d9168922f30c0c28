"""The gradient of GroupNorm, with SiLU or without, on x [N, pixels, C]: channels_last memory.

    g = grad * f'(weight * xhat + bias)     d_bias = sum g      d_weight = sum g * xhat
    d_m = (h - mean(h) - xhat * mean(h * xhat)) / sqrt(var + eps) + grad_merged, h = g * weight
    d_m = cat(d_x, d_skip)                  d_residual = d_x    d_shift = sum over pixels of d_x

m, xhat and f are those of group_norm_silu.py, where the traffic and the contract are, too. Wu & He
2018, arXiv:1803.08494, Eq. 1, 2, 6 and 7.
"""

import functools

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
    load_tile,
    members_of_groups,
    one_pass_blocks,
    one_pass_slice,
    per_channel,
    sigmoid,
    slice_of_groups,
    source_arguments,
    store_groups,
    table_blocks,
    two_pass_tile,
    warps,
    whole_groups,
)
from torch import Tensor

# As in group_norm_silu.py, but a thread holds this many elements of each of two tensors.
BACKWARD_TILES, BACKWARD_THREAD = (8192, 16384), 32


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
    grad_merged: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return d_x, d_weight, d_bias, d_shift and d_skip; the last two are None if not wanted.

    grad and grad_merged are contiguous [N, pixels, C] in the type of x, mean and rstd those that
    group_norm_silu returned; weight and bias are [C] or [N, C], and so are their gradients. With
    grad_merged, x is the m that was kept. d_x is [N, pixels, split]; d_x and d_skip have the type
    of x, the others that of the tensor they are the gradient of.
    """
    images, pixels, _ = x.shape
    channels = weight.shape[-1]
    empty = functools.partial(torch.empty, device=x.device)
    d_x = empty((images, pixels, split), dtype=x.dtype)
    d_skip = empty((images, pixels, channels - split), dtype=x.dtype) if split < channels else None
    d_shift = None if shift is None else empty((images, split), dtype=shift.dtype)
    rows = empty((images, 2, channels), dtype=torch.float32)

    addends = (shift, residual, skip) if grad_merged is None else ()
    inputs = {
        **source_arguments(x, channels, *addends),
        "split": split,
        "grad_ptr": grad,
        **affine_arguments(weight, bias),
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "groups": groups,
        "PER_GROUP": channels // groups,
        "SILU": silu,
    }
    results = {"grad_merged_ptr": grad_merged, "d_x_ptr": d_x, "d_skip_ptr": d_skip}
    taken = whole_groups(pixels, channels, groups, x.element_size(), BACKWARD_TILES)
    if taken:
        _one_pass(inputs, results, taken, d_shift, rows)
    else:
        _two_passes(inputs, results, d_shift, rows)

    if weight.dim() == 2:
        sums = zip(rows.unbind(1), (bias, weight), strict=True)
        d_bias, d_weight = (row.to(parameter.dtype).contiguous() for row, parameter in sums)
        return d_x, d_weight, d_bias, d_shift, d_skip
    d_weight, d_bias = torch.empty_like(inputs["weight_ptr"]), torch.empty_like(inputs["bias_ptr"])
    blocks = table_blocks()
    _bwd_rows_kernel[(triton.cdiv(channels, blocks["BLOCK_C"]),)](
        rows_ptr=rows,
        d_bias_ptr=d_bias,
        d_weight_ptr=d_weight,
        images=images,
        channels=channels,
        **blocks,
    )
    return d_x, d_weight, d_bias, d_shift, d_skip


def _one_pass(
    inputs: dict, results: dict, taken: int, d_shift: Tensor | None, rows: Tensor
) -> None:
    """Launch the kernel of one pass, whose programs take this many groups."""
    images, pixels, _ = inputs["grad_ptr"].shape
    slices = triton.cdiv(inputs["groups"], taken)
    blocks = one_pass_blocks(pixels, taken, inputs["PER_GROUP"])
    # With 16 warps a thread has 128 registers, one too few if there is another tensor to read.
    most_warps = 16 if results["grad_merged_ptr"] is None else 8
    _bwd_kernel[(images * slices,)](
        **inputs,
        **results,
        d_shift_ptr=d_shift,
        rows_ptr=rows,
        slices=slices,
        PIXELS=pixels,
        GROUPS=taken,
        **blocks,
        num_warps=min(warps(blocks["BLOCK_P"] * blocks["BLOCK_C"], BACKWARD_THREAD), most_warps),
    )


def _two_passes(inputs: dict, results: dict, d_shift: Tensor | None, rows: Tensor) -> None:
    """Launch the three kernels of two passes, and a fourth if there is a shift."""
    images, pixels, channels = inputs["grad_ptr"].shape
    cut = Cut.of(pixels, channels, inputs["groups"], BACKWARD_TILES[0])
    table = rows.new_empty((images, cut.tiles, 2, channels))
    mean_h, mean_hx = torch.empty_like(inputs["mean_ptr"]), torch.empty_like(inputs["mean_ptr"])
    shift_table = None
    if d_shift is not None:
        shift_table = rows.new_empty((images, cut.tiles, inputs["split"]))
    tiled = {
        **inputs,
        "pixels": pixels,
        "tiles": cut.tiles,
        "slices": cut.slices,
        **cut.blocks,
        "num_warps": warps(BACKWARD_TILES[0], BACKWARD_THREAD),
    }
    means = {"mean_h_ptr": mean_h, "mean_hx_ptr": mean_hx}
    _bwd_sums_kernel[(images * cut.tiles * cut.slices,)](**tiled, table_ptr=table)
    _bwd_merge_kernel[(images * cut.merge_slices,)](
        table_ptr=table,
        weight_ptr=inputs["weight_ptr"],
        affine_stride=inputs["affine_stride"],
        rows_ptr=rows,
        **means,
        pixels=pixels,
        channels=channels,
        groups=inputs["groups"],
        tiles=cut.tiles,
        slices=cut.merge_slices,
        PER_GROUP=inputs["PER_GROUP"],
        **cut.merge_blocks,
    )
    _bwd_apply_kernel[(images * cut.tiles * cut.slices,)](
        **tiled, **results, **means, shift_table_ptr=shift_table
    )
    if d_shift is not None:
        blocks = table_blocks()
        slices = triton.cdiv(inputs["split"], blocks["BLOCK_C"])
        _bwd_shift_kernel[(images * slices,)](
            table_ptr=shift_table,
            d_shift_ptr=d_shift,
            tiles=cut.tiles,
            channels=inputs["split"],
            slices=slices,
            **blocks,
        )


@triton.jit
def _centred_and_g(x, grad, mean, rstd, weight, bias, SILU: tl.constexpr):
    """Return the tiles x - mean and g. The factor rstd is applied later, to one value a channel."""
    centred = x - mean[None, :]
    if SILU:
        z = centred * (weight * rstd)[None, :] + bias[None, :]
        s = sigmoid(z)
        grad *= s * (1.0 + z * (1.0 - s))
    return centred, grad


@triton.jit
def _d_merged(centred, g, rstd, weight, mean_h, mean_hx):
    """Return the tile d_m, without grad_merged."""
    along = (rstd * rstd * mean_hx)[None, :]
    return g * (weight * rstd)[None, :] - (centred * along + (rstd * mean_h)[None, :])


@triton.jit
def _store_split(
    d_x_ptr, d_skip_ptr, d_merged, pixel, channel, mask, split, channels, BLOCK_P: tl.constexpr
):
    """Store a tile of d_m = cat(d_x, d_skip) in d_x and d_skip."""
    left, width = mask, channels
    if d_skip_ptr is not None:
        left, width = mask & (channel < split)[None, :], split
        d_skip_ptr = at(d_skip_ptr, pixel, channel - split, channels - split, BLOCK_P)
        tl.store(d_skip_ptr, d_merged, mask=mask & (channel >= split)[None, :])
    tl.store(at(d_x_ptr, pixel, channel, width, BLOCK_P), d_merged, mask=left)


@triton.jit
def _column_sums(table_ptr, count, stride, inside, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum `count` rows of a table to [BLOCK_C], always in one order.

    table_ptr points to the columns of the first row, and `stride` leads to the next row.
    """
    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, count, BLOCK_T):
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mask = (row < count) & inside[None, :]
        sums += tl.load(table_ptr[None, :] + row * stride, mask=mask, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _bwd_kernel(
    grad_ptr,
    x_ptr,
    shift_ptr,
    residual_ptr,
    skip_ptr,
    weight_ptr,
    bias_ptr,
    affine_stride,
    mean_ptr,
    rstd_ptr,
    grad_merged_ptr,
    d_x_ptr,
    d_skip_ptr,
    d_shift_ptr,
    rows_ptr,
    split,
    channels,
    shift_stride,
    groups,
    slices,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One pass backward: d_x, d_skip, d_shift, and this image's part of d_bias and d_weight."""
    image, _, pixel, channel, inside, mask = one_pass_slice(
        channels, slices, PIXELS, GROUPS, PER_GROUP, BLOCK_P, BLOCK_C
    )
    group = image * groups + channel // PER_GROUP
    mean, rstd, weight, bias = load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, affine_stride, image, group, channel, inside
    )
    source = x_ptr, shift_ptr, residual_ptr, skip_ptr, split, channels, shift_stride
    x = load_merged(source, image, pixel, channel, mask, BLOCK_P).to(tl.float32)
    grad = load_tile(grad_ptr, pixel, channel, channels, mask, BLOCK_P)
    centred, g = _centred_and_g(x, grad, mean, rstd, weight, bias, SILU)

    sum_g, sum_gx = tl.sum(g, 0), tl.sum(g * centred, 0) * rstd
    rows_ptr += image * 2 * channels + channel
    tl.store(rows_ptr, sum_g, mask=inside)
    tl.store(rows_ptr + channels, sum_gx, mask=inside)

    members = members_of_groups(PER_GROUP, BLOCK_G, BLOCK_C)
    count = PIXELS * PER_GROUP
    mean_h = per_channel(group_sums(sum_g * weight, members) / count, members)
    mean_hx = per_channel(group_sums(sum_gx * weight, members) / count, members)
    d_merged = _d_merged(centred, g, rstd, weight, mean_h, mean_hx)
    if grad_merged_ptr is not None:
        d_merged += load_tile(grad_merged_ptr, pixel, channel, channels, mask, BLOCK_P)
    _store_split(d_x_ptr, d_skip_ptr, d_merged, pixel, channel, mask, split, channels, BLOCK_P)
    if d_shift_ptr is not None:
        d_shift = tl.sum(tl.where(mask, d_merged, 0.0), 0)
        tl.store(d_shift_ptr + image * split + channel, d_shift, mask=inside & (channel < split))


@triton.jit
def _bwd_sums_kernel(
    grad_ptr,
    x_ptr,
    shift_ptr,
    residual_ptr,
    skip_ptr,
    weight_ptr,
    bias_ptr,
    affine_stride,
    mean_ptr,
    rstd_ptr,
    table_ptr,
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
    """Two passes backward, 1 of 4: sums of g and g * xhat of each channel of a tile of pixels."""
    image, table_row, pixel, channel, inside, mask, _ = two_pass_tile(
        pixels, channels, tiles, slices, BLOCK_P, BLOCK_C
    )
    group = image * groups + channel // PER_GROUP
    mean, rstd, weight, bias = load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, affine_stride, image, group, channel, inside
    )
    source = x_ptr, shift_ptr, residual_ptr, skip_ptr, split, channels, shift_stride
    x = load_merged(source, image, pixel, channel, mask, BLOCK_P).to(tl.float32)
    grad = load_tile(grad_ptr, pixel, channel, channels, mask, BLOCK_P)
    centred, g = _centred_and_g(x, grad, mean, rstd, weight, bias, SILU)
    table_ptr += table_row * 2 * channels + channel
    tl.store(table_ptr, tl.sum(g, 0), mask=inside)
    tl.store(table_ptr + channels, tl.sum(g * centred, 0) * rstd, mask=inside)


@triton.jit
def _bwd_merge_kernel(
    table_ptr,
    weight_ptr,
    affine_stride,
    rows_ptr,
    mean_h_ptr,
    mean_hx_ptr,
    pixels,
    channels,
    groups,
    tiles,
    slices,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Two passes backward, 2 of 4: sum tiles to a row for the image, and channels to groups."""
    image, first_group, channel, inside = slice_of_groups(
        groups, slices, GROUPS, PER_GROUP, BLOCK_C
    )
    table_ptr += image * tiles * 2 * channels + channel
    sum_g = _column_sums(table_ptr, tiles, 2 * channels, inside, BLOCK_T, BLOCK_C)
    sum_gx = _column_sums(table_ptr + channels, tiles, 2 * channels, inside, BLOCK_T, BLOCK_C)
    rows_ptr += image * 2 * channels + channel
    tl.store(rows_ptr, sum_g, mask=inside)
    tl.store(rows_ptr + channels, sum_gx, mask=inside)

    members = members_of_groups(PER_GROUP, BLOCK_G, BLOCK_C)
    count = pixels * 1.0 * PER_GROUP
    weight = load_parameter(weight_ptr, affine_stride, image, channel, inside)
    mean_h = group_sums(sum_g * weight, members) / count
    mean_hx = group_sums(sum_gx * weight, members) / count
    store_groups(
        mean_h_ptr, mean_h, mean_hx_ptr, mean_hx, image, first_group, groups, GROUPS, BLOCK_G
    )


@triton.jit
def _bwd_apply_kernel(
    grad_ptr,
    x_ptr,
    shift_ptr,
    residual_ptr,
    skip_ptr,
    weight_ptr,
    bias_ptr,
    affine_stride,
    mean_ptr,
    rstd_ptr,
    mean_h_ptr,
    mean_hx_ptr,
    grad_merged_ptr,
    d_x_ptr,
    d_skip_ptr,
    shift_table_ptr,
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
    """Two passes backward, 3 of 4: d_x, d_skip, and the sums of d_x over a tile of pixels."""
    image, table_row, pixel, channel, inside, mask, _ = two_pass_tile(
        pixels, channels, tiles, slices, BLOCK_P, BLOCK_C
    )
    group = image * groups + channel // PER_GROUP
    mean, rstd, weight, bias = load_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, affine_stride, image, group, channel, inside
    )
    mean_h = tl.load(mean_h_ptr + group, mask=inside, other=0.0)
    mean_hx = tl.load(mean_hx_ptr + group, mask=inside, other=0.0)
    source = x_ptr, shift_ptr, residual_ptr, skip_ptr, split, channels, shift_stride
    x = load_merged(source, image, pixel, channel, mask, BLOCK_P).to(tl.float32)
    grad = load_tile(grad_ptr, pixel, channel, channels, mask, BLOCK_P)
    centred, g = _centred_and_g(x, grad, mean, rstd, weight, bias, SILU)
    d_merged = _d_merged(centred, g, rstd, weight, mean_h, mean_hx)
    if grad_merged_ptr is not None:
        d_merged += load_tile(grad_merged_ptr, pixel, channel, channels, mask, BLOCK_P)
    _store_split(d_x_ptr, d_skip_ptr, d_merged, pixel, channel, mask, split, channels, BLOCK_P)
    if shift_table_ptr is not None:
        sums = tl.sum(tl.where(mask, d_merged, 0.0), 0)
        shift_table_ptr += table_row * split + channel
        tl.store(shift_table_ptr, sums, mask=inside & (channel < split))


@triton.jit
def _bwd_shift_kernel(
    table_ptr, d_shift_ptr, tiles, channels, slices, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Two passes backward, 4 of 4, if there is a shift: sum the tiles of an image to d_shift."""
    image = (tl.program_id(0) // slices).to(tl.int64)
    channel = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    table_ptr += image * tiles * channels + channel
    sums = _column_sums(table_ptr, tiles, channels, inside, BLOCK_T, BLOCK_C)
    tl.store(d_shift_ptr + image * channels + channel, sums, mask=inside)


@triton.jit
def _bwd_rows_kernel(
    rows_ptr,
    d_bias_ptr,
    d_weight_ptr,
    images,
    channels,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Last, after one pass or two: sum the rows of all images to d_bias and d_weight [C]."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    rows_ptr += channel
    sum_g = _column_sums(rows_ptr, images, 2 * channels, inside, BLOCK_T, BLOCK_C)
    sum_gx = _column_sums(rows_ptr + channels, images, 2 * channels, inside, BLOCK_T, BLOCK_C)
    tl.store(d_bias_ptr + channel, sum_g, mask=inside)
    tl.store(d_weight_ptr + channel, sum_gx, mask=inside)
