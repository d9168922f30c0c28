"""Winograd's convolution of bfloat16 images with products of 16-bit integers.

A processor with VNNI multiplies and adds two pairs of 16-bit integers, in 32 bits, in the time of
one pair of floats. Values that are transformed span a known range, so integers hold them ten times
as exactly as bfloat16 does.
"""

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops.conv import winograd
from ds.ops.conv.winograd import LEVELS, PANEL
from ds.ops.dispatch.op import Op, Unsupported

# No sum of products may pass 2^31. By Cauchy and Schwarz it is at most the product of the norms of
# a row, 32000 (csrc/cpu/winograd_products.h), and of a column of the weight; rounding adds to each
# at most half the root of the number of channels, 32.
_NORM, _MOST = 66000, 2**15 - 1


def winograd_int16_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Transform the weight of a 3x3 convolution [O, C, 3, 3] for winograd_int16_conv.

    The results are int16 [36, O / P, C / 2, P, 2], panels of P output channels as those of
    winograd_weight, and what an integer is worth, float32 [36, O].

    Raises:
        ValueError: the weight is not of that shape, or C is odd.
    """
    if weight.dim() != 4 or weight.shape[1] % 2:
        raise ValueError(
            "winograd_int16_weight: weight must be [O, C, 3, 3] with an even C, not of shape"
            f" {list(weight.shape)}"
        )
    panels = winograd.winograd_weight(weight, torch.float32)  # [36, O / P, C, P]
    norm, most = panels.norm(dim=2, keepdim=True), panels.abs().amax(2, keepdim=True)
    worth = torch.maximum(norm / _NORM, most / _MOST)
    integers = (panels / worth.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int16)
    pairs = integers.unflatten(2, (-1, 2)).transpose(3, 4).contiguous()
    return pairs, worth.flatten(1)


def winograd_int16_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    doubled: bool = False,
) -> Tensor:
    """Do what winograd_conv does, with weight and scale of winograd_int16_weight.

    x is [N, C, H, W] with C = 2 K for a weight [36, O / P, K, P, 2]. Our kernel takes bfloat16,
    scales the values of each tile to integers, and multiplies those exactly. Bias and scale are
    float32, or float64 for float64; derivatives and other dtypes go through the reference, which
    rounds nothing but the result.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    return _op(x, weight, scale, bias, residual, doubled)


def runs_fast() -> bool:
    """Return whether this processor has VNNI, without which floats are faster."""
    try:
        return LEVELS[_native.cpu_library().ds_simd_level()] == "vnni"
    except ImportError:
        return False


def _reference(x, weight, scale, bias, residual, doubled):
    panels = weight.transpose(3, 4).flatten(2, 3).to(scale.dtype)
    panels = panels * scale.unflatten(1, (-1, 1, weight.shape[3]))
    return winograd.reference(x, panels, bias, residual, doubled)


def _fake(x, weight, scale, bias, residual, doubled):
    return winograd.empty(x, scale.shape[1], doubled)


_op = Op(
    "winograd_int16_conv(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual,"
    " bool doubled) -> Tensor",
    """
    x [N, C, H, W] floating
    weight [36, B, K, P, 2] int16
    C == 2 * K : x must have {2 * K} channels as the weight has, not {C}
    min(C, H, W) >= 1 : x must have channels and pixels, not shape {list(x.shape)}
    scale [36, B * P] wide of x
    bias [B * P] wide of x
    residual [N, B * P, H << doubled, W << doubled] of x
    """,
    _reference,
    _fake,
)


@_op.backend("cpu", "cpu")
def _():
    launch_kernel = winograd.kernel()

    def launch(x, weight, scale, bias, residual, doubled):
        if x.dtype != torch.bfloat16 or weight.shape[3] != PANEL:
            raise Unsupported(
                f"it takes bfloat16 and multiples of {PANEL} channels, not {x.dtype} and"
                f" {scale.shape[1]}"
            )
        y = _fake(x, weight, scale, bias, residual, doubled)
        return launch_kernel(x, x.shape[1], weight, scale, bias, residual, y, doubled)

    return launch
