"""GroupNorm, with SiLU or without: y = f(weight * (x - mean) / sqrt(var + eps) + bias)."""

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds.ops import _native
from ds.ops._op import Op, Unsupported


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6
) -> Tensor:
    """Normalize groups of channels, scale and shift channels, then apply SiLU.

    x is [N, C, ...], weight and bias are [C]. Statistics are float32 (float64 for a float64 x). The
    result has the dtype of x, and its memory format where x is contiguous or channels_last; other
    strides give a contiguous result. Not twice differentiable.

    Wu & He 2018, arXiv:1803.08494, Eq. 1, 2, 6 and 7.

    Raises:
        ValueError: a shape does not fit, C is no multiple of groups, or a dtype is not floating.
    """
    _check("group_norm_silu", x, weight, bias, groups)
    return torch.ops.ds.group_norm_silu(x, weight, bias, groups, eps, True)[0]


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """Normalize groups of channels, scale and shift channels: group_norm_silu without the SiLU."""
    _check("group_norm", x, weight, bias, groups)
    return torch.ops.ds.group_norm_silu(x, weight, bias, groups, eps, False)[0]


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    if x.dim() < 2:
        raise ValueError(f"{name}: x must be [N, C, ...], not of shape {list(x.shape)}")
    channels = x.shape[1]
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"{name}: channels ({channels}) must be a multiple of groups ({groups})")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            raise ValueError(
                f"{name}: {label} must be [{channels}], one value a channel of x,"
                f" not of shape {list(tensor.shape)}"
            )
    if not (x.is_floating_point() and weight.is_floating_point() and bias.is_floating_point()):
        dtypes = f"{x.dtype}, {weight.dtype} and {bias.dtype}"
        raise ValueError(f"{name}: x, weight and bias must be floating point, not {dtypes}")


def _dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy: channels_last where the channels of a pixel are neighbors."""
    if x.is_contiguous():
        return x
    if x.dim() == 4 and x.stride(1) == 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View [C] so that it broadcasts against x [N, C, ...], in the dtype of computation."""
    return values.to(_wide(x.dtype)).view(-1, *[1] * (x.dim() - 2))


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and the mean and 1 / sqrt(var + eps) of each group, [N, groups]."""
    x = _dense(x)
    grouped = x.to(_wide(x.dtype)).unflatten(1, (groups, x.shape[1] // groups))
    inner = tuple(range(2, grouped.dim()))
    mean = grouped.mean(inner, keepdim=True)
    centred = grouped - mean
    rstd = (centred.square().mean(inner, keepdim=True) + eps).rsqrt()
    y = (centred * rstd).flatten(1, 2) * _per_channel(weight, x) + _per_channel(bias, x)
    y = F.silu(y) if silu else y
    return _like(y, x), mean.flatten(1), rstd.flatten(1)


def fake(x, weight, bias, groups, eps, silu):
    statistic = x.new_empty((x.shape[0], groups), dtype=_wide(x.dtype))
    return torch.empty_like(_dense(x)), statistic, torch.empty_like(statistic)


forward = Op(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
    reference,
    fake,
)


@forward.backend("cpu", "cpu")
def _():
    kernel = _native.library().ds_group_norm_silu

    def launch(x, weight, bias, groups, eps, silu):
        narrow = x.dtype == torch.bfloat16
        if not narrow and x.dtype != torch.float32:
            raise Unsupported(f"it takes x in float32 or bfloat16, not {x.dtype}")
        x = _dense(x)
        weight, bias = weight.float().contiguous(), bias.float().contiguous()
        images, channels, *pixels = x.shape
        y = torch.empty_like(x)
        mean = torch.empty((images, groups))
        rstd = torch.empty((images, groups))
        error = kernel(
            x.data_ptr(), weight.data_ptr(), bias.data_ptr(),
            y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            images, channels, math.prod(pixels), groups,
            eps, silu, not x.is_contiguous(), narrow,
        )  # fmt: skip
        if error:
            raise RuntimeError(f"group_norm_silu: the thread pool failed with error {error}")
        return y, mean, rstd

    return launch


@forward.backend("cluster", "cuda")
def _():
    """The CUDA kernel that reads x once, for images that no program of Triton's holds whole."""
    lib = _native.cuda_kernels(capability=90, shared=227 * 1024)

    def launch(x, weight, bias, groups, eps, silu):
        if math.prod(x.shape[2:]) <= 1024:
            raise Unsupported("it takes images of more than 1024 pixels")
        return _launch_cuda(lib, True, x, weight, bias, groups, eps, silu)

    return launch


@forward.backend("triton", "cuda")
def _():
    kernels = _kernels()

    def launch(x, weight, bias, groups, eps, silu):
        x = _dense(x)
        _check_kernels_take(x)
        with torch.cuda.device_of(x):
            y, mean, rstd = kernels.group_norm_silu(_rows(x), weight, bias, groups, eps, silu)
        return _from_rows(y, x), mean, rstd

    return launch


def _kernels():
    try:
        from ds.kernels import group_norm_silu
    except ImportError as error:
        raise ImportError(f"Triton does not load: {error} (pip install triton)") from error
    return group_norm_silu


def _check_kernels_take(x: Tensor) -> None:
    if x.dtype not in _native.TYPES:
        raise Unsupported(f"it takes x in float32, float16 or bfloat16, not {x.dtype}")
    if 0 in x.shape[2:]:
        raise Unsupported("it takes no images without pixels")


def _rows(x: Tensor) -> Tensor:
    """Return x [N, C, ...] as [N, pixels, C], without a copy where it is channels_last."""
    return x.reshape(_sizes(x)).transpose(1, 2).contiguous()


def _from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """Return [N, pixels, C] in the shape and strides of x, without a copy if channels_last."""
    return _like(rows.transpose(1, 2).reshape(x.shape), x)


@forward.backend("cuda", "cuda")
def _():
    """The CUDA kernels that read x twice, for GPUs from sm_80 on."""
    lib = _native.cuda_kernels(capability=80)

    def launch(x, weight, bias, groups, eps, silu):
        return _launch_cuda(lib, False, x, weight, bias, groups, eps, silu)

    return launch


def _launch_cuda(
    lib: ctypes.CDLL,
    cluster: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    _check_kernels_take(x)
    images, channels, pixels = _sizes(x)
    tiles = lib.ds_cuda_group_norm_silu_tiles(pixels, channels, groups, x.itemsize, cluster, None)
    if not tiles:
        raise Unsupported(f"it cannot cut {pixels} pixels of {channels} channels, {groups} groups")
    rows = _rows(x)
    if rows.data_ptr() % 16:
        raise Unsupported("it takes x that starts on a multiple of 16 bytes")
    weight, bias = _parameter(weight), _parameter(bias)
    y = torch.empty_like(rows)
    mean = torch.empty((images, groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    table = mean.new_empty((0,) if cluster else (images, tiles, 2, channels))  # empty: no address
    _native.cuda_launch(
        lib.ds_cuda_group_norm_silu, x,
        rows.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), table.data_ptr() or None,
        images, pixels, channels, groups, eps, silu,
        _native.TYPES[x.dtype], _native.TYPES[weight.dtype], _native.TYPES[bias.dtype],
    )  # fmt: skip
    return _from_rows(y, x), mean, rstd


def _parameter(values: Tensor) -> Tensor:
    return (values if values.dtype in _native.TYPES else values.float()).contiguous()


@forward.backend("aten", "cpu", "cuda")
def _():
    """PyTorch's own kernels, on float32 copies of narrower types so that statistics stay wide."""

    def launch(x, weight, bias, groups, eps, silu):
        x = _dense(x)
        y, mean, rstd = torch.ops.aten.native_group_norm(
            *_widened(x.dtype, x, weight, bias), *_sizes(x), groups, eps
        )
        return _like(F.silu(y) if silu else y, x), mean, rstd

    return launch


def _widened(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(_wide(dtype)) for tensor in tensors]


def _sizes(x: Tensor) -> tuple[int, int, int]:
    images, channels, *pixels = x.shape
    return images, channels, math.prod(pixels)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """Return y in the dtype and strides of x, which PyTorch's kernels do not always keep."""
    same = y.dtype == x.dtype and y.stride() == x.stride()
    return y if same else torch.empty_like(x).copy_(y)


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, recomputing what SiLU was applied to.

    With xhat = (x - mean) * rstd and g = grad * f'(weight * xhat + bias):
    d bias = sum g, d weight = sum g * xhat and, with h = g * weight and means over the group,
    d x = rstd * (h - mean(h) - xhat * mean(h * xhat)).
    """
    x = _dense(x)
    wide = _wide(x.dtype)
    outer = (0, *range(2, x.dim()))
    shape = (*mean.shape, *[1] * (x.dim() - 1))
    grouped = x.to(wide).unflatten(1, (groups, x.shape[1] // groups))
    inner = tuple(range(2, grouped.dim()))
    xhat = (grouped - mean.view(shape)) * rstd.view(shape)
    flat = xhat.flatten(1, 2)
    g = grad.to(wide)
    if silu:
        y = flat * _per_channel(weight, x) + _per_channel(bias, x)
        g = torch.ops.aten.silu_backward(g, y)
    d_bias, d_weight = g.sum(outer), (g * flat).sum(outer)
    h = (g * _per_channel(weight, x)).unflatten(1, grouped.shape[1:3])
    along = (h * xhat).mean(inner, keepdim=True)
    d_x = (h - h.mean(inner, keepdim=True) - xhat * along) * rstd.view(shape)
    return _like(d_x.flatten(1, 2), x), d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def fake_backward(grad, x, weight, bias, mean, rstd, groups, silu):
    shape = weight.shape
    return torch.empty_like(_dense(x)), weight.new_empty(shape), bias.new_empty(shape)


backward = Op(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
    " Tensor rstd, int groups, bool silu) -> (Tensor, Tensor, Tensor)",
    reference_backward,
    fake_backward,
)


@backward.backend("cpu", "cpu")
def _():
    kernel = _native.library().ds_group_norm_silu_backward

    def launch(grad, x, weight, bias, mean, rstd, groups, silu):
        narrow = x.dtype == torch.bfloat16
        if not narrow and x.dtype != torch.float32:
            raise Unsupported(f"it takes x in float32 or bfloat16, not {x.dtype}")
        x = _dense(x)
        grad = _like(grad, x)
        images, channels, pixels = _sizes(x)
        w, b = weight.float().contiguous(), bias.float().contiguous()
        d_x, d_weight, d_bias = torch.empty_like(x), torch.empty_like(w), torch.empty_like(b)
        rows = torch.empty((2, images, channels), dtype=torch.float64)
        error = kernel(
            grad.data_ptr(), x.data_ptr(), w.data_ptr(), b.data_ptr(),
            mean.data_ptr(), rstd.data_ptr(),
            d_x.data_ptr(), d_weight.data_ptr(), d_bias.data_ptr(), rows.data_ptr(),
            images, channels, pixels, groups, silu, not x.is_contiguous(), narrow,
        )  # fmt: skip
        if error:
            raise RuntimeError(f"group_norm_silu: the thread pool failed with error {error}")
        return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype)

    return launch


@backward.backend("triton", "cuda")
def _():
    kernels = _kernels()

    def launch(grad, x, weight, bias, mean, rstd, groups, silu):
        x = _dense(x)
        _check_kernels_take(x)
        grad = _rows(grad.to(x.dtype))
        with torch.cuda.device_of(x):
            d_x, d_weight, d_bias = kernels.group_norm_silu_backward(
                grad, _rows(x), weight, bias, mean, rstd, groups, silu
            )
        return _from_rows(d_x, x), d_weight, d_bias

    return launch


@backward.backend("aten", "cpu", "cuda")
def _():
    def launch(grad, x, weight, bias, mean, rstd, groups, silu):
        dense = _dense(x)
        x, grad, w, b = _widened(x.dtype, dense, _like(grad, dense), weight, bias)
        if silu:
            scale = w.view(groups, -1) * rstd[..., None]  # [N, groups, C / groups]
            shift = b.view(groups, -1) - mean[..., None] * scale
            columns = (*x.shape[:2], *[1] * (x.dim() - 2))
            y = torch.addcmul(shift.view(columns), x, scale.view(columns))
            grad = torch.ops.aten.silu_backward(grad, y)
        d_x, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, w, *_sizes(x), groups, [True] * 3
        )
        return _like(d_x, dense), d_weight.to(weight.dtype), d_bias.to(bias.dtype)

    return launch


def _save(ctx, inputs, output):
    x, weight, bias, ctx.groups, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)


@once_differentiable
def _gradient(ctx, grad, *_):
    d_x, d_weight, d_bias = torch.ops.ds.group_norm_silu_backward(
        grad, *ctx.saved_tensors, ctx.groups, ctx.silu
    )
    return d_x, d_weight, d_bias, None, None, None


forward.register_autograd(_gradient, _save)
