"""Derivatives of functions, and what PyTorch's transforms make of tensors."""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad


def untraced(function: Callable) -> Callable:
    """Return the function, which PyTorch calls from C++, hidden from torch.compile's tracer."""
    disabled = []

    def call(*args):
        if "torch._dynamo" not in sys.modules:  # slow to import, and nothing is compiled yet
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return call


def active() -> bool:
    """Return whether forward mode or a transform of torch.func is on."""
    return forward_ad._current_level >= 0 or in_functorch()


def tangents_are_lost() -> bool:
    """Return whether inference mode is on and PyTorch, as in 2.11, drops tangents there."""
    return torch.is_inference_mode_enabled() and _inference_mode_drops_tangents()


@cache
def _inference_mode_drops_tangents() -> bool:
    one = torch.ones((), dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        return not torch.func.jvp(torch.sin, (one,), (one,))[1]


def in_functorch() -> bool:
    """Return whether a transform of torch.func is on, at or below the level being computed."""
    return peek_interpreter_stack() is not None


def tensors(args: tuple) -> list[Tensor]:
    """Return the tensors among the arguments of an op and in its lists."""
    lists = (arg if isinstance(arg, (list, tuple)) else [arg] for arg in args)
    return [x for values in lists for x in values if isinstance(x, Tensor)]


def any_wrapped(args: tuple) -> bool:
    """Return whether a transform of torch.func hides a tensor among the arguments."""
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors(args)))


def is_mapped(x: Tensor) -> bool:
    """Return whether vmap maps over a dimension of x."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def needs_derivative(x: Tensor) -> bool:
    """Return whether x carries a tangent or is recorded for a gradient."""
    return any_dual([x]) or (torch.is_grad_enabled() and x.requires_grad)


def any_dual(tensors: list[Tensor]) -> bool:
    """Return whether a tensor carries a tangent of the level being computed."""
    level = peek_interpreter_stack()
    # A compiled function has no level of dual numbers in Python while it is traced.
    if forward_ad._current_level < 0 and (level is None or level.key() != TransformType.Jvp):
        return False
    return any(tangent(x) is not None for x in tensors)


def tangent(x: Tensor) -> Tensor | None:
    """Return the tangent of x at the level being computed, or None."""
    if not x.is_floating_point():
        return None
    return torch._VF._unpack_dual(x, level=0)[1]


def unpack(arg: Any) -> tuple[Any, Tensor | None]:
    """Return an argument without its tangent, and that or None."""
    if isinstance(arg, Tensor) and (t := tangent(arg)) is not None:
        return torch._VF._unpack_dual(arg, level=0)[0], t
    return arg, None


def pack(x: Tensor, tangent: Tensor | None) -> Tensor:
    """Return x with a tangent, which is rounded to its dtype."""
    return x if tangent is None else torch._VF._make_dual(x, tangent.to(x.dtype), level=0)


def vjp(function: Callable, args: Sequence, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradient of each argument, given those of the function's results.

    It is None for what requires none. It can be differentiated in turn if gradients are enabled.
    """
    again = torch.is_grad_enabled()
    wanted = [isinstance(x, Tensor) and x.requires_grad for x in args]
    with torch.enable_grad():
        # A view has no past, so what one argument was computed from is not counted as another.
        args = [x.view_as(x) if want else x for x, want in zip(args, wanted, strict=True)]
        results = function(*args)
        results = results if isinstance(results, tuple) else (results,)
        pairs = zip(results, grads, strict=True)
        used = [(y, grad) for y, grad in pairs if grad is not None and y.requires_grad]
        if not used:
            return [None] * len(args)
        inputs = [x for x, want in zip(args, wanted, strict=True) if want]
        results, grads = zip(*used, strict=True)
        found = iter(
            torch.autograd.grad(results, inputs, grads, create_graph=again, allow_unused=True)
        )
    return [next(found) if want else None for want in wanted]


def differentiable_twice(name: str, compute: Callable, reference: Callable):
    """Return the autograd.Function of compute, whose own gradient is that of the reference."""

    def forward(ctx, *args):
        with torch.enable_grad():
            leaves = [
                x.detach().requires_grad_(want) if isinstance(x, Tensor) else x
                for x, want in zip(args, ctx.needs_input_grad, strict=True)
            ]
            result = compute(*leaves)
        ctx.save_for_backward(*args)
        ctx.recorded = leaves, result
        return result.detach()

    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return tuple(vjp(reference, ctx.saved_tensors, [grad]))
        leaves, result = ctx.recorded
        wanted = [x for x, want in zip(leaves, ctx.needs_input_grad, strict=True) if want]
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        found = iter(torch.autograd.grad(result, wanted, grad, retain_graph=keep))
        return tuple(next(found) if want else None for want in ctx.needs_input_grad)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def channels_last(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] in channels_last memory, also under vmap, which knows no formats."""
    if in_functorch():
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def like(y: Tensor, x: Tensor) -> Tensor:
    """Return y in the dtype and strides of x; a transform leaves the strides to PyTorch."""
    if y.dtype == x.dtype and y.stride() == x.stride():
        return y
    # copy_ gives a tangent the wrong dtype, and vmap forbids it if only y is mapped.
    return y.to(x.dtype) if active() else torch.empty_like(x).copy_(y)
