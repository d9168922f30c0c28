"""uint8 images from the floats that networks see, and back. The two formulas are in this file only.

level = round(clip(x, -1, 1) * 127.5 + 127.5)        x = level / 127.5 - 1
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Op, Unsupported, triton_kernels

Rounding = Literal["round", "floor"]


def quantize(x: Tensor, rounding: Rounding = "round") -> Tensor:
    """Convert floats [N, C, ...], clipped to [-1, 1], to uint8 [N, ..., C]; NaN becomes 0.

    Computed in float32 (float64 for a float64 x). "round", to nearest even, is unbiased; "floor"
    darkens by half a level.

    Raises:
        ValueError: another rounding, x has no channels or is not floating, or a derivative is
            asked for.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(
            f"quantize: rounding must be one of {', '.join(get_args(Rounding))}, not {rounding!r}"
        )
    return _op(x, rounding == "floor")


def dequantize(images: Tensor) -> Tensor:
    """Convert uint8 [N, ..., C] to float32 in [-1, 1], [N, C, ...] in the same memory order."""
    levels = images.movedim(-1, 1).float()
    # By a tensor: a GPU divides by a number through its reciprocal, unlike all other backends.
    return levels / levels.new_full((), 127.5) - 1


def reference(x: Tensor, floor: bool) -> Tensor:
    """Round product and sum one by one, as the kernels do: all backends agree to the bit."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    levels = x.clamp(-1, 1) * 127.5 + 127.5
    levels = levels.floor() if floor else levels.round()
    return levels.nan_to_num(0).to(torch.uint8).movedim(1, -1).contiguous()


def fake(x, floor):
    return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]), dtype=torch.uint8)


_op = Op(
    "quantize(Tensor x, bool floor) -> Tensor",
    "x [N, C, ...] floating",
    reference,
    fake,
    no_derivative="the result is uint8",
)


def _dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy where it is neither contiguous nor channels_last."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


@_op.backend("cpu", "cpu")
def _():
    kernel = _native.cpu_library().ds_quantize

    def launch(x, floor):
        is_bf16 = x.dtype == torch.bfloat16
        if not is_bf16 and x.dtype != torch.float32:
            raise Unsupported(f"it takes x in float32 or bfloat16, not {x.dtype}")
        x = _dense(x)
        levels = fake(x, floor)
        images, channels, pixels = len(x), x.shape[1], x.shape[2:].numel()
        error = kernel(
            x.data_ptr(), levels.data_ptr(), images, channels, pixels,
            floor, not x.is_contiguous(), is_bf16,
        )  # fmt: skip
        _native.check("quantize", error)
        return levels

    return launch


@_op.backend("triton", "cuda")
def _():
    kernels = triton_kernels("quantize")

    def launch(x, floor):
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise Unsupported(f"it takes x in float32, float16 or bfloat16, not {x.dtype}")
        with torch.cuda.device_of(x):
            return kernels.quantize(_dense(x), floor)

    return launch
