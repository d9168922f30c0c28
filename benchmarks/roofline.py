"""Every layer of the engine's plan beside its floor: bytes as in a copy, FLOPs as in a product.

The CIFAR-10 network with random weights; layers of one kind and one size are timed once. "plain"
does the same by PyTorch's functions, a 3x3 convolution directly; where the engine does no other on
a GPU, there is none. Small layers lie in the caches of
a CPU and can be faster than the floor, which is that of memory.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Side, Size, batch
from benchmarks.network import random_cifar10
from ds import ops
from ds.engine import Plan, Target
from ds.engine.calls import Call, Run, Shape
from ds.engine.convolutions import Conv, UpsampleConv, Winograd
from ds.engine.rewrites import Step
from ds.engine.told import Told
from ds.nets import UNet


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case for each kind and size of layer."""
    net = random_cifar10(device, size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    target = Target(device, dtype, batch(device, size, gpu=264, cpu=8))
    plan = Plan.of(net, target)
    counts = Counter(_name(plan, step) for step in plan.steps)
    steps = {_name(plan, step): step for step in plan.steps}
    for name, step in list(steps.items())[:: 4 if size == "quick" else 1]:
        yield _case(net, plan, target, step, f"{name}, {counts[name]} of {len(plan.steps)}")


def _name(plan: Plan, step: Step) -> str:
    sizes = [" + ".join(_size(plan.shapes[v]) for v in values) for values in step[1:]]
    return f"{step.call.kind} {sizes[0]} -> {sizes[1]}"


def _size(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _case(net: UNet, plan: Plan, target: Target, step: Step, name: str) -> Case:
    shapes = [plan.shapes[value] for value in step.inputs]
    inputs, wide = given(net, target, shapes)
    exact = plain(step.call, Target(target.device, torch.float64, target.images), shapes)
    runs = {"plain": plain(step.call, target, shapes), "engine": step.call.prepare(target, *shapes)}
    if target.device.type == "cuda" and isinstance(step.call, Conv | UpsampleConv):
        del runs["plain"]  # it is the same call
    return Case(
        name,
        {side: Side(functools.partial(run, call, inputs)) for side, call in runs.items()},
        lambda: run(exact, wide, None),
        bytes=plan.bytes(step, target),
        flops=target.images * plan.flops(step),
        dtype=target.dtype,
        images=target.images,
        factor=6.0,  # three for a step, and Winograd's transforms twice what a direct sum is off
    )


def given(net: UNet, target: Target, shapes: list[Shape]) -> tuple[tuple[Tensor, ...], ...]:
    """Draw what a call is given: the row of a time and its inputs; and the same in float64."""
    told = Told(net, torch.float64, folded=True)
    (row,) = told.finish(told.begin(torch.tensor([500], device=target.device)), {})
    inputs = [
        torch.randn(target.images, *shape, device=target.device)
        .to(target.dtype)
        .contiguous(memory_format=torch.channels_last)
        for shape in shapes
    ]
    return (row.to(target.wide), *inputs), (row, *(x.double() for x in inputs))


def plain(call: Call, target: Target, shapes: list[Shape]) -> Run:
    """Return the function of a call without a kernel of ours."""
    if isinstance(call, Winograd):
        c, h, w = shapes[0]
        scale = 1 + call.doubled
        convolve = Conv(call.weight, call.bias).prepare(target, (c, scale * h, scale * w))
        return lambda row, x, *rest: convolve(
            row, F.interpolate(x, scale_factor=2.0) if call.doubled else x, *rest
        )
    prepared = call.prepare(target, *shapes)

    def reference(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        with ops.use_backend("reference"):
            return prepared(*inputs)

    return reference


@torch.no_grad()
def run(call: Run, inputs: tuple[Tensor, ...], _: Any) -> Tensor | tuple[Tensor, ...]:
    """Do what is timed."""
    return call(*inputs)
