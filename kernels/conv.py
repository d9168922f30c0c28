"""Convolutions of a U-Net with what follows them, on x [N, H, W, C]: channels_last memory.

    y[n, i, j, o] = sum over p, q, c of weight[o, p, q, c] x[n, s i + p - d, s j + q - d, c]
                    * scale[o], for float8, + bias[o] or bias[n, o] + residual[n, i, j, o]
    normed = f((y - mean) / sqrt(var + eps) * norm_weight + norm_bias)    as in group_norm_silu

x is 0 outside of the image. The shape of the weight selects the convolution:

    1x1    s = 1, d = 0
    3x3    s = 1, d = 1; or s = 2, d = 0, which pads on the right and below only
    2x2    a 3x3 convolution of x with every pixel doubled. Phase (a, b) of the result, its pixels
           (2 i + a, 2 j + b), is a 2x2 convolution of x; d = 1 - a in height and 1 - b in width

It is a product of matrices with M = pixels of all images, N = output channels and K = taps * C. The
left matrix is never made (Chetlur et al. 2014, arXiv:1410.0759, section 3). A program takes BLOCK_M
pixels and BLOCK_N channels; for each step of K it gathers the BLOCK_K channels that its pixels see
through one tap. Taps vary fastest, because they read almost the same lines.

Where the norm is computed:

    in the tile      for images of up to 256 pixels, if a tile holds whole images and groups
    from its sums    for images of more than 1024 pixels, if they are a multiple of BLOCK_M: a tile
                     writes mean and centred squares of its channels, the first of two passes
    separately       otherwise, by the norm's own kernels, in one pass or two

Traffic, in elements of the type of y for each element of y: 1 to write y, 1 for a residual. x is
read once from memory, then from the L2 cache for each further block of channels; so is the weight
for each further block of pixels. A norm in the tile adds 1, and saves 1 if y is not kept. From the
sums it adds 2, and 8 bytes for BLOCK_M elements. Separately it adds 2 in one pass, 3 in two.

What limits it: 3x3 convolutions of 128 channels and more have at least 256 FLOPs for a byte of
memory, and an H200 offers about 180. But a step of a program of 128 x 128 has 64 for a byte of the
L2 cache, which would have to deliver 12 TB/s to keep the tensor cores busy. Two programs of the
plain convolution, or of one with sums, fit a multiprocessor of sm_90: one stores while the other
multiplies. With a norm in the tile, one program fits. 1x1 convolutions are limited by memory. GPU
figures: not measured yet.

Contract: tensors are contiguous, on one device and of one type, float32, float16 or bfloat16; bias
and the norm's parameters may have any floating type. Sums and statistics are float32; products of
float32 take three of TF32, about 22 bits. Statistics are those of y as rounded, and the variance is
a sum of squares about the mean. No atomics, and the shape of an image decides the order of every
sum: equal arguments give equal bits, and an image gives the bits that it would give alone. NaN and
infinity reach the sums that they are terms of, and their group in a norm.

Without a norm, x and weight may be float8_e4m3fn with a scale; residual and y are then bfloat16.
Those kernels take 190 to 212 registers, because sums of BLOCK_K products are added up in float32
separately: one program fits a multiprocessor.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from ds.ops.kernels.group_norm_silu import Norm, group_norm_silu, norm_from_sums
from ds.ops.kernels.group_norm_tiles import ONE_PASS_PIXELS, sigmoid
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.float16, torch.bfloat16, FLOAT8)
TILE_PIXELS = 256  # pixels of the largest images whose norm is computed in the tile
REST = 1024  # most pixels that a tile may see behind the image in which it starts


@triton.jit
def _pixels(images, pixels, image_rows, tile, BLOCK_M: tl.constexpr):
    """Return the first image of a tile and, for each row: image after that, pixel, and validity.

    An image takes `image_rows` rows. The first of them are its pixels, the rest are not valid.
    """
    first_row = tile.to(tl.int64) * BLOCK_M
    first_image = first_row // image_rows
    row = (first_row - first_image * image_rows).to(tl.int32) + tl.arange(0, BLOCK_M)
    image, pixel = row // image_rows, row % image_rows
    return first_image, image, pixel, (pixel < pixels) & (first_image + image < images)


@triton.jit
def _products(
    sums,
    x_ptr,
    weight_ptr,
    image,
    i,
    j,
    valid,
    o,
    height,
    width,
    channels,
    out,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the products of what pixels see from (i, j) on with rows o of the weight to the sums."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    # For float8, sm_90 keeps some 14 bits of a sum (DeepSeek-AI 2024, arXiv:2412.19437, section
    # 3.3.2). So it adds up BLOCK_K products at most before they go to float32.
    NARROW: tl.constexpr = x_ptr.dtype.element_ty == tl.float8e4nv
    AT_ONCE: tl.constexpr = BLOCK_K if NARROW else None
    origin = ((image * height + i) * width + j) * channels
    weight_row = o * (TAPS * channels)
    k = tl.arange(0, BLOCK_K)
    for step in tl.range(0, TAPS * tl.cdiv(channels, BLOCK_K)):
        tap = step % TAPS
        p, q = tap // KERNEL, tap % KERNEL
        c = step // TAPS * BLOCK_K + k
        seen = valid & (i + p >= 0) & (i + p < height) & (j + q >= 0) & (j + q < width)
        offset = origin + (p * width + q) * channels
        inside = (c < channels)[None, :]
        x = tl.load(x_ptr + (offset[:, None] + c[None, :]), mask=seen[:, None] & inside, other=0.0)
        offset = weight_row + tap * channels
        w = tl.load(
            weight_ptr + (offset[:, None] + c[None, :]), mask=(o < out)[:, None] & inside, other=0.0
        )
        sums = tl.dot(x, w.T, sums, input_precision=PRECISION, max_num_imprecise_acc=AT_ONCE)
    return sums


@triton.jit
def _with_bias(y, bias_ptr, first_image, image, valid, o, out, BIAS_ROWS: tl.constexpr):
    """Add the bias, if given: [out], or [N, out] if BIAS_ROWS."""
    if bias_ptr is not None:
        if BIAS_ROWS:
            bias_ptr += first_image * out + (image[:, None] * out + o[None, :])
            mask = valid[:, None] & (o < out)[None, :]
            y += tl.load(bias_ptr, mask=mask, other=0.0).to(tl.float32)
        else:
            y += tl.load(bias_ptr + o, mask=o < out, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _normalized(
    y,
    pixels,
    eps,
    PER_GROUP: tl.constexpr,
    IMAGE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return (y - mean) / sqrt(var + eps) for a tile that holds whole images and groups."""
    IMAGES: tl.constexpr = BLOCK_M // IMAGE_ROWS
    GROUPS: tl.constexpr = BLOCK_N // PER_GROUP
    y = tl.reshape(y, [IMAGES, IMAGE_ROWS, GROUPS, PER_GROUP])
    rows = (tl.arange(0, IMAGE_ROWS) < pixels)[None, :, None, None]
    count = pixels * 1.0 * PER_GROUP
    mean = tl.sum(tl.sum(tl.where(rows, y, 0.0), 1), 2) / count
    centred = tl.where(rows, y - mean[:, None, :, None], 0.0)
    rstd = tl.rsqrt(tl.sum(tl.sum(centred * centred, 1), 2) / count + eps)
    return tl.reshape(centred * rstd[:, None, :, None], [BLOCK_M, BLOCK_N])


@triton.jit(do_not_specialize=["images", "height", "width", "rows", "columns"])
def _conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    table_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    normed_ptr,
    scale_ptr,
    images,
    height,
    width,
    rows,
    columns,
    channels,
    out,
    eps,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SILU: tl.constexpr,
    IMAGE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_M pixels of a phase, out of rows x columns, in BLOCK_N channels."""
    PHASES: tl.constexpr = 4 if KERNEL == 2 else 1
    BEFORE: tl.constexpr = 0 if (KERNEL == 1 or STRIDE == 2) else 1
    slices = tl.cdiv(out, BLOCK_N)
    phase = tl.program_id(0) // slices % PHASES
    a, b = phase // 2, phase % 2
    tile = tl.program_id(0) // (slices * PHASES)
    o = tl.program_id(0) % slices * BLOCK_N + tl.arange(0, BLOCK_N)

    pixels = rows * columns
    image_rows = pixels
    if IMAGE_ROWS is not None:
        image_rows = IMAGE_ROWS
    first_image, image, pixel, valid = _pixels(images, pixels, image_rows, tile, BLOCK_M)
    i, j = pixel // columns, pixel % columns
    # In half precision the sums start from the bias: rounding hides the difference, and less waits
    # in registers. In float32 a large bias would cost digits; a scale has to come before it.
    NARROW: tl.constexpr = scale_ptr is not None
    BIAS_LAST: tl.constexpr = NARROW or x_ptr.dtype.element_ty == tl.float32
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if not BIAS_LAST:
        y = _with_bias(y, bias_ptr, first_image, image, valid, o, out, BIAS_ROWS)
    y = _products(
        y,
        x_ptr + first_image * height * width * channels,
        weight_ptr + phase.to(tl.int64) * out * (KERNEL * KERNEL * channels),
        image,
        i * STRIDE + (a - BEFORE),
        j * STRIDE + (b - BEFORE),
        valid,
        o,
        height,
        width,
        channels,
        out,
        KERNEL,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    inside = o < out
    if NARROW:
        y *= tl.load(scale_ptr + phase * out + o, mask=inside, other=0.0)[None, :]
    if BIAS_LAST:
        y = _with_bias(y, bias_ptr, first_image, image, valid, o, out, BIAS_ROWS)
    mask = valid[:, None] & inside[None, :]
    if PHASES == 4:
        pixel = (2 * i + a) * (2 * columns) + (2 * j + b)
    at = (image * (pixels * PHASES) + pixel)[:, None] * out + o[None, :]
    first = first_image * (pixels * PHASES) * out
    if residual_ptr is not None:
        y += tl.load(residual_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
    rounded = y.to(tl.bfloat16 if NARROW else x_ptr.dtype.element_ty)
    if y_ptr is not None:
        tl.store(y_ptr + first + at, rounded, mask=mask)
    y = rounded.to(tl.float32)
    if table_ptr is not None:
        mean = tl.sum(y, 0) / BLOCK_M
        centred = y - mean[None, :]
        table_ptr += tile.to(tl.int64) * 2 * out + o
        tl.store(table_ptr, mean, mask=inside)
        tl.store(table_ptr + out, tl.sum(centred * centred, 0), mask=inside)
    if normed_ptr is not None:
        y = _normalized(y, pixels, eps, PER_GROUP, IMAGE_ROWS, BLOCK_M, BLOCK_N)
        weight = tl.load(norm_weight_ptr + o, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias_ptr + o, mask=inside, other=0.0).to(tl.float32)
        y = y * weight[None, :] + bias[None, :]
        if SILU:
            y *= sigmoid(y)
        tl.store(normed_ptr + first + at, y, mask=mask)


# Arguments of the kernel that are None unless a launch gives them: for sums, a norm, float8.
OPTIONAL = (
    *("table_ptr", "norm_weight_ptr", "norm_bias_ptr", "normed_ptr", "scale_ptr"),
    *("PER_GROUP", "SILU", "IMAGE_ROWS"),
)


class _Tile(NamedTuple):
    """The tile of a program, its warps and its pipeline stages."""

    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int


def _tile(dtype: torch.dtype, channels: int, out: int, image_rows: int = 0) -> _Tile:
    """Return the tile for a convolution; with image_rows, one that holds whole images."""
    if dtype == torch.float32:
        m, n, k, warps, stages = 64, 64, 32, 4, 2
    else:
        m, n, k, warps, stages = 128, 128, 128 // dtype.itemsize, 8, 3
    if image_rows > m:
        n, m, warps = max(n * m // image_rows, 16), image_rows, max(warps, 8)
    n = min(n, max(triton.next_power_of_2(out), 16))
    k = min(k, max(triton.next_power_of_2(channels), 32 if dtype == FLOAT8 else 16))
    return _Tile(m, n, k, warps, stages)


def refusal(x: Tensor, weight: Tensor, stride: int) -> str | None:
    """Return why the kernels do not take x [N, C, H, W] and its weight, or None if they do."""
    _, channels, height, width = x.shape
    if x.dtype not in DTYPES:
        return f"it takes float32, float16, bfloat16 or float8_e4m3fn, not {x.dtype}"
    made = height // stride * (width // stride)
    images = (height * width + REST) * channels, (made + REST) * len(weight)
    reach = max(weight.numel(), *images)
    if reach > 2**31 - 1:
        return f"its offsets have 32 bits within an image and the weight, too few for {reach}"
    return None


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    scale: Tensor | None = None,
) -> Tensor:
    """Return y [N, height, width, out] for arguments that `refusal` accepts.

    x is [N, H, W, C]. weight is [out, k, k, C], or [4 out, 2, 2, C] with the weights of phase (a,
    b) from row (2 a + b) out on. bias is [out] or [N, out], residual like y. scale is float32, one
    number for each row of the weight; float8 needs it and no other type takes it.
    """
    y = x.new_empty(_shape(x, weight, stride), dtype=x.dtype if scale is None else torch.bfloat16)
    tile = _tile(x.dtype, x.shape[3], y.shape[3])
    _launch(x, weight, bias, residual, stride, tile, y, scale_ptr=scale)
    return y


def conv_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    norm: Norm,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return normed, and y of conv if `keep`, else None."""
    images, height, width, out = shape = _shape(x, weight, stride)
    pixels, per_group, phases = height * width, out // norm.groups, weight.shape[1] == 2
    rows = triton.next_power_of_2(pixels)
    tile = _tile(x.dtype, x.shape[3], out, rows)
    whole = per_group <= tile.channels and triton.next_power_of_2(per_group) == per_group
    by_image = norm.weight.dim() == 2  # which the norm in the tile does not read
    if pixels <= TILE_PIXELS and whole and not phases and not by_image:
        normed, y = x.new_empty(shape), x.new_empty(shape) if keep else None
        _launch(
            *(x, weight, bias, residual, stride, tile, y),
            norm_weight_ptr=norm.weight.contiguous(),
            norm_bias_ptr=norm.bias.contiguous(),
            normed_ptr=normed,
            eps=norm.eps,
            PER_GROUP=per_group,
            SILU=norm.silu,
            IMAGE_ROWS=rows,
        )
        return normed, y
    tile = _tile(x.dtype, x.shape[3], out)
    if pixels <= ONE_PASS_PIXELS or pixels % tile.pixels or phases:
        y = conv(x, weight, bias, residual, stride)
        normed, *_ = group_norm_silu(y.flatten(1, 2), norm)
    else:
        y = x.new_empty(shape)
        table = y.new_empty((images, pixels // tile.pixels, 2, out), dtype=torch.float32)
        _launch(x, weight, bias, residual, stride, tile, y, table_ptr=table)
        normed = norm_from_sums(y.flatten(1, 2), norm, table, tile.pixels)
    return normed.view(shape), y if keep else None


def _shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int, int]:
    images, height, width, _ = x.shape
    if weight.shape[1] == 2:
        return images, 2 * height, 2 * width, len(weight) // 4
    return images, height // stride, width // stride, len(weight)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    tile: _Tile,
    y: Tensor | None,
    **others: Tensor | float | None,
) -> None:
    """Launch the kernel; `others` are its arguments by name that not every launch has."""
    others = dict.fromkeys(OPTIONAL) | {"eps": 0.0} | others
    images, height, width, channels = x.shape
    kernel = weight.shape[1]
    phases = 4 if kernel == 2 else 1
    rows, columns, out = height // stride, width // stride, len(weight) // phases
    tiles = triton.cdiv(images * (others["IMAGE_ROWS"] or rows * columns), tile.pixels)
    _conv_kernel[(tiles * phases * triton.cdiv(out, tile.channels),)](
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias if bias is None else bias.contiguous(),
        residual_ptr=residual,
        y_ptr=y,
        images=images,
        height=height,
        width=width,
        rows=rows,
        columns=columns,
        channels=channels,
        out=out,
        KERNEL=kernel,
        STRIDE=stride,
        BIAS_ROWS=bias is not None and bias.dim() == 2,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",  # no effect on half precision
        BLOCK_M=tile.pixels,
        BLOCK_N=tile.channels,
        BLOCK_K=tile.depth,
        **others,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
