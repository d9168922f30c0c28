"""What the GroupNorm kernels share: how an image is cut, how a tile is loaded, sums over groups.

A program never takes single groups: a group of 4 channels is 8 bytes of a pixel, and memory
delivers 32. A program takes as many whole groups as its tile has room for and reads their channels
of all pixels. It sums over pixels first, which leaves one value a channel, and then over the
channels of a group.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# One pass takes images of up to this many pixels. With more, a tile would hold too few channels.
ONE_PASS_PIXELS = 1024
# The widest tiles. 128 bytes of bfloat16 are enough; one pass takes more, to be worth a program.
ONE_PASS_CHANNELS, TWO_PASS_CHANNELS = 128, 64
# The float32 tables of sums, by tile or by image, are read in tiles of rows and channels.
TABLE_ROWS, TABLE_CHANNELS = 256, 16

LOG2_E = tl.constexpr(math.log2(math.e))


def whole_groups(
    pixels: int, channels: int, groups: int, itemsize: int, tiles: tuple[int, ...]
) -> int:
    """Return how many groups a program of one pass takes, or 0 if not even one fits a tile.

    It is the largest number for which slices start on sectors of memory, or else on vectors, if one
    exists. It depends on the shape of an image only, and so do the bits of the result. `tiles` are
    sizes in elements, tried in turn; `itemsize` is that of an element in bytes.
    """
    per_group = channels // groups
    if pixels > ONE_PASS_PIXELS:
        return 0
    for alignment in (32, 16, 1):  # bytes
        step = alignment // math.gcd(alignment, per_group * itemsize)
        for tile in tiles:
            widest = min(tile // triton.next_power_of_2(pixels), ONE_PASS_CHANNELS)
            taken = min(widest // per_group, groups)
            if taken < groups:
                taken = taken // step * step
            if taken:
                return taken
    return 0


def one_pass_blocks(pixels: int, taken: int, per_group: int) -> dict[str, int]:
    """Return the sizes of a tile that holds all pixels of the groups taken."""
    return {
        "BLOCK_P": triton.next_power_of_2(pixels),
        "BLOCK_G": triton.next_power_of_2(taken),
        "BLOCK_C": triton.next_power_of_2(taken * per_group),
    }


class Cut(NamedTuple):
    """How two passes cut an image: tiles of pixels, slices of channels, slices of groups."""

    tiles: int
    slices: int
    blocks: dict[str, int]
    merge_slices: int
    merge_blocks: dict[str, int]

    @classmethod
    def of(cls, pixels: int, channels: int, groups: int, tile: int) -> "Cut":
        """Return the cut of an image into tiles of this many elements."""
        per_group = channels // groups
        block_c = min(triton.next_power_of_2(channels), TWO_PASS_CHANNELS)
        block_p = min(triton.next_power_of_2(pixels), tile // block_c)
        taken = min(max(TABLE_CHANNELS // per_group, 1), groups)
        merge_c = triton.next_power_of_2(taken * per_group)
        return cls(
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


def warps(elements: int, per_thread: int) -> int:
    """Return the warps for which a thread holds this many elements, within what a GPU allows."""
    return min(max(elements // (32 * per_thread), 1), 16)


def source_arguments(
    x: Tensor,
    channels: int,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
) -> dict[str, Tensor | int | None]:
    """Return the arguments of a kernel that reads cat(x + shift + residual, skip)."""
    return {
        "x_ptr": x,
        "shift_ptr": shift,
        "residual_ptr": residual,
        "skip_ptr": skip,
        "split": channels if skip is None else x.shape[2],
        "channels": channels,
        "shift_stride": 0 if shift is None else shift.stride(0),
    }


def affine_arguments(weight: Tensor, bias: Tensor) -> dict[str, Tensor | int | None]:
    """Return the arguments of a kernel that reads weight and bias, [C] or [N, C].

    The stride leads from an image's row to the next; it is None for one row of all images.
    """
    stride = None
    if weight.dim() == 1 or weight.stride(1) != 1 or weight.stride() != bias.stride():
        weight, bias = weight.contiguous(), bias.contiguous()
    if weight.dim() == 2:
        stride = weight.stride(0)
    return {"weight_ptr": weight, "bias_ptr": bias, "affine_stride": stride}


def table_blocks() -> dict[str, int]:
    """Return the tile in which a program reads a table of sums."""
    return {"BLOCK_T": TABLE_ROWS, "BLOCK_C": TABLE_CHANNELS}


@triton.jit
def sigmoid(z):
    """Compute 1 / (1 + exp(-z)) in 5 instructions; exp and a division would take 10."""
    root = tl.rsqrt(1.0 + tl.exp2(z * -LOG2_E))
    return root * root


@triton.jit
def members_of_groups(PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return [BLOCK_G, BLOCK_C]: whether a channel of the slice is in a group of the slice."""
    return (tl.arange(0, BLOCK_C) // PER_GROUP)[None, :] == tl.arange(0, BLOCK_G)[:, None]


@triton.jit
def group_sums(values, members):
    """Sum [BLOCK_C] to [BLOCK_G]. Other channels are left out, not multiplied by 0: NaN * 0."""
    return tl.sum(tl.where(members, values[None, :], 0.0), 1)


@triton.jit
def per_channel(values, members):
    """Give every channel the value of its group: [BLOCK_G] to [BLOCK_C]."""
    return tl.sum(tl.where(members, values[:, None], 0.0), 0)


@triton.jit
def one_pass_slice(
    channels,
    slices,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return what a program of one pass works on: all pixels of GROUPS groups of an image."""
    image = (tl.program_id(0) // slices).to(tl.int64)
    first_group = tl.program_id(0) % slices * GROUPS
    c = tl.arange(0, BLOCK_C)
    channel = first_group * PER_GROUP + c
    inside = (c < GROUPS * PER_GROUP) & (channel < channels)
    mask = (tl.arange(0, BLOCK_P) < PIXELS)[:, None] & inside[None, :]
    return image, first_group, image * PIXELS, channel, inside, mask


@triton.jit
def two_pass_tile(pixels, channels, tiles, slices, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return what a program of two passes works on: BLOCK_P pixels, BLOCK_C channels of an image.

    The tables of sums have one row for each tile of pixels of each image.
    """
    table_row = (tl.program_id(0) // slices).to(tl.int64)
    image, first_pixel = table_row // tiles, table_row % tiles * BLOCK_P
    channel = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    rows = tl.minimum(pixels - first_pixel, BLOCK_P)
    mask = (tl.arange(0, BLOCK_P) < rows)[:, None] & inside[None, :]
    return image, table_row, image * pixels + first_pixel, channel, inside, mask, rows


@triton.jit
def slice_of_groups(
    groups, slices, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return what a program that merges sums works on: GROUPS groups of an image."""
    image = (tl.program_id(0) // slices).to(tl.int64)
    first_group = tl.program_id(0) % slices * GROUPS
    c = tl.arange(0, BLOCK_C)
    channel = first_group * PER_GROUP + c
    inside = (c < GROUPS * PER_GROUP) & (channel < groups * PER_GROUP)
    return image, first_group, channel, inside


@triton.jit
def at(ptr, pixel, channel, channels, BLOCK_P: tl.constexpr):
    """Return pointers to channels of BLOCK_P pixels, the first `pixel`, of [N, pixels, C]."""
    return ptr + pixel * channels + (tl.arange(0, BLOCK_P)[:, None] * channels + channel[None, :])


@triton.jit
def load_merged(source, image, pixel, channel, mask, BLOCK_P: tl.constexpr):
    """Load a tile of cat(x + shift + residual, skip), 0 where the mask is false.

    x ends and skip starts at channel `split`, which may lie within a group. What the mask of a
    tensor leaves out is not read.
    """
    x_ptr, shift_ptr, residual_ptr, skip_ptr, split, channels, shift_stride = source
    left, width = mask, channels
    if skip_ptr is not None:
        left, width = mask & (channel < split)[None, :], split
    x = tl.load(at(x_ptr, pixel, channel, width, BLOCK_P), mask=left, other=0.0)
    if (shift_ptr is not None) or (residual_ptr is not None):
        total = x.to(tl.float32)
        if shift_ptr is not None:
            shift_ptr += image * shift_stride + channel
            shift = tl.load(shift_ptr, mask=channel < width, other=0.0).to(tl.float32)
            total = tl.where(left, total + shift[None, :], 0.0)
        if residual_ptr is not None:
            residual_ptr = at(residual_ptr, pixel, channel, width, BLOCK_P)
            total += tl.load(residual_ptr, mask=left, other=0.0).to(tl.float32)
        x = total.to(x.dtype)
    if skip_ptr is not None:
        skip_ptr = at(skip_ptr, pixel, channel - split, channels - split, BLOCK_P)
        x = tl.load(skip_ptr, mask=mask & (channel >= split)[None, :], other=x)
    return x


@triton.jit
def load_tile(ptr, pixel, channel, channels, mask, BLOCK_P: tl.constexpr):
    """Load a tile of a tensor [N, pixels, C] as float32, 0 where the mask is false."""
    return tl.load(at(ptr, pixel, channel, channels, BLOCK_P), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_parameter(ptr, stride, image, channel, inside):
    """Load the channels of a parameter, of the row of an image if there is a stride."""
    if stride is not None:
        ptr += image * stride
    return tl.load(ptr + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_channels(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, affine_stride, image, group, channel, inside
):
    """Load mean and rstd of the groups of channels, and weight and bias of the channels."""
    mean = tl.load(mean_ptr + group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=inside, other=0.0)
    weight = load_parameter(weight_ptr, affine_stride, image, channel, inside)
    bias = load_parameter(bias_ptr, affine_stride, image, channel, inside)
    return mean, rstd, weight, bias


@triton.jit
def store_groups(
    first_ptr,
    first,
    second_ptr,
    second,
    image,
    first_group,
    groups,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Store two values a group, each in a table [N, groups]."""
    g = tl.arange(0, BLOCK_G)
    valid = (g < GROUPS) & (first_group + g < groups)
    tl.store(first_ptr + image * groups + first_group + g, first, mask=valid)
    tl.store(second_ptr + image * groups + first_group + g, second, mask=valid)
