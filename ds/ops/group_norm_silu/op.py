"""GroupNorm, with SiLU or without: y = f(weight * (x - mean) / sqrt(var + eps) + bias)."""

import ctypes
import functools
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds.ops import _native
from ds.ops._op import Op, Unsupported, same_order, triton_kernels
from ds.ops.float8 import FLOAT8, check_converts, to_float8


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    float8: bool = False,
) -> Tensor:
    """Normalize groups of channels, scale and shift channels, then apply SiLU.

    x is [N, C, ...], weight and bias are [C]. Statistics are float32 (float64 for a float64 x). The
    result has the dtype of x, and its memory format where x is contiguous or channels_last; other
    strides give a contiguous result. Not twice differentiable.

    What else reads and writes x before a norm can be had in the same pass. Then it is not x that is
    normalized but cat(x + shift + residual, skip), summed in float32 and rounded to the dtype of x:

        shift     [C] or [N, C], as the bias of a convolution, or that and a time embedding
        residual  of the shape and dtype of x
        skip      [N, C2, ...], of the dtype of x; weight and bias are then [C + C2], and groups may
                  have channels of both

    With `float8` the result is float8_e4m3fn, rounded once as ds.ops.to_float8 does, for a product
    that takes it; it has no gradient then.

    Wu & He 2018, arXiv:1803.08494, Eq. 1, 2, 6 and 7.

    Raises:
        ValueError: a shape or dtype does not fit, or the channels are no multiple of groups.
    """
    shift = _shift_of_images(x, shift)
    if float8:
        return forward_float8(x, weight, bias, groups, eps, shift, residual, skip, False)[0]
    return forward(x, weight, bias, groups, eps, True, shift, residual, skip)[0]


def merge_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    float8: bool = False,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return group_norm_silu of the same arguments, and cat(x + shift + residual, skip).

    That is what was normalized, to the bit, for the branch that goes around the norm. The gradients
    that come back for both are added in the one pass that backward takes. Without `silu` the first
    is the group_norm of the second.

    Raises:
        ValueError: as group_norm_silu, if there is none of shift, residual and skip, and for
            float8 without SiLU.
    """
    name = "merge_group_norm_silu"
    if shift is residual is skip is None:
        raise ValueError(f"{name}: needs shift, residual or skip, or there is nothing to merge")
    if float8 and not silu:
        raise ValueError(f"{name}: float8 is for norms with silu, which was False")
    shift = _shift_of_images(x, shift)
    if float8:
        return forward_float8(x, weight, bias, groups, eps, shift, residual, skip, True)
    y, _, _, merged = forward(x, weight, bias, groups, eps, silu, shift, residual, skip, True)
    return y, merged


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """Normalize groups of channels, scale and shift channels: group_norm_silu without the SiLU."""
    return forward(x, weight, bias, groups, eps, False)[0]


def _shift_of_images(x: Tensor, shift: Tensor | None) -> Tensor | None:
    """Return shift as [N, C], where it is [C]; the op sees to the rest."""
    return shift.expand(len(x), -1) if isinstance(shift, Tensor) and shift.dim() == 1 else shift


def _dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy: channels_last where the channels of a pixel are neighbors."""
    if x.is_contiguous():
        return x
    if x.dim() == 4 and x.stride(1) == 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _resized(x: Tensor, channels: int) -> Tensor:
    """Return an empty tensor in the memory format of a dense x, of so many channels."""
    if channels == x.shape[1]:
        return torch.empty_like(x)
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View [C] so that it broadcasts against x [N, C, ...], in the dtype of computation."""
    return values.to(_wide(x.dtype)).view(-1, *[1] * (x.dim() - 2))


def merge(
    x: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Return cat(x + shift + residual, skip), dense; x itself if it is that.

    Summed in the dtype of computation and rounded once, which one PyTorch addition does by itself.
    """
    x = _dense(x)
    columns = None if shift is None else shift.view(*shift.shape, *[1] * (x.dim() - 2))
    addends = [addend for addend in (columns, residual) if addend is not None]
    if addends:
        once = len(addends) == 1 and addends[0].dtype == x.dtype
        total = x if once else x.to(_wide(x.dtype))
        for addend in addends:
            total = total + addend
        x = _like(total, x)
    if skip is not None:
        x = torch.cat([x, skip], 1).contiguous(memory_format=_format(x))
    return x


def _merged(
    x: Tensor, shift=None, residual=None, skip=None, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the merged x for a kernel that merges nothing itself, and what the op hands on."""
    merged = merge(x, shift, residual, skip)
    return merged, merged if keep else x.new_empty(0)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, *parts
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the mean and 1 / sqrt(var + eps) of each group, [N, groups], and what was merged.

    The last is empty unless it is to be kept.
    """
    x, kept = _merged(x, *parts)
    grouped = x.to(_wide(x.dtype)).unflatten(1, (groups, x.shape[1] // groups))
    inner = tuple(range(2, grouped.dim()))
    mean = grouped.mean(inner, keepdim=True)
    centred = grouped - mean
    rstd = (centred.square().mean(inner, keepdim=True) + eps).rsqrt()
    y = (centred * rstd).flatten(1, 2) * _per_channel(weight, x) + _per_channel(bias, x)
    y = F.silu(y) if silu else y
    return _like(y, x), mean.flatten(1), rstd.flatten(1), kept


def fake(x, weight, bias, groups, eps, silu, shift=None, residual=None, skip=None, keep=False):
    statistic = x.new_empty((x.shape[0], groups), dtype=_wide(x.dtype))
    y = _resized(_dense(x), weight.shape[0])
    merged = torch.empty_like(y) if keep else x.new_empty(0)
    return y, statistic, torch.empty_like(statistic), merged


_TAKES = """
    x [N, C, ...] floating
    shift [N, C] floating
    residual [N, C, ...] of x
    skip [N, S, ...] of x
    groups >= 1 and C + S >= 1 and (C + S) % groups == 0 : channels ({C + S}) must be a multiple \
of groups ({groups})
    weight [C + S] floating
    bias [C + S] floating
"""
forward = Op(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu,"
    " Tensor? shift=None, Tensor? residual=None, Tensor? skip=None, bool keep=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _TAKES,
    reference,
    fake,
)


@forward.backend("cpu", "cpu")
def _():
    kernel = _native.cpu_library().ds_group_norm_silu

    def launch(x, weight, bias, groups, eps, silu, *parts):
        narrow = _check_library_takes(x)
        x, kept = _merged(x, *parts)
        weight, bias = weight.float().contiguous(), bias.float().contiguous()
        images, channels, pixels = _sizes(x)
        y = torch.empty_like(x)
        mean = x.new_empty((images, groups), dtype=torch.float32)
        rstd = torch.empty_like(mean)
        error = kernel(
            x.data_ptr(), weight.data_ptr(), bias.data_ptr(),
            y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            images, channels, pixels, groups,
            eps, silu, not x.is_contiguous(), narrow,
        )  # fmt: skip
        _native.check("group_norm_silu", error)
        return y, mean, rstd, kept

    return launch


def _check_library_takes(x: Tensor) -> bool:
    """Return whether x is narrow."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise Unsupported(f"it takes x in float32 or bfloat16, not {x.dtype}")
    return x.dtype == torch.bfloat16


@forward.backend("triton", "cuda")
def _():
    kernels = triton_kernels("group_norm_silu")

    return functools.partial(_launch_triton, kernels)


def _launch_triton(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    keep: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _dense(x)
    _check_kernels_take(x)
    parts = _shift_rows(shift), _maybe_rows(residual), _maybe_rows(skip)
    with torch.cuda.device_of(x):
        y, mean, rstd, merged = kernels.group_norm_silu(
            _rows(x), weight, bias, groups, eps, silu, *parts, keep, dtype
        )
    like = x if skip is None else _resized(x, weight.shape[0])
    merged = _from_rows(merged, like) if keep else x.new_empty(0)
    return _from_rows(y, like), mean, rstd, merged


def _check_kernels_take(x: Tensor) -> None:
    if x.dtype not in _native.TYPES:
        raise Unsupported(f"it takes x in float32, float16 or bfloat16, not {x.dtype}")
    if 0 in x.shape[2:]:
        raise Unsupported("it takes no images without pixels")


def _rows(x: Tensor) -> Tensor:
    """Return x [N, C, ...] as [N, pixels, C], without a copy where it is channels_last."""
    return x.reshape(_sizes(x)).transpose(1, 2).contiguous()


def _maybe_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else _rows(x)


def _shift_rows(shift: Tensor | None) -> Tensor | None:
    """Return shift [N, C] with contiguous rows, which may all be one."""
    return shift if shift is None or shift.stride(1) == 1 else shift.contiguous()


def _from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """Return [N, pixels, C] in the shape and strides of x, without a copy if channels_last."""
    y = rows.transpose(1, 2).reshape(x.shape)
    if same_order(y, x):
        return y.as_strided(x.shape, x.stride())
    return torch.empty_like(x, dtype=y.dtype).copy_(y)


@forward.backend("cluster", "cuda")
def _():
    """The CUDA kernel that reads x once, for images that no program of Triton's holds whole."""
    lib = _native.cuda_kernels(capability=90, shared=227 * 1024)
    return functools.partial(_launch_cuda, lib, True)


@forward.backend("cuda", "cuda")
def _():
    """The CUDA kernels that read x twice, for GPUs from sm_80 on."""
    lib = _native.cuda_kernels(capability=80)
    return functools.partial(_launch_cuda, lib, False)


def _launch_cuda(
    lib: ctypes.CDLL,
    cluster: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    *parts,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_kernels_take(x)
    x, kept = _merged(x, *parts)
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
    return _from_rows(y, x), mean, rstd, kept


def _parameter(values: Tensor) -> Tensor:
    return (values if values.dtype in _native.TYPES else values.float()).contiguous()


@forward.backend("aten", "cpu", "cuda")
def _():
    """PyTorch's own kernels, on float32 copies of narrower types so that statistics stay wide."""

    def launch(x, weight, bias, groups, eps, silu, *parts):
        x, kept = _merged(x, *parts)
        y, mean, rstd = torch.ops.aten.native_group_norm(
            _pixels(x), *_parameters(x, weight, bias), *_sizes(x), groups, eps
        )
        return _like(F.silu(y) if silu else y, x), mean, rstd, kept

    return launch


def _pixels(x: Tensor) -> Tensor:
    """Return a dense tensor as PyTorch's kernels take it: wide, with the usual strides."""
    x = x.to(_wide(x.dtype))
    if x.is_contiguous():
        return x
    _, channels, height, width = x.shape
    return x.as_strided(x.shape, (channels * height * width, 1, width * channels, channels))


def _parameters(x: Tensor, *values: Tensor) -> list[Tensor]:
    """Return what has no pixels as PyTorch's kernels take it, which do not look at its strides."""
    return [value.to(_wide(x.dtype)).contiguous() for value in values]


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
    split: int,
    *parts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, shift and skip; x is what was merged, or its parts.

    What SiLU was applied to is computed again. With xhat = (x - mean) * rstd and
    g = grad * f'(weight * xhat + bias):
    d bias = sum g, d weight = sum g * xhat and, with h = g * weight and means over the group,
    d x = rstd * (h - mean(h) - xhat * mean(h * xhat)), and to that is added the gradient of what
    was merged. Its first `split` channels are those of x, and their sums over pixels d shift.
    """
    x = _merged_again(x, *parts)
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
    d_x, d_shift, d_skip = _split(d_x.flatten(1, 2), x, split, *parts)
    return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_shift, d_skip


def _merged_again(x: Tensor, shift=None, residual=None, skip=None, grad_merged=None) -> Tensor:
    """Return what forward merged: x itself if it was kept, when its gradient is here as well."""
    return merge(x, shift, residual, skip) if grad_merged is None else _dense(x)


def _split(
    d_merged: Tensor, x: Tensor, split: int, shift=None, residual=None, skip=None, grad_merged=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_x, d_shift and d_skip, in the dtype and memory format of x, which was merged."""
    if grad_merged is not None:
        d_merged = d_merged + grad_merged
    d_shift = x.new_empty(0)
    if shift is not None:
        sums = d_merged[:, :split, None].flatten(2).sum(2, dtype=_wide(x.dtype))
        d_shift = sums.to(shift.dtype)
    if split == x.shape[1]:
        return _like(d_merged, x), d_shift, x.new_empty(0)
    d_x, d_skip = (
        _resized(x, part.shape[1]).copy_(part)
        for part in (d_merged[:, :split], d_merged[:, split:])
    )
    return d_x, d_shift, d_skip


def fake_backward(
    grad, x, weight, bias, mean, rstd, groups, silu, split,
    shift=None, residual=None, skip=None, grad_merged=None,
):  # fmt: skip
    x = _dense(x)
    channels = weight.shape[0]
    return (
        _resized(x, split),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        x.new_empty(0) if shift is None else shift.new_empty(shift.shape),
        x.new_empty(0) if split == channels else _resized(x, channels - split),
    )


backward = Op(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
    " Tensor rstd, int groups, bool silu, int split, Tensor? shift=None, Tensor? residual=None,"
    " Tensor? skip=None, Tensor? grad_merged=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    """
    x [N, C, ...] floating
    residual [N, C, ...] of x
    skip [N, S, ...] of x
    grad [N, C + S, ...] floating
    grad_merged [N, C + S, ...] floating
    weight [C + S] floating
    bias [C + S] floating
    groups >= 1 and C + S >= 1 and (C + S) % groups == 0 : channels ({C + S}) must be a multiple \
of groups ({groups})
    mean [N, groups] wide of x
    rstd [N, groups] wide of x
    grad_merged is None or residual is skip is None : where there is grad_merged, x is what was \
merged, without residual and skip
    0 <= split <= C and (split == C or grad_merged is not None) : split must be the channels of x \
before it was merged, not {split} of {C}
    shift [N, split] floating
    """,
    reference_backward,
    fake_backward,
)


@backward.backend("cpu", "cpu")
def _():
    kernel = _native.cpu_library().ds_group_norm_silu_backward

    def launch(grad, x, weight, bias, mean, rstd, groups, silu, split, *parts):
        narrow = _check_library_takes(x)
        x = _merged_again(x, *parts)
        grad = _like(grad, x)
        images, channels, pixels = _sizes(x)
        w, b = weight.float().contiguous(), bias.float().contiguous()
        d_x, d_weight, d_bias = torch.empty_like(x), torch.empty_like(w), torch.empty_like(b)
        rows = x.new_empty((2, images, channels), dtype=torch.float64)
        mean, rstd = mean.contiguous(), rstd.contiguous()
        error = kernel(
            grad.data_ptr(), x.data_ptr(), w.data_ptr(), b.data_ptr(),
            mean.data_ptr(), rstd.data_ptr(),
            d_x.data_ptr(), d_weight.data_ptr(), d_bias.data_ptr(), rows.data_ptr(),
            images, channels, pixels, groups, silu, not x.is_contiguous(), narrow,
        )  # fmt: skip
        _native.check("group_norm_silu", error)
        d_x, d_shift, d_skip = _split(d_x, x, split, *parts)
        return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_shift, d_skip

    return launch


@backward.backend("triton", "cuda")
def _():
    kernels = triton_kernels("group_norm_silu")

    def launch(
        grad, x, weight, bias, mean, rstd, groups, silu, split,
        shift=None, residual=None, skip=None, grad_merged=None,
    ):  # fmt: skip
        x = _dense(x)
        _check_kernels_take(x)
        parts = _shift_rows(shift), _maybe_rows(residual), _maybe_rows(skip)
        if grad_merged is not None:
            grad_merged = _rows(grad_merged.to(x.dtype))
        mean, rstd = mean.contiguous(), rstd.contiguous()
        with torch.cuda.device_of(x):
            d_x, d_weight, d_bias, d_shift, d_skip = kernels.group_norm_silu_backward(
                _rows(grad.to(x.dtype)), _rows(x), weight, bias, mean, rstd, groups, silu, split,
                *parts, grad_merged,
            )  # fmt: skip
        return (
            _from_rows(d_x, _resized(x, split)),
            d_weight,
            d_bias,
            x.new_empty(0) if d_shift is None else d_shift,
            x.new_empty(0) if d_skip is None else _from_rows(d_skip, _resized(x, d_skip.shape[2])),
        )

    return launch


@backward.backend("aten", "cpu", "cuda")
def _():
    def launch(grad, x, weight, bias, mean, rstd, groups, silu, split, *parts):
        dense = _merged_again(x, *parts)
        x, grad = _pixels(dense), _pixels(_like(grad, dense))
        w, b, mean, rstd = _parameters(dense, weight, bias, mean, rstd)
        if silu:
            scale = w.view(groups, -1) * rstd[..., None]  # [N, groups, C / groups]
            shift = b.view(groups, -1) - mean[..., None] * scale
            columns = (*x.shape[:2], *[1] * (x.dim() - 2))
            y = torch.addcmul(shift.view(columns), x, scale.view(columns))
            grad = torch.ops.aten.silu_backward(grad, y)
        d_x, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, w, *_sizes(x), groups, [True] * 3
        )
        d_x, d_shift, d_skip = _split(d_x, dense, split, *parts)
        return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_shift, d_skip

    return launch


def _save(ctx, inputs, output):
    x, weight, bias, ctx.groups, _, ctx.silu, shift, residual, skip, ctx.keep = inputs
    _, mean, rstd, merged = output
    ctx.split = x.shape[1]
    ctx.given = [part is not None for part in (shift, residual, skip)]
    if ctx.keep:  # backward needs no part of it then, and of shift the dtype only
        x, residual, skip = merged, None, None
    ctx.save_for_backward(x, weight, bias, mean, rstd, shift, residual, skip)
    ctx.set_materialize_grads(False)  # which would fill zeros for outputs that are not used


@once_differentiable
def _gradient(ctx, grad, _mean, _rstd, grad_merged):
    x, weight, bias, mean, rstd, *parts = ctx.saved_tensors
    if grad is None:  # of y, which nobody used
        if grad_merged is None or not ctx.keep:
            return (None,) * len(ctx.needs_input_grad)
        grad = torch.zeros_like(x)
    if ctx.keep and grad_merged is None:
        grad_merged = torch.zeros_like(x)
    parts.append(grad_merged if ctx.keep else None)
    d_x, d_weight, d_bias, d_shift, d_skip = backward(
        grad, x, weight, bias, mean, rstd, ctx.groups, ctx.silu, ctx.split, *parts
    )
    if ctx.split == weight.shape[0]:
        d_skip = d_x[:, :0]  # of a skip without channels
    gradients = zip((d_shift, d_x, d_skip), ctx.given, strict=True)
    d_parts = [gradient if given else None for gradient, given in gradients]
    return d_x, d_weight, d_bias, None, None, None, *d_parts, None


forward.register_autograd(_gradient, _save)


def reference_float8(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *parts
) -> tuple[Tensor, Tensor]:
    """Return y of group_norm_silu in float8, and what was merged, empty unless it is to be kept."""
    x, kept = _merged(x, *parts)
    y, *_ = reference(x.to(_wide(x.dtype)), weight, bias, groups, eps, True)
    return to_float8(y), kept


def fake_float8(x, weight, bias, groups, eps, *parts):
    y, _, _, kept = fake(x, weight, bias, groups, eps, True, *parts)
    return torch.empty_like(y, dtype=FLOAT8), kept


forward_float8 = Op(
    "group_norm_silu_float8(Tensor x, Tensor weight, Tensor bias, int groups, float eps,"
    " Tensor? shift, Tensor? residual, Tensor? skip, bool keep) -> (Tensor, Tensor)",
    _TAKES,
    reference_float8,
    fake_float8,
)


@forward_float8.backend("triton", "cuda")
def _():
    kernels = triton_kernels("group_norm_silu")

    def launch(x, weight, bias, groups, eps, *parts):
        check_converts(x.device)
        y, _, _, kept = _launch_triton(
            kernels, x, weight, bias, groups, eps, True, *parts, dtype=FLOAT8
        )
        return y, kept

    return launch
