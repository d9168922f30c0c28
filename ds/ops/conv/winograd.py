"""A 3x3 convolution by Winograd's F(4x4, 3x3): 36 multiplications for 16 pixels instead of 144."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Op, Unsupported
from ds.ops.dispatch.transforms import channels_last

# The finite points. With 0, 1, -1, 2, -2, the usual ones, float32 loses a digit; with these it is
# as exact as the direct sum (0.99e-6 and 0.83e-6 of the result, root mean square, 256 channels).
# They and their products up to a^2 b^2 are exact in float32.
POINTS = (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)
_TILE = 4  # pixels of a result, in both directions
PANEL = 16  # output channels that a product takes at a time
MOST_CHANNELS = 4096  # of x in our kernel
_BLOCK = 24  # tiles that go through the products together, to stay in a cache
_ROWS = 8  # of them that are multiplied at once, or three times as many


def winograd_weight(weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Transform the weight of a 3x3 convolution [O, C, 3, 3] for winograd_conv, in float64.

    The result, rounded to `dtype`, is [36, O / P, C, P]: panels of P = 16 output channels, or one
    of all of them where 16 does not divide them.

    Raises:
        ValueError: the weight is not of that shape.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"winograd_weight: weight must be [O, C, 3, 3], not of shape {list(weight.shape)}"
        )
    g = _matrices()[1].to(weight.device)
    out, channels = weight.shape[:2]
    panel = PANEL if out % PANEL == 0 else max(out, 1)
    panels = weight.new_empty((36, out // panel, channels, panel), dtype=dtype)
    for k in range(out // panel):  # a cache holds one in float64
        taps = weight[k * panel : (k + 1) * panel].permute(2, 3, 1, 0)
        taps = taps.to(torch.float64, memory_format=torch.contiguous_format)
        points = (g @ taps.reshape(3, -1)).view(6, 3, -1)
        panels[:, k] = (g @ points).view(36, channels, panel)
    return panels


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    doubled: bool = False,
) -> Tensor:
    """Convolve x [N, C, H, W] with a weight of winograd_weight, padding by 1.

    bias [O] and residual [N, O, H, W] are added if given. If `doubled`, every pixel of x counts
    twice in both directions, and the result is [N, O, 2 H, 2 W]. residual and the result have the
    dtype of x; weight, bias and all sums are float32, or float64 for float64. The result is in
    channels_last memory. Derivatives go through the reference.

    Lavin & Gray 2016, arXiv:1509.09308, section 4, with other points.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    return _op(x, weight, bias, residual, doubled)


def tiles(height: int, width: int) -> int:
    """Return how many tiles of 4 x 4 pixels cover an image."""
    return -(-height // _TILE) * -(-width // _TILE)


# A 3x3 convolution with its weight packed ahead, in a dtype, or with its weight as it is.
Way = Literal[
    "packed float32", "packed bfloat16", "forward", "gradient of x", "gradient of the weight"
]
WIDTHS = (16, 32, 64, 128, 256, 512)  # channels that were measured
Least = dict[Way, list[list[int | None]]]  # by C and by O in WIDTHS
FASTER = Path(__file__).with_name("faster_cpu.json")
LEVELS = ("portable", "avx2", "avx512", "vnni")  # as csrc/cpu/simd.h numbers them


def _least() -> Least | None:
    """Return from how many tiles on our kernel is the faster one on this processor.

    `python -m benchmarks.tiles` measured it. None is not up to what was measured, or no kernel.
    """
    try:
        level = _native.cpu_library().ds_simd_level()
    except ImportError:
        return None
    return json.loads(FASTER.read_text())[LEVELS[level]]


_LEAST = _least()  # now, since torch.compile cannot trace it


def pays(way: Way, weight: Tensor, images: int, height: int, width: int) -> bool:
    """Return whether our kernel in tiles is the faster 3x3 convolution to images of this size.

    The transforms, of the weight above all, cost more than they save where tiles are few.
    """
    out, channels = weight.shape[:2]
    if _LEAST is None or out % PANEL or channels % PANEL:
        return False
    least = _LEAST[way][_nearest(channels)][_nearest(out)]
    return least is not None and images * tiles(height, width) >= least


def _nearest(channels: int) -> int:
    """Return the index in WIDTHS of the nearest number of channels, by their ratio."""
    return min(max(round(math.log2(channels / WIDTHS[0])), 0), len(WIDTHS) - 1)


def _channels(weight: Tensor) -> int:
    return weight.shape[1] * weight.shape[3]


@functools.cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Return B^T [6, 6], G [6, 3] and A^T [4, 6] for the points and infinity, float64.

    A row of B^T is the polynomial that is 0 at all other finite points, of G what divides by its
    value there: interpolation of the product of two polynomials (Toom and Cook).
    """
    b, g, a = torch.zeros(3, 6, 6, dtype=torch.float64, device="cpu")
    for k, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        powers = point ** torch.arange(6, dtype=torch.float64, device="cpu")
        b[k] = _polynomial(others)
        g[k] = powers / math.prod(point - other for other in others)
        a[k] = powers
    b[5] = _polynomial(POINTS)
    g[5, 2] = a[5, 3] = 1
    return b, g[:, :3], a[:, :4].T


def _polynomial(roots: tuple[float, ...] | list[float]) -> Tensor:
    """Return the six coefficients of a polynomial of at most degree 5, lowest first."""
    coefficients = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64, device="cpu")
    for root in roots:
        coefficients = coefficients.roll(1) - root * coefficients
    return coefficients


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, doubled: bool
) -> Tensor:
    """Compute A^T ((B^T d B) * U) A for tiles d of 6 x 6 pixels, summed over channels."""
    wide = torch.promote_types(x.dtype, torch.float32)
    b, _, a = (matrix.to(x.device, wide) for matrix in _matrices())
    d = x.to(wide)
    if doubled:
        d = d.repeat_interleave(2, 2).repeat_interleave(2, 3)
    h, w = d.shape[2:]
    d = F.pad(d, (1, 1 + -w % _TILE, 1, 1 + -h % _TILE)).unfold(2, 6, _TILE).unfold(3, 6, _TILE)
    v = torch.einsum("ik,nchwkl,jl->ijnhwc", b, d, b)
    m = torch.einsum("anhwc,aocp->anhwop", v.flatten(0, 1), weight.to(wide))
    m = m.flatten(-2).unflatten(0, (6, 6))
    y = torch.einsum("pi,ijnhwo,qj->nohpwq", a, m, a).flatten(4, 5).flatten(2, 3)[:, :, :h, :w]
    if bias is not None:
        y = y + bias.to(wide)[:, None, None]
    if residual is not None:
        y = y + residual.to(wide)
    return channels_last(y.to(x.dtype))


def fake(x, weight, bias, residual, doubled):
    return empty(x, _channels(weight), doubled)


def empty(x: Tensor, out: int, doubled: bool) -> Tensor:
    """Return an empty result with this number of channels."""
    images, _, h, w = x.shape
    return x.new_empty((images, h << doubled, w << doubled, out)).permute(0, 3, 1, 2)


_op = Op(
    "winograd_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool doubled)"
    " -> Tensor",
    """
    x [N, C, H, W] floating
    weight [36, B, C, P] wide of x
    min(C, H, W) >= 1 : x must have channels and pixels, not shape {list(x.shape)}
    bias [B * P] wide of x
    residual [N, B * P, H << doubled, W << doubled] of x
    """,
    reference,
    fake,
)


@_op.backend("cpu", "cpu")
def _():
    launch_kernel = kernel()

    def launch(x, weight, bias, residual, doubled):
        channels, panel = weight.shape[2:]
        if x.dtype not in (torch.float32, torch.bfloat16) or panel != PANEL:
            raise Unsupported(
                f"it takes float32, bfloat16 and multiples of {PANEL} channels, not {x.dtype} and"
                f" {_channels(weight)}"
            )
        y = fake(x, weight, bias, residual, doubled)
        return launch_kernel(x, channels, weight, None, bias, residual, y, doubled)

    return launch


def task(count: int, out: int, threads: int) -> tuple[int, int]:
    """Return how many tiles, and channels of the result, are a task.

    Tiles are few enough for a cache, and the tasks as many for each thread. Of a few tiles each
    thread makes some channels, so that it reads its part of the weight alone.
    """
    if count <= _BLOCK:
        return max(1, count), _to_multiple(max(1, -(-out // threads)), PANEL)
    tasks = _to_multiple(-(-count // _BLOCK), threads)
    return min(_BLOCK, _to_multiple(-(-count // tasks), _ROWS)), max(1, out)


def _to_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def kernel() -> Callable[..., Tensor]:
    """Return what convolves in tiles on a CPU: weight and scale are as csrc/cpu/winograd.cpp says.

    It writes y and returns it.
    """
    kernel = _native.cpu_library().ds_winograd_conv

    def launch(x, channels, weight, scale, bias, residual, y, doubled):
        if channels % PANEL or channels > MOST_CHANNELS:
            raise Unsupported(
                f"it takes multiples of {PANEL} channels up to {MOST_CHANNELS}, not {channels}"
            )
        x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous()
        scale, bias = (None if v is None else v.contiguous() for v in (scale, bias))
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        images, out, h, w = y.shape
        block, width = task(images * tiles(h, w), out, torch.get_num_threads())
        pointers = (None if v is None else v.data_ptr() for v in (scale, bias, residual))
        error = kernel(
            x.data_ptr(), weight.data_ptr(), *pointers, y.data_ptr(), images, h, w, channels, out,
            block, width, doubled, x.dtype == torch.bfloat16,
        )  # fmt: skip
        _native.check("winograd_conv", error)
        return y

    return launch
