"""A step of Adam or AdamW on many tensors, with their moving average and a copy in bfloat16."""

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Op, Unsupported, same_order


@torch.no_grad()
def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    averages: Sequence[Tensor] = (),
    ema_decay: float = 0.0,
    copies: Sequence[Tensor] = (),
    max_norm: float = math.inf,
) -> Tensor:
    """Add 1 to step, update params, exp_avgs and exp_avg_sqs; return the norm of all grads.

    The update is that of torch.optim.Adam, or of AdamW if `decoupled`. Grads are first scaled down
    to max_norm, as by torch.nn.utils.clip_grad_norm_, but not in place. Then averages move by
    1 - ema_decay towards params, and copies receive params, rounded to their dtype.

    step and lr are float32 without dimensions, on the device of params: a captured CUDA graph reads
    them at each replay. averages and copies may be shorter than params, and then belong to the
    first of them; the other lists have the length of params. All shapes are those of params. The
    norm has no dimensions and is that before clipping.

    Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1; Loshchilov & Hutter 2019, arXiv:1711.05101,
    Algorithm 2.

    Raises:
        ValueError: lists do not fit each other, or a number is out of range.
    """
    lists = _Lists(*map(list, (params, grads, exp_avgs, exp_avg_sqs, averages, copies)))
    rates = _Rates(*betas, eps, weight_decay, decoupled, ema_decay, max_norm)
    arguments = step, lr, *lists, *rates
    if torch.compiler.is_compiling():
        step.add_(1)
        return torch.ops.ds.adam_step(*arguments)
    _op.check(*arguments)  # before the step is counted
    step.add_(1)
    return _op.call_checked(*arguments)


class _Lists(NamedTuple):
    """The lists of tensors of a step, in the order of the op's schema."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    averages: list[Tensor]
    copies: list[Tensor]


class _Rates(NamedTuple):
    """The numbers of a step, in the order of the op's schema."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    ema_decay: float
    max_norm: float


def _structured(args: tuple) -> tuple[_Lists, _Rates]:
    """Return the op's arguments after step and lr."""
    count = len(_Lists._fields)
    return _Lists(*args[:count]), _Rates(*args[count:])


def reference(step: Tensor, lr: Tensor, *args) -> Tensor:
    """Step by PyTorch's functions on lists, in the order of torch.optim.Adam.

    With g the gradient, scaled down to max_norm, plus weight_decay * p unless decoupled:
    m = m + (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g^2 and, at step t,
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
    """
    lists, rates = _structured(args)
    params, _, exp_avgs, exp_avg_sqs, *_ = lists
    beta1, beta2, eps, weight_decay, decoupled, *_ = rates
    if not params:
        return torch.zeros_like(step)
    grads, norm = _clipped(lists, rates.max_norm)
    if weight_decay and decoupled:
        torch._foreach_mul_(params, 1 - lr.double() * weight_decay)
    elif weight_decay:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    moves = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(moves, (1 - beta2 ** step.double()).sqrt())
    torch._foreach_add_(moves, eps)
    moves = torch._foreach_div(exp_avgs, moves)
    torch._foreach_mul_(moves, lr / (1 - beta1 ** step.double()))
    torch._foreach_sub_(params, moves)
    _follow(lists, rates.ema_decay)
    return norm.to(step.dtype)


def _clipped(lists: _Lists, max_norm: float) -> tuple[list[Tensor], Tensor]:
    """Return the grads, scaled down to max_norm and in the dtype of the params, and their norm."""
    grads = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in lists.grads]
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    if max_norm < math.inf:
        grads = torch._foreach_mul(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return [grad.to(param.dtype) for grad, param in zip(grads, lists.params, strict=True)], norm


def _follow(lists: _Lists, ema_decay: float) -> None:
    """Move the averages, and fill the copies."""
    if lists.averages:
        pairs = zip(lists.params, lists.averages, strict=False)
        wide = [param.to(average.dtype) for param, average in pairs]
        torch._foreach_lerp_(lists.averages, wide, 1 - ema_decay)
    if lists.copies:
        torch._foreach_copy_(lists.copies, lists.params[: len(lists.copies)])


def fake(step, *args):
    return torch.empty_like(step)


_op = Op(
    "adam_step(Tensor step, Tensor lr, Tensor(a!)[] params, Tensor[] grads,"
    " Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] averages,"
    " Tensor(e!)[] copies, float beta1, float beta2, float eps, float weight_decay,"
    " bool decoupled, float ema_decay, float max_norm) -> Tensor",
    """
    step [] float32
    lr [] float32
    params floating
    grads like params floating
    exp_avgs like params of params
    exp_avg_sqs like params of params
    averages like first params floating
    copies like first params floating
    0 <= beta1 < 1 : betas[0] must lie in [0, 1), not {beta1}
    0 <= beta2 < 1 : betas[1] must lie in [0, 1), not {beta2}
    0 <= ema_decay < 1 : ema_decay must lie in [0, 1), not {ema_decay}
    max_norm > 0 : max_norm must be above 0, not {max_norm}
    """,
    reference,
    fake,
)


@_op.backend("cpu", "cpu")
def _():
    lib = _native.cpu_library()

    def launch(step, lr, *args):
        lists, rates = _structured(args)
        taken = _taken(lists)
        partial = step.new_empty(lib.ds_adam_chunks(*taken.sizes), dtype=torch.float64)
        norm = torch.empty_like(step)
        pointers = _addresses((step, lr, partial, norm))
        narrow = taken.grad_type == torch.bfloat16
        rates = (ctypes.c_double * len(rates))(*rates)
        error = lib.ds_adam(taken.addresses, *taken.sizes, *pointers, rates, narrow)
        _native.check("adam_step", error)
        return norm

    return launch


@_op.backend("cuda", "cuda")
def _():
    lib = _native.cuda_kernels(capability=80)

    def launch(step, lr, *args):
        lists, rates = _structured(args)
        taken = _taken(lists)
        partial = step.new_empty(lib.ds_cuda_adam_chunks(*taken.sizes))
        norm, scale = torch.empty_like(step), torch.empty_like(step)
        pointers = _addresses((step, lr, partial, norm, scale))
        grad_type = _native.TYPES[taken.grad_type]
        arguments = taken.addresses, *taken.sizes, *pointers, *rates, grad_type
        _native.cuda_launch(lib.ds_cuda_adam, step, *arguments)
        return norm

    return launch


class _Taken(NamedTuple):
    """What the kernels in C++ and CUDA are given of the lists."""

    addresses: ctypes.Array  # of an array for each list; a shorter one ends in null addresses
    sizes: tuple[ctypes.Array, int]  # of the tensors, and how many
    grad_type: torch.dtype
    alive: tuple  # what the addresses belong to


def _taken(lists: _Lists) -> _Taken:
    """Return what the kernels are given, or raise Unsupported."""
    grad_type = _check_dtypes(lists)
    strides = [param.stride() for param in lists.params]
    _check_layout(lists, strides)
    lists = lists._replace(grads=[*map(_like, lists.grads, lists.params, strides)])
    count = len(strides)
    sizes = (ctypes.c_int64 * count)(*map(Tensor.numel, lists.params))
    arrays = [(ctypes.c_void_p * count)(*_addresses(tensors)) for tensors in lists]
    addresses = (ctypes.c_void_p * len(arrays))(*map(ctypes.addressof, arrays))
    return _Taken(addresses, (sizes, count), grad_type, (lists, arrays))


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _like(grad: Tensor, param: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return grad with the strides of its param."""
    if grad.stride() == strides or same_order(grad, param):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _check_dtypes(lists: _Lists) -> torch.dtype:
    """Return that of the grads, or raise Unsupported."""
    params, grads, exp_avgs, exp_avg_sqs, averages, copies = lists
    grad_types = {grad.dtype for grad in grads} or {torch.float32}
    if len(grad_types) > 1 or not grad_types <= {torch.float32, torch.bfloat16}:
        raise Unsupported("it takes grads all in float32, or all in bfloat16")
    wide = {tensor.dtype for tensor in (*params, *exp_avgs, *exp_avg_sqs, *averages)}
    if others := wide - {torch.float32}:
        raise Unsupported(f"it takes params, moments and averages in float32, not {others.pop()}")
    if others := {copy.dtype for copy in copies} - {torch.bfloat16}:
        raise Unsupported(f"it makes copies in bfloat16, not {others.pop()}")
    return grad_types.pop()


def _check_layout(lists: _Lists, strides: list[tuple[int, ...]]) -> None:
    """Raise Unsupported unless params have no gaps in memory and all tensors their strides."""
    params, _, *others = lists
    for tensors in others:
        if [tensor.stride() for tensor in tensors] == strides[: len(tensors)]:
            continue
        if not all(map(same_order, tensors, params)):
            raise Unsupported("it takes tensors with the strides of params")
    for param in params:
        if not (
            param.is_contiguous()
            or param.is_contiguous(memory_format=torch.channels_last)
            or torch.ops.aten.is_non_overlapping_and_dense(param)
        ):
            raise Unsupported("it takes params without gaps in memory")
