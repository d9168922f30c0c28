"""The convolutions of a U-Net: with what is added to their result, and with the norm after that."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ds.ops.dispatch.op import Op, Unsupported, triton_kernels
from ds.ops.dispatch.transforms import channels_last
from ds.ops.float8 import FLOAT8, check_converts
from ds.ops.group_norm_silu import reference as reference_of_norm


def phase_weight(weight: Tensor) -> Tensor:
    """Pack a 3x3 weight for images whose every pixel is doubled: float64 [4 O, C, 2, 2].

    Output pixel 2 i + a sees the pixels i - 1 + a and i + a of the image before it was doubled,
    each through the sum of the taps that meet it. In both directions that makes 16 products of 36.
    The phases (a, b) are one after the other.

    Raises:
        ValueError: the weight is not [O, C, 3, 3].
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"phase_weight: weight must be [O, C, 3, 3], not of shape {list(weight.shape)}"
        )
    w = weight.double()
    halves = [_merge_taps(w, a, dim=2) for a in (0, 1)]
    return torch.cat([_merge_taps(half, b, dim=3) for half in halves for b in (0, 1)])


def _merge_taps(w: Tensor, phase: int, dim: int) -> Tensor:
    first, middle, last = w.unbind(dim)
    taps = (first + middle, last) if phase else (first, middle + last)
    return torch.stack(taps, dim)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    scale: Tensor | None = None,
) -> Tensor:
    """Convolve x [N, C, H, W]; add a bias [O] or [N, O] and a residual of the result's shape.

    The weight is [O, C, 1, 1], or [O, C, 3, 3] padding by 1, with stride 2 on the right and below
    only (TensorFlow's SAME for even sizes); or [4 O, C, 2, 2] of phase_weight, for x with every
    pixel doubled. The result is [N, O, H / stride, W / stride], rounded down, or [N, O, 2 H, 2 W],
    in channels_last memory, which for weight and x saves a copy. x, weight and residual have one
    dtype, the bias any; sums are float32 (float64 for a float64 x). Derivatives go through the
    reference.

    x and weight may be float8_e4m3fn, with the `scale` of each row of the weight, as float8_weight
    returns them; the residual and the result are bfloat16 then.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    return _op(x, weight, bias, residual, stride, scale)


def conv_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    silu: bool = True,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return the group_norm_silu of conv's result, and that result if it is to be kept, or None.

    `silu` leaves the SiLU away if it is False. Arguments are those of conv and of group_norm_silu.

    Raises:
        ValueError: a shape or dtype does not fit, or the channels are no multiple of groups.
    """
    normed, y = _norm_op(
        x, weight, bias, residual, stride, norm_weight, norm_bias, groups, eps, silu, keep
    )
    return normed, y if keep else None


def _shape(x: Tensor, weight: Tensor, stride: int) -> list[int]:
    images, _, height, width = x.shape
    if weight.shape[2] == 2:
        return [images, len(weight) // 4, 2 * height, 2 * width]
    return [images, len(weight), height // stride, width // stride]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute in float32, or in float64 for float64 inputs."""
    wide = torch.promote_types(_made(x), torch.float32)
    weight = weight.to(wide)
    if scale is not None:
        weight = weight * scale.to(wide)[:, None, None, None]
    y = _convolve(x.to(wide), weight, stride)
    if bias is not None:
        y = y + bias.to(wide)[..., None, None]
    if residual is not None:
        y = y + residual.to(wide)
    return channels_last(y.to(_made(x)))


def _made(x: Tensor) -> torch.dtype:
    """Return the dtype of the result."""
    return torch.bfloat16 if x.dtype == FLOAT8 else x.dtype


def _convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    if stride == 2:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2)
    y = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    if weight.shape[2] != 2:
        return y
    h, w = x.shape[2:]
    phases = y.unflatten(1, (2, 2, -1)).permute(1, 2, 0, 3, 4, 5)
    rows = [
        torch.stack([phases[a, b, :, :, a : a + h, b : b + w] for b in (0, 1)], -1).flatten(-2)
        for a in (0, 1)
    ]
    return torch.stack(rows, -2).flatten(-3, -2)


def fake(x, weight, bias, residual, stride, scale=None):
    images, out, height, width = _shape(x, weight, stride)
    return x.new_empty((images, height, width, out), dtype=_made(x)).permute(0, 3, 1, 2)


_TAKES = """
    weight [R, I, K, L] of x
    K == L and K in (1, 2, 3) : weight must be [O, C, 1, 1], [O, C, 3, 3] or [4 O, C, 2, 2], not \
of shape {list(weight.shape)}
    I == C : x must be [N, C, H, W] with the weight's {I} channels, not of shape {list(x.shape)}
    stride == 1 or (stride == 2 and K == 3) : stride must be 1, or 2 for a 3x3 weight, not \
{stride} for {K}x{K}
    K != 2 or R % 4 == 0 : rows of a 2x2 weight must be 4 O, not {R}
    min(R, C) >= 1 and min(H, W) >= stride : x must have channels and at least {stride} x {stride} \
pixels, and weight rows, not shapes {list(x.shape)} and {list(weight.shape)}
    O = R // 4 if K == 2 else R
    Y = 2 * H if K == 2 else H // stride
    X = 2 * W if K == 2 else W // stride
    bias [O] or [N, O] floating
"""
_op = Op(
    "conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int stride,"
    " Tensor? scale=None) -> Tensor",
    f"""
    x [N, C, H, W] floating or float8
    {_TAKES}
    residual [N, O, Y, X] result of x
    scale [R] floating
    scale is not None or x.dtype not in DTYPES["float8"] : scale must be [{{R}}] \
for x of {{x.dtype}}
    scale is None or x.dtype in DTYPES["float8"] : scale is for x of torch.float8_e4m3fn only, \
not for {{x.dtype}}
    """,
    reference,
    fake,
)


@_op.backend("triton", "cuda")
def _():
    kernels = triton_kernels("conv")

    def launch(x, weight, bias, residual, stride, scale=None):
        if scale is not None:
            check_converts(x.device)
        arguments = _arguments(kernels, x, weight, bias, residual, stride)
        with torch.cuda.device_of(x):
            scale = None if scale is None else scale.contiguous()
            return kernels.conv(*arguments, scale).permute(0, 3, 1, 2)

    return launch


@_op.backend("hopper", "cuda")  # behind triton, which takes all it takes: only if asked for
def _():
    kernels = triton_kernels("conv_hopper")

    def launch(x, weight, bias, residual, stride, scale=None):
        _check_hopper(x.device)
        *arguments, _ = _arguments(kernels, x, weight, bias, residual, stride)
        with torch.cuda.device_of(x):
            return kernels.conv(*arguments).permute(0, 3, 1, 2)

    return launch


def _check_hopper(device: torch.device) -> None:
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device))[0] != 9:
        raise Unsupported(f"it needs sm_90, not sm_{found[0]}{found[1]}")


def _arguments(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
) -> tuple[Tensor | int | None, ...]:
    """Return images and weight as contiguous [N, H, W, C], without a copy of channels_last ones."""
    if reason := kernels.refusal(x, weight, stride):
        raise Unsupported(reason)
    x, weight, residual = (
        None if t is None else t.permute(0, 2, 3, 1).contiguous() for t in (x, weight, residual)
    )
    return x, weight, bias, residual, stride


def reference_norm(
    x, weight, bias, residual, stride, norm_weight, norm_bias, groups, eps, silu, keep
) -> tuple[Tensor, Tensor]:
    """Return normed, and y or, where it is not to be kept, an empty tensor."""
    y = reference(x, weight, bias, residual, stride)
    normed, *_ = reference_of_norm(y, norm_weight, norm_bias, groups, eps, silu)
    return normed, y if keep else x.new_empty(0)


def fake_norm(x, weight, bias, residual, stride, norm_weight, norm_bias, groups, eps, silu, keep):
    y = fake(x, weight, bias, residual, stride)
    return torch.empty_like(y), y if keep else x.new_empty(0)


_norm_op = Op(
    "conv_group_norm_silu(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int stride,"
    " Tensor norm_weight, Tensor norm_bias, int groups, float eps, bool silu, bool keep)"
    " -> (Tensor, Tensor)",
    f"""
    x [N, C, H, W] floating
    {_TAKES}
    residual [N, O, Y, X] of x
    norm_weight [O] or [N, O] floating
    norm_bias [O] or [N, O] floating
    norm_weight.shape == norm_bias.shape : norm_weight and norm_bias must have one shape, not \
{{list(norm_weight.shape)}} and {{list(norm_bias.shape)}}
    groups >= 1 and O % groups == 0 : channels ({{O}}) must be a multiple of groups ({{groups}})
    """,
    reference_norm,
    fake_norm,
)


@_norm_op.backend("triton", "cuda")
def _():
    kernels = triton_kernels("conv")

    def launch(x, weight, bias, residual, stride, *norm):
        *norm, keep = norm
        arguments = _arguments(kernels, x, weight, bias, residual, stride)
        with torch.cuda.device_of(x):
            normed, y = kernels.conv_group_norm_silu(*arguments, kernels.Norm(*norm), keep)
        return normed.permute(0, 3, 1, 2), x.new_empty(0) if y is None else y.permute(0, 3, 1, 2)

    return launch


@_norm_op.backend("hopper", "cuda")
def _():
    kernels = triton_kernels("conv_hopper")

    def launch(x, weight, bias, residual, stride, *norm):
        *norm, keep = norm
        _check_hopper(x.device)
        *arguments, _ = _arguments(kernels, x, weight, bias, residual, stride)
        with torch.cuda.device_of(x):
            normed, y = kernels.conv_group_norm_silu(*arguments, kernels.Norm(*norm), keep)
        return normed.permute(0, 3, 1, 2), x.new_empty(0) if y is None else y.permute(0, 3, 1, 2)

    return launch
