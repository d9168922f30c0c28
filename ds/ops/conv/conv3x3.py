"""A 3x3 convolution for training: in float32 on CPUs by Winograd's F(4x4, 3x3)."""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ds.ops import _native
from ds.ops.conv.winograd import PANEL, Way, pays, winograd_conv
from ds.ops.dispatch.op import Op, Unsupported
from ds.ops.dispatch.takes import check_places
from ds.ops.dispatch.transforms import channels_last

_PART = 96  # tiles that the gradient of the weight takes at a time, to stay in a cache


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x [N, C, H, W] with weight [O, C, 3, 3], padding by 1, plus bias [O].

    In exact arithmetic it is F.conv2d. In float32 on a CPU it takes a quarter of the
    multiplications, forward, in each gradient and in forward mode, where C and O are multiples of
    16 and N, H and W make as many tiles of 4 x 4 pixels as it was measured to be faster for.

    Raises:
        ValueError: tensors on several devices or without their memory; else what F.conv2d raises.

    Lavin & Gray 2016, arXiv:1509.09308; the points are those of winograd_conv.
    """
    if _pays(x, weight, bias):
        return _op(x, weight, bias)
    if not torch.compiler.is_compiling():
        check_places("conv3x3", x=x, weight=weight, bias=bias)
    return F.conv2d(x, weight, bias, padding=1)


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether tiles are faster in any part of the work; False for misfits.

    F.conv2d raises for these.
    """
    given = [x, weight] if bias is None else [x, weight, bias]
    if not all(isinstance(t, Tensor) for t in given):
        return False
    kinds = {(t.device.type, t.dtype) for t in given}
    if kinds != {("cpu", torch.float32)} or torch.is_autocast_enabled("cpu"):
        return False
    # Programs that are exported have PyTorch's own ops only. PyTorch 2.11 calls compiling so too.
    if torch.compiler.is_exporting():
        return False
    if x.dim() != 4 or weight.shape != (len(weight), x.shape[1], 3, 3):
        return False
    fits = bias is None or bias.shape == weight.shape[:1]
    ways: list[Way] = ["forward"]
    if torch.is_grad_enabled():
        ways += ["gradient of x"] * x.requires_grad
        ways += ["gradient of the weight"] * weight.requires_grad
    return fits and any(pays(way, weight, len(x), *x.shape[2:]) for way in ways)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y[n, o, p] = sum over c and q of weight[o, c, q] x[n, c, p + q - 1], plus bias[o]."""
    y = F.conv2d(x, weight, bias, padding=1)
    return channels_last(y)


def reference_backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]):
    """Compute the gradients of x and weight, each empty unless wanted."""
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*wanted, False]
    )
    return tuple(dy.new_empty(0) if grad is None else channels_last(grad) for grad in (dx, dweight))


def fake(x, weight, bias):
    return x.new_empty(x.shape[0], *x.shape[2:], len(weight)).permute(0, 3, 1, 2)


def fake_backward(dy, x, weight, wanted):
    return tuple(
        torch.empty_like(of, memory_format=torch.channels_last) if want else dy.new_empty(0)
        for of, want in zip((x, weight), wanted, strict=True)
    )


_TAKES = """
    x [N, C, H, W] floating
    weight [O, C, 3, 3] of x
    min(O, C, H, W) >= 1 : x and weight must have channels and pixels, not shapes {list(x.shape)} \
and {list(weight.shape)}
"""
_op = Op(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    f"{_TAKES} bias [O] of x",
    reference,
    fake,
)
_backward = Op(
    "conv3x3_backward(Tensor dy, Tensor x, Tensor weight, bool[] wanted) -> (Tensor, Tensor)",
    f"""
    {_TAKES}
    dy [N, O, H, W] of x
    len(wanted) == 2 : wanted must be 2 values, not {{len(wanted)}}
    """,
    reference_backward,
    fake_backward,
)


def setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def backward(ctx, dy):
    x, weight = ctx.saved_tensors
    *wanted, bias = ctx.needs_input_grad
    dx, dweight = _backward(dy, x, weight, wanted)
    grads = [grad if want else None for grad, want in zip((dx, dweight), wanted, strict=True)]
    return *grads, dy.sum((0, 2, 3)) if bias else None


_op.register_autograd(backward, setup_context)


def _tangents(primals, tangents, y):
    """Return x * d weight + d x * weight + d bias, where * is the convolution."""
    x, weight, _ = primals
    d_x, d_weight, d_bias = tangents
    terms = [] if d_x is None else [_op(d_x, weight, None)]
    terms += [] if d_weight is None else [_op(x, d_weight, None)]
    terms += [] if d_bias is None else [d_bias[:, None, None].expand_as(y)]
    return sum(terms[1:], terms[0])


_op.register_tangents(_tangents)


def by_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve by Winograd. Raises ImportError where its kernel was not built."""
    _check_takes(x, weight)
    return winograd_conv(x, _packed(weight), bias)


def gradients_by_tiles(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Make the gradients by Winograd. Raises ImportError where its kernels were not built."""
    _check_takes(x, weight)
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    dx, dweight = fake_backward(dy, x, weight, wanted)
    if wanted[0]:
        dx = winograd_conv(dy, _packed(weight, transposed=True))
    if wanted[1]:
        images, channels, h, w = x.shape
        error = _native.cpu_library().ds_winograd_weight_gradient(
            x.data_ptr(), dy.data_ptr(), dweight.data_ptr(),
            images, h, w, channels, len(weight), _PART,
        )  # fmt: skip
        _native.check("conv3x3_backward", error)
    return dx, dweight


@_op.backend("measured", "cpu")
def _():
    _native.cpu_library()

    def launch(x, weight, bias):
        _check_takes(x, weight)
        ours = pays("forward", weight, len(x), *x.shape[2:])
        return (by_tiles if ours else reference)(x, weight, bias)

    return launch


@_backward.backend("measured", "cpu")
def _():
    _native.cpu_library()

    def launch(dy, x, weight, wanted):
        _check_takes(x, weight)
        ours = [
            want and pays(way, weight, len(x), *x.shape[2:])
            for want, way in zip(wanted, get_args(Way)[-2:], strict=True)
        ]
        theirs = [want and not our for want, our in zip(wanted, ours, strict=True)]
        found = gradients_by_tiles(dy, x, weight, ours)
        if any(theirs):
            pairs = zip(found, reference_backward(dy, x, weight, theirs), strict=True)
            found = tuple(b if by else a for (a, b), by in zip(pairs, theirs, strict=True))
        return found

    return launch


@_op.backend("cpu", "cpu")
def _():
    _native.cpu_library()
    return by_tiles


@_backward.backend("cpu", "cpu")
def _():
    _native.cpu_library()
    return gradients_by_tiles


def _check_takes(x: Tensor, weight: Tensor) -> None:
    if {x.dtype, weight.dtype} != {torch.float32} or any(n % PANEL for n in weight.shape[:2]):
        raise Unsupported(
            f"it takes float32 and multiples of {PANEL} channels, not {x.dtype}, {weight.dtype} "
            f"and {list(weight.shape[:2])}"
        )


def _packed(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """Return the panels of winograd_weight for the convolution, or for the gradient of its x."""
    out, channels = weight.shape[:2]
    rows, columns = (out, channels) if transposed else (channels, out)
    panels = weight.new_empty(36, columns // PANEL, rows, PANEL)
    weight = weight.contiguous(memory_format=torch.channels_last)
    pack = _native.cpu_library().ds_winograd_weight
    error = pack(weight.data_ptr(), panels.data_ptr(), out, channels, transposed)
    _native.check("winograd_weight", error)
    return panels
