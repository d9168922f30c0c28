"""The ops behind group_norm_silu: schema, reference, gradient, and the order of the backends."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds.ops.dispatch.op import Op
from ds.ops.dispatch.takes import wide
from ds.ops.dispatch.transforms import like, vjp
from ds.ops.float8 import FLOAT8, to_float8
from ds.ops.group_norm_silu import aten, cpu, cuda, triton
from ds.ops.group_norm_silu.addends import Addends
from ds.ops.group_norm_silu.layout import columns, dense, resized, sums

_DIVIDES = """
    groups >= 1 and C + S >= 1 and (C + S) % groups == 0 : channels ({C + S}) must be a multiple \
of groups ({groups})
"""
_AFFINE = """
    weight [C + S] or [N, C + S] floating
    bias [C + S] or [N, C + S] floating
    weight.shape == bias.shape : weight and bias must have one shape, not {list(weight.shape)} \
and {list(bias.shape)}
"""
_TAKES = f"""
    x [N, C, ...] floating
    shift [N, C] floating
    residual [N, C, ...] of x
    skip [N, S, ...] of x
    {_DIVIDES}
    {_AFFINE}
"""


def reference(x, weight, bias, groups, eps, silu, keep=False, *addends):
    """Return y, the mean and 1 / sqrt(var + eps) of each group [N, groups], and the merged x.

    The addends are shift, residual and skip. The merged x is empty unless `keep`.
    """
    x = Addends(*addends).merge(x)
    grouped = x.to(wide(x.dtype)).unflatten(1, (groups, x.shape[1] // groups))
    inner = tuple(range(2, grouped.dim()))
    mean = grouped.mean(inner, keepdim=True)
    centred = grouped - mean
    rstd = (centred.square().mean(inner, keepdim=True) + eps).rsqrt()
    y = (centred * rstd).flatten(1, 2) * columns(weight, x) + columns(bias, x)
    y = like(F.silu(y) if silu else y, x)
    return y, mean.flatten(1), rstd.flatten(1), x if keep else x.new_empty(0)


def _fake(x, weight, bias, groups, eps, silu, keep=False, *addends):
    statistic = x.new_empty((x.shape[0], groups), dtype=wide(x.dtype))
    y = resized(dense(x), weight.shape[-1])
    merged = torch.empty_like(y) if keep else x.new_empty(0)
    return y, statistic, torch.empty_like(statistic), merged


forward = Op(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu,"
    " bool keep=False, Tensor? shift=None, Tensor? residual=None, Tensor? skip=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _TAKES,
    reference,
    _fake,
)
forward.backend("cpu", "cpu")(cpu.load_forward)
forward.backend("triton", "cuda")(triton.load_forward)
forward.backend("cluster", "cuda")(cuda.load_cluster)
forward.backend("cuda", "cuda")(cuda.load_two_passes)
forward.backend("aten", "cpu", "cuda")(lambda: aten.forward)


def reference_backward(
    grad, x, weight, bias, mean, rstd, groups, silu, split, grad_merged=None, *addends
):
    """Return the gradients of x, weight, bias, shift and skip.

    With grad_merged, which comes back for the merged x, x is the merged one, and of the addends
    only shift is given, for its dtype. Its first `split` channels are those of the x before.

    The input of SiLU is computed again. With xhat = (x - mean) * rstd, f SiLU or the identity,
    g = grad * f'(weight * xhat + bias), h = g * weight, and means over the group:
    d bias = sum g, d weight = sum g * xhat, over images too for parameters of all images,
    d x = rstd * (h - mean(h) - xhat * mean(h * xhat)) + grad_merged,
    and d shift is the sum of d x over pixels.
    """
    addends = Addends(*addends)
    x = addends.merged_before(x, grad_merged)
    shape = (*mean.shape, *[1] * (x.dim() - 1))
    grouped = x.to(wide(x.dtype)).unflatten(1, (groups, x.shape[1] // groups))
    inner = tuple(range(2, grouped.dim()))
    xhat = (grouped - mean.view(shape)) * rstd.view(shape)
    flat = xhat.flatten(1, 2)
    g = grad.to(wide(x.dtype))
    if silu:
        y = flat * columns(weight, x) + columns(bias, x)
        s = y.sigmoid()
        g = g * (s * (1 + y * (1 - s)))
    d_bias, d_weight = sums(g, bias), sums(g * flat, weight)
    h = (g * columns(weight, x)).unflatten(1, grouped.shape[1:3])
    along = (h * xhat).mean(inner, keepdim=True)
    d_norm = (h - h.mean(inner, keepdim=True) - xhat * along) * rstd.view(shape)
    d_x, d_shift, d_skip = addends.split_gradient(d_norm.flatten(1, 2), x, split, grad_merged)
    return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), d_shift, d_skip


def _fake_backward(
    grad, x, weight, bias, mean, rstd, groups, silu, split, grad_merged=None, *addends
):
    x, shift, others = dense(x), Addends(*addends).shift, weight.shape[-1] - split
    d_shift = x.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    d_skip = resized(x, others) if others else x.new_empty(0)
    parameters = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return resized(x, split), *parameters, d_shift, d_skip


backward = Op(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
    " Tensor rstd, int groups, bool silu, int split, Tensor? grad_merged=None,"
    " Tensor? shift=None, Tensor? residual=None, Tensor? skip=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"""
    x [N, C, ...] floating
    residual [N, C, ...] of x
    skip [N, S, ...] of x
    grad [N, C + S, ...] floating
    grad_merged [N, C + S, ...] floating
    {_AFFINE}
    {_DIVIDES}
    mean [N, groups] wide of x
    rstd [N, groups] wide of x
    grad_merged is None or residual is skip is None : with grad_merged, x is the merged tensor: \
residual and skip must be None
    0 <= split <= C and (split == C or grad_merged is not None) : split must be the channels of x \
before it was merged, not {{split}} of {{C}}
    shift [N, split] floating
    """,
    reference_backward,
    _fake_backward,
)
backward.backend("cpu", "cpu")(cpu.load_backward)
backward.backend("triton", "cuda")(triton.load_backward)
backward.backend("aten", "cpu", "cuda")(lambda: aten.backward)


def _save(ctx, inputs, output):
    x, weight, bias, ctx.groups, ctx.eps, ctx.silu, ctx.keep, *addends = inputs
    shift, residual, skip = addends
    _, mean, rstd, merged = output
    ctx.split = x.shape[1]
    ctx.given = [addend is not None for addend in addends]
    if ctx.keep:  # backward reads the merged x alone, and of shift the dtype
        x, residual, skip = merged, None, None
    ctx.save_for_backward(x, weight, bias, mean, rstd, shift, residual, skip)
    ctx.set_materialize_grads(False)  # no zeros for outputs that are not used


def _gradient(ctx, grad, d_mean, d_rstd, grad_merged):
    if torch.is_grad_enabled() or d_mean is not None or d_rstd is not None:
        return _gradient_of_reference(ctx, grad, d_mean, d_rstd, grad_merged)
    x, weight, bias, mean, rstd, *addends = ctx.saved_tensors
    if not ctx.keep:
        grad_merged = None
    if grad is None:  # y is not used
        if grad_merged is None:
            return (None,) * len(ctx.needs_input_grad)
        grad = torch.zeros_like(x)
    if ctx.keep and grad_merged is None:
        grad_merged = torch.zeros_like(x)
    settings = ctx.groups, ctx.silu, ctx.split, grad_merged
    d_x, d_weight, d_bias, d_shift, d_skip = backward(
        grad, x, weight, bias, mean, rstd, *settings, *addends
    )
    d_addends = _given(ctx, d_x, d_shift, d_skip)
    return d_x, d_weight, d_bias, None, None, None, None, *d_addends


def _gradient_of_reference(ctx, *grads: Tensor | None):
    """Return _gradient, also that of the statistics, by steps that can be differentiated again."""
    x, weight, bias, _, _, *addends = ctx.saved_tensors
    args = x, weight, bias, ctx.groups, ctx.eps, ctx.silu, ctx.keep
    if not ctx.keep:
        return tuple(vjp(reference, (*args, *addends), (*grads[:3], None)))
    d_merged, *others = vjp(reference, args, grads)
    if d_merged is None:
        return None, *others, None, None, None
    parts = Addends(*addends).split_gradient(d_merged, x, ctx.split, None)
    return parts[0], *others, *_given(ctx, *parts)


def _given(ctx, d_x: Tensor, d_shift: Tensor, d_skip: Tensor) -> list[Tensor | None]:
    """Return the gradients of the addends that forward was given."""
    if d_skip.dim() == 1:
        d_skip = d_x[:, :0]  # of a skip without channels
    gradients = zip((d_shift, d_x, d_skip), ctx.given, strict=True)
    return [gradient if given else None for gradient, given in gradients]


forward.register_autograd(_gradient, _save)


def _tangents(primals, tangents, results):
    """Return the tangents of the results, in the dtype of computation.

    With m the merged x, xhat = (m - mean) * rstd, a = weight * xhat + bias, f SiLU or the identity,
    and means over the group: d mean = mean(d m), d rstd = -rstd^2 * mean(d m * xhat),
    d xhat = rstd * (d m - d mean - xhat * mean(d m * xhat)) and
    d y = f'(a) * (weight * d xhat + d weight * xhat + d bias).
    """
    x, weight, bias, groups, _, silu, keep, *addends = primals
    d_x, d_weight, d_bias, *_, d_shift, d_residual, d_skip = tangents
    _, mean, rstd, merged = results
    merged = merged if keep else Addends(*addends).merge(x)
    d_merged = _merged_tangent(x, Addends(*addends), d_x, Addends(d_shift, d_residual, d_skip))
    shape = (*mean.shape, *[1] * (merged.dim() - 1))
    mean, rstd = mean.view(shape), rstd.view(shape)
    grouped = merged.to(wide(x.dtype)).unflatten(1, (groups, merged.shape[1] // groups))
    xhat = (grouped - mean) * rstd
    flat, w = xhat.flatten(1, 2), columns(weight, x)
    terms, d_mean, d_rstd = [], None, None
    if d_merged is not None:
        inner = tuple(range(2, xhat.dim()))
        d_grouped = d_merged.to(wide(x.dtype)).unflatten(1, xhat.shape[1:3])
        d_mean = d_grouped.mean(inner, keepdim=True)
        along = (d_grouped * xhat).mean(inner, keepdim=True)
        terms.append(((d_grouped - d_mean - xhat * along) * rstd).flatten(1, 2) * w)
        d_mean, d_rstd = d_mean.flatten(1), (-rstd.square() * along).flatten(1)
    if d_weight is not None:
        terms.append(flat * columns(d_weight, x))
    if d_bias is not None:
        terms.append(columns(d_bias, x).expand_as(flat))
    d_y = sum(terms[1:], terms[0])
    if silu:
        a = flat * w + columns(bias, x)
        s = a.sigmoid()
        d_y = d_y * (s * (1 + a * (1 - s)))
    return d_y, d_mean, d_rstd, d_merged if keep else None


def _merged_tangent(x: Tensor, addends: Addends, d_x: Tensor | None, tangents: Addends):
    """Return the tangent of the merged x, or None."""
    if d_x is None and all(t is None for t in tangents):
        return None
    zero = x.new_zeros(())
    if addends.skip is not None and tangents.skip is None:
        tangents = tangents._replace(skip=zero.expand_as(addends.skip))
    return tangents.merge(zero.expand_as(x) if d_x is None else d_x)


forward.register_tangents(_tangents)


def reference_float8(x, weight, bias, groups, eps, keep, *addends):
    """Return y of the norm with SiLU in float8, and the merged x, which is empty unless `keep`."""
    x = Addends(*addends).merge(x)
    y, *_ = reference(x.to(wide(x.dtype)), weight, bias, groups, eps, True)
    return to_float8(y), x if keep else x.new_empty(0)


def _fake_float8(x, weight, bias, groups, eps, keep, *addends):
    y, _, _, merged = _fake(x, weight, bias, groups, eps, True, keep, *addends)
    return torch.empty_like(y, dtype=FLOAT8), merged


forward_float8 = Op(
    "group_norm_silu_float8(Tensor x, Tensor weight, Tensor bias, int groups, float eps,"
    " bool keep, Tensor? shift, Tensor? residual, Tensor? skip) -> (Tensor, Tensor)",
    _TAKES,
    reference_float8,
    _fake_float8,
    no_derivative="the result is float8",
)
forward_float8.backend("triton", "cuda")(triton.load_forward_float8)
