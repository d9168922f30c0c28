"""A step of Adam or AdamW on many tensors, with their moving average and a copy in bfloat16."""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops._op import Op, Unsupported, same_order


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

    The update is torch.optim.Adam's, or that of AdamW where decoupled. Grads are first scaled down
    to max_norm, as by torch.nn.utils.clip_grad_norm_, but not in place. Then averages move by
    1 - ema_decay towards params, and copies receive params, rounded to their dtype.

    step and lr are float32 of no dimensions on the device of params: what a CUDA graph captured
    reads them anew. A list of another length or with other shapes than params is an error, but
    averages and copies may be shorter: they are those of the first params. The norm is of no
    dimensions, not clipped.

    Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1; Loshchilov & Hutter 2019, arXiv:1711.05101,
    Algorithm 2.

    Raises:
        ValueError: lists that do not fit each other, or a number out of its range.
    """
    lists = params, grads, exp_avgs, exp_avg_sqs, averages, copies
    arguments = (
        step, lr, *map(list, lists),
        *betas, eps, weight_decay, decoupled, ema_decay, max_norm,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        _op.check(*arguments)  # before the step is counted
    step.add_(1)
    return torch.ops.ds.adam_step(*arguments)


def reference(
    step, lr, params, grads, exp_avgs, exp_avg_sqs, averages, copies,
    beta1, beta2, eps, weight_decay, decoupled, ema_decay, max_norm,
):  # fmt: skip
    """Step by PyTorch's functions on lists, in the order of torch.optim.Adam.

    With g the gradient, scaled down to max_norm, plus weight_decay * p if not decoupled:
    m = m + (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g^2 and, at step t,
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
    """
    if not params:
        return torch.zeros_like(step)
    grads, norm = _clipped(params, grads, max_norm)
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
    _follow(params, averages, copies, ema_decay)
    return norm.to(step.dtype)


def _clipped(params, grads, max_norm) -> tuple[list[Tensor], Tensor]:
    """Return the grads, scaled down to max_norm and as wide as the params, and their norm."""
    grads = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    if max_norm < math.inf:
        grads = torch._foreach_mul(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)], norm


def _follow(params, averages, copies, ema_decay) -> None:
    """Move the averages, and fill the copies."""
    if averages:
        wide = [param.to(average.dtype) for param, average in zip(params, averages, strict=False)]
        torch._foreach_lerp_(averages, wide, 1 - ema_decay)
    if copies:
        torch._foreach_copy_(copies, params[: len(copies)])


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


# PyTorch's fused step is one pass over memory where the reference makes ten, and another for the
# average: a third of the time for the 36 M weights of CIFAR-10 on one core (`python -m benchmarks
# ops`; docs/performance.md).
@_op.backend("fused", "cpu")
def _():
    def launch(
        step, lr, params, grads, exp_avgs, exp_avg_sqs, averages, copies,
        beta1, beta2, eps, weight_decay, decoupled, ema_decay, max_norm,
    ):  # fmt: skip
        if not params:
            return torch.zeros_like(step)
        _check_layout(params, exp_avgs, exp_avg_sqs)
        for lists in zip(params, exp_avgs, exp_avg_sqs, strict=True):
            if len({tensor.dtype for tensor in lists}) > 1:
                raise Unsupported("it takes moments in the dtype of their params")
        grads, norm = _clipped(params, grads, max_norm)
        grads = [_like(grad, param) for grad, param in zip(grads, params, strict=True)]
        fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
        fused(
            params, grads, exp_avgs, exp_avg_sqs, [], [step] * len(params), amsgrad=False,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
            maximize=False,
        )  # fmt: skip
        _follow(params, averages, copies, ema_decay)
        return norm.to(step.dtype)

    return launch


@_op.backend("cuda", "cuda")
def _():
    lib = _native.cuda_kernels(capability=80)

    def launch(
        step, lr, params, grads, exp_avgs, exp_avg_sqs, averages, copies,
        beta1, beta2, eps, weight_decay, decoupled, ema_decay, max_norm,
    ):  # fmt: skip
        grads = [_like(grad, param) for grad, param in zip(grads, params, strict=True)]
        grad_type = _check_kernels_take(params, grads, exp_avgs, exp_avg_sqs, averages, copies)
        count = len(params)
        sizes = (ctypes.c_int64 * count)(*[param.numel() for param in params])
        lists = [
            (ctypes.c_void_p * count)(*[tensor.data_ptr() for tensor in tensors])  # null after them
            for tensors in (params, grads, exp_avgs, exp_avg_sqs, averages, copies)
        ]
        partial = step.new_empty(lib.ds_cuda_adam_chunks(sizes, count))
        norm, scale = torch.empty_like(step), torch.empty_like(step)
        _native.cuda_launch(
            lib.ds_cuda_adam, step,
            (ctypes.c_void_p * 6)(*map(ctypes.addressof, lists)), sizes, count,
            step.data_ptr(), lr.data_ptr(), partial.data_ptr(), norm.data_ptr(), scale.data_ptr(),
            beta1, beta2, eps, weight_decay, decoupled, ema_decay, max_norm, grad_type,
        )  # fmt: skip
        return norm

    return launch


def _like(grad: Tensor, param: Tensor) -> Tensor:
    if same_order(grad, param):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _check_kernels_take(params, grads, exp_avgs, exp_avg_sqs, averages, copies) -> int:
    """Return the type of the grads, or raise Unsupported."""
    grad_types = {grad.dtype for grad in grads}
    if len(grad_types) > 1 or not grad_types <= {torch.float32, torch.bfloat16}:
        raise Unsupported("it takes grads all in float32, or all in bfloat16")
    for tensor in (*params, *exp_avgs, *exp_avg_sqs, *averages):
        if tensor.dtype != torch.float32:
            raise Unsupported(
                f"it takes params and what belongs to them in float32, not {tensor.dtype}"
            )
    for copy in copies:
        if copy.dtype != torch.bfloat16:
            raise Unsupported(f"it makes copies in bfloat16, not {copy.dtype}")
    _check_layout(params, exp_avgs, exp_avg_sqs, averages, copies)
    return _native.TYPES[grad_types.pop()] if grads else 0


def _check_layout(params, *others) -> None:
    """Raise Unsupported unless every tensor lies in memory as its param, and that without gaps."""
    for tensors in others:
        for tensor, param in zip(tensors, params, strict=False):
            if not same_order(tensor, param):
                raise Unsupported("it takes tensors with the strides of params")
    for param in params:
        if not (param.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(param)):
            raise Unsupported("it takes params without gaps in memory")
