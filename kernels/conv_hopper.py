"""The convolutions of conv.py with stride 1, for sm_90: loads of boxes, and few, large tiles.

    y[n, i, j, o] = sum over p, q, c of weight[o, p, q, c] x[n, i + p - d, j + q - d, c]
                    + bias[o] or bias[n, o] + residual[n, i, j, o]

on [N, H, W, C], for weights of 3x3, of 1x1, and of 2x2 with the phases of doubled pixels; weights,
d and phases are those of conv.py.

A box of pixels is a number of images, rows and columns. What a tap sees of it is the same box moved
by a pixel. The copy engine (TMA) fetches that box from x by four coordinates, with zeros outside of
the image. One thread asks for it: nothing is gathered, and no other thread computes an address or a
mask. The weights that a tap needs are a box of rows. The result and a residual are boxes as well. A
phase has every second row and column of y, which is a box of y seen as [N, H, 2, W, 2 * O]. If an
image has fewer pixels than a box, several images fill it. What sticks out of the last image, or of
a size that is no power of two, is not written.

Products are taken as channels x pixels. Triton feeds the right factor of a product to the tensor
cores from shared memory, where the copy engine leaves it. A left factor that was reshaped, as the
box of pixels is, it would move to registers first; so the weight is on the left. The pixels are the
longer side of the tile, because every layer has enough of them and some have only 128 channels.

A program takes tiles of 128 channels x 256 pixels, one after the other; there are as many programs
as multiprocessors. Loads run three steps ahead of the products, past the end of a tile: while its
sums are rounded and stored, the factors of the next tile are on their way. With a residual, or a
bias for each image, loads run two steps ahead, since shared memory has no room for more. Warps are
not specialized; docs/notes/0018 gives the reason.

Traffic to and from memory is that of conv.py. A step of a program has 85 FLOPs for a byte of the L2
cache, instead of 64. GPU figures: not measured yet.

Contract: tensors are contiguous, on one device and of one type, float16 or bfloat16; bias and the
norm's parameters may have any floating type; input channels are a multiple of 64 and output
channels of 128. Sums are float32. The bits depend on what they depend on in conv.py.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from ds.ops.kernels.group_norm_silu import Norm, group_norm_silu, norm_from_sums
from ds.ops.kernels.group_norm_tiles import ONE_PASS_PIXELS
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.float16, torch.bfloat16)
CHANNELS, DEPTH = 128, 64  # of a tile: output channels, and input channels a step
PIXELS = 256, 128  # of a tile; the second if the first leaves multiprocessors idle
COLUMNS = 64  # most columns of a box, so that half of a tile is a box as well
MULTIPROCESSORS = 132  # assumed where there is no GPU


@triton.jit
def _add_and_store(y, residual_desc, y_desc, n, i, a, j, o):
    """Add the residual to y [BLOCK_N, pixels], round, store as a box; return the rounded y."""
    if residual_desc is not None:
        box = residual_desc.load([n, i, a, j, o])
        y += tl.reshape(box, [y.shape[1], y.shape[0]]).T.to(tl.float32)
    rounded = y.to(y_desc.dtype)
    y_desc.store([n, i, a, j, o], tl.reshape(rounded.T, y_desc.block_shape))
    return rounded.to(tl.float32)


@triton.jit(do_not_specialize=["images", "height", "width"])
def _conv_hopper_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    residual_desc,
    y_desc,
    table_ptr,
    images,
    height,
    width,
    channels,
    out,
    KERNEL: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute tiles of BLOCK_N channels of boxes of IMAGES x ROWS x COLUMNS pixels in turn."""
    PHASES: tl.constexpr = 4 if KERNEL == 2 else 1
    TAPS: tl.constexpr = KERNEL * KERNEL
    BLOCK_M: tl.constexpr = IMAGES * ROWS * COLUMNS
    slices, steps = out // BLOCK_N, TAPS * (channels // BLOCK_K)
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    tiles = tl.cdiv(images, IMAGES) * down * across * PHASES * slices
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        o, phase = tile % slices * BLOCK_N, tile // slices % PHASES
        box, a, b = tile // (slices * PHASES), phase // 2, phase % 2
        n = box // (across * down) * IMAGES
        i, j = box // across % down * ROWS, box % across * COLUMNS
        top, left = i - KERNEL // 2 + a, j - KERNEL // 2 + b
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for step in tl.range(0, steps):
            tap, c = step % TAPS, step // TAPS * BLOCK_K
            weight = weight_desc.load([phase * out + o, tap * channels + c])
            x = x_desc.load([n, top + tap // KERNEL, left + tap % KERNEL, c])
            sums = tl.dot(weight, tl.reshape(x, [BLOCK_M, BLOCK_K]).T, sums)

        channel = o + tl.arange(0, BLOCK_N)
        if bias_ptr is not None:
            if BIAS_ROWS:
                image = n + tl.arange(0, IMAGES)
                at = bias_ptr + (image[None, :] * out + channel[:, None])
                bias = tl.load(at, mask=(image < images)[None, :], other=0.0).to(tl.float32)
                sums = tl.reshape(sums, [BLOCK_N, IMAGES, ROWS * COLUMNS]) + bias[:, :, None]
                sums = tl.reshape(sums, [BLOCK_N, BLOCK_M])
            else:
                sums += tl.load(bias_ptr + channel).to(tl.float32)[:, None]
        # In halves, whose boxes fit shared memory beside the stages.
        halves = tl.permute(tl.reshape(sums, [BLOCK_N, 2, BLOCK_M // 2]), [0, 2, 1])
        first, second = tl.split(halves)
        first = _add_and_store(first, residual_desc, y_desc, n, i, a, j, b * out + o)
        if IMAGES > 1:
            n += IMAGES // 2
        else:
            i += ROWS // 2
        second = _add_and_store(second, residual_desc, y_desc, n, i, a, j, b * out + o)
        if table_ptr is not None:
            mean = (tl.sum(first, 1) + tl.sum(second, 1)) / BLOCK_M
            first -= mean[:, None]
            second -= mean[:, None]
            at = table_ptr + box.to(tl.int64) * 2 * out + channel
            tl.store(at, mean)
            tl.store(at + out, tl.sum(first * first, 1) + tl.sum(second * second, 1))


class _Box(NamedTuple):
    """The pixels of a tile."""

    images: int
    rows: int
    columns: int

    @classmethod
    def of(cls, pixels: int, height: int, width: int) -> "_Box":
        """Return the box of this many pixels for images of a size, as wide as they are."""
        columns = min(triton.next_power_of_2(width), COLUMNS)
        rows = min(triton.next_power_of_2(height), pixels // columns)
        return cls(pixels // (rows * columns), rows, columns)

    def count(self, images: int, height: int, width: int) -> int:
        """Return how many boxes cover all images."""
        sizes = zip((images, height, width), self, strict=True)
        return math.prod(triton.cdiv(size, own) for size, own in sizes)

    def half(self) -> list[int]:
        """Return the shape of a half of it in [N, H, 1, W]."""
        if self.images > 1:
            return [self.images // 2, self.rows, 1, self.columns]
        return [1, self.rows // 2, 1, self.columns]


def refusal(x: Tensor, weight: Tensor, stride: int) -> str | None:
    """Return why the kernel does not take x [N, C, H, W] and its weight, or None if it does."""
    channels, out = x.shape[1], len(weight) // (4 if weight.shape[2] == 2 else 1)
    if stride != 1:
        return f"it takes stride 1, not {stride}"
    if x.dtype not in DTYPES:
        return f"it takes float16 or bfloat16, not {x.dtype}"
    if channels % DEPTH or out % CHANNELS:
        return f"it takes channels in multiples of {DEPTH}, to {CHANNELS}, not {channels} to {out}"
    return None


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Return y of conv.conv, for arguments that `refusal` accepts."""
    y = x.new_empty(_shape(x, weight))
    _launch(x, weight, bias, residual, y)
    return y


def conv_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return normed, and y of conv if `keep`, else None.

    A norm of two passes gets the sums of the first from the tiles; others are computed separately.
    """
    images, height, width, out = shape = _shape(x, weight)
    y, box = x.new_empty(shape), _Box.of(PIXELS[0], height, width)
    fits = height % box.rows == 0 and width % box.columns == 0
    if height * width <= ONE_PASS_PIXELS or not fits or weight.shape[1] == 2:
        _launch(x, weight, bias, residual, y)
        normed, *_ = group_norm_silu(y.flatten(1, 2), norm)
    else:
        tiles = height * width // PIXELS[0]
        table = x.new_empty((images, tiles, 2, out), dtype=torch.float32)
        _launch(x, weight, bias, residual, y, table)
        normed = norm_from_sums(y.flatten(1, 2), norm, table, PIXELS[0])
    return normed.view(shape), y if keep else None


def _shape(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    images, height, width, _ = x.shape
    if weight.shape[1] == 2:
        return images, 2 * height, 2 * width, len(weight) // 4
    return images, height, width, len(weight)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    table: Tensor | None = None,
) -> None:
    if not len(x):
        return
    *size, channels = x.shape
    kernel, out, programs = weight.shape[1], y.shape[3], _multiprocessors(x.device)
    side = 2 if kernel == 2 else 1  # of the square of phases
    for pixels in PIXELS[:1] if table is not None else PIXELS:
        box = _Box.of(pixels, *size[1:])
        tiles = box.count(*size) * side**2 * (out // CHANNELS)
        if tiles >= programs:
            break
    rows = bias is not None and bias.dim() == 2
    phases, half = (*size[:2], side, size[2], side * out), [*box.half(), CHANNELS]
    _conv_hopper_kernel[(min(tiles, programs),)](
        x_desc=_boxes(x, x.shape, [*box, DEPTH]),
        weight_desc=_boxes(weight, (len(weight), weight[0].numel()), [CHANNELS, DEPTH]),
        bias_ptr=bias if bias is None else bias.contiguous(),
        residual_desc=residual if residual is None else _boxes(residual, phases, half),
        y_desc=_boxes(y, phases, half),
        table_ptr=table,
        **dict(zip(("images", "height", "width"), size, strict=True)),
        channels=channels,
        out=out,
        KERNEL=kernel,
        BIAS_ROWS=rows,
        **dict(zip(("IMAGES", "ROWS", "COLUMNS"), box, strict=True)),
        BLOCK_N=CHANNELS,
        BLOCK_K=DEPTH,
        num_warps=8,
        num_stages=3 if rows or residual is not None else 4,  # what fits 227 KB
    )


def _boxes(t: Tensor, shape: Sequence[int], block: list[int]) -> TensorDescriptor:
    """Describe a tensor in another shape, or a copy of it that is aligned to 16 bytes.

    A dimension of size 1 may have any stride; the two views give it the stride of the shape.
    """
    t = t.clone() if t.data_ptr() % 16 else t
    return TensorDescriptor.from_tensor(t.view(-1).view(shape), block)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
