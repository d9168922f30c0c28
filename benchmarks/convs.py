"""Each convolution of the engine's plan on a GPU: cuDNN with the passes it needs, and our kernels.

The CIFAR-10 network with random weights in bfloat16, each convolution by itself and with the norm
that follows. cuDNN's is followed by passes for what ours do as they go: bias, residual, the padding
of stride 2, the phases of a doubled image, the norm. A row is named as a convolution is in
`ds.engine.rewrites.FASTER`, and our sides by their backends; benchmarks.gpu_report fills that table
from these rows.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness import Case, Side, Size, late
from benchmarks.network import random_cifar10
from benchmarks.roofline import given, run
from ds import ops
from ds.engine import Plan, Rewrites, Target
from ds.engine.calls import Run, Shape
from ds.engine.convolutions import ImplicitGemm
from ds.engine.rewrites import Step, choice_name
from ds.nets import UNet


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield a case for each distinct convolution and batch size; none on a CPU."""
    if device.type == "cpu":
        return
    net = random_cifar10(device, size)
    ready = [row for row in ops.table() if row.device == device.type and row.backend != "reference"]
    backends = [row.backend for row in ready if row.op == "conv" and row.status != "missing"]
    for images in (2,) if size == "tiny" else (264, 32):
        yield from compare(net, Target(device, torch.bfloat16, images), backends)


def compare(net: UNet, target: Target, backends: Sequence[str]) -> Iterator[Case]:
    """Yield a case for each distinct convolution of a network, alone and with its norm."""
    gpu = replace(target, device=torch.device("cuda"))  # whose plan it is, wherever it is run
    for with_norms in (False, True):
        own = replace(Rewrites.good_for(gpu), implicit_gemm=True, norm_into_conv=with_norms)
        plan = Plan.of(net, gpu, own)
        steps = [step for step in plan.steps if isinstance(step.call, ImplicitGemm)]
        named = {choice_name(step, target.dtype, plan.shapes): step for step in steps}
        for name, step in named.items():
            if with_norms == (step.call.norm is not None):
                yield _case(net, plan, target, step, f"{name}, {target.images} images", backends)


def _case(
    net: UNet, plan: Plan, target: Target, step: Step, name: str, backends: Sequence[str]
) -> Case:
    shapes = [plan.shapes[value] for value in step.inputs]
    inputs, wide = given(net, target, shapes)
    exact = by_cudnn(step.call, replace(target, dtype=torch.float64), *shapes)
    calls = {"cuDNN": late(functools.partial(by_cudnn, step.call, target, *shapes))}
    for backend in backends:
        own = replace(step.call, backend=backend)
        calls[backend] = late(functools.partial(own.prepare, target, *shapes))
    missing = {side: why for side, call in calls.items() if (why := _refusal(call, inputs))}
    return Case(
        name,
        {
            side: Side(functools.partial(run, call, inputs))
            for side, call in calls.items()
            if side not in missing
        },
        functools.partial(_reference, exact, wide),
        bytes=plan.bytes(step, target),
        flops=target.images * plan.flops(step),
        dtype=target.dtype,
        images=target.images,
        missing=missing,
    )


def _refusal(call: Run, inputs: tuple[Tensor, ...]) -> str:
    """Return why a backend does not take a convolution; what else it raises is the gate's."""
    try:
        run(call, inputs, None)
    except Exception as error:
        return str(error).partition("was asked for, but ")[2]
    return ""


def by_cudnn(call: ImplicitGemm, target: Target, *shapes: Shape) -> Run:
    """Return the function of our call by PyTorch's convolution and, if it has one, our norm."""
    if call.norm is None:
        return call.conv.prepare(target, *shapes)
    own = 1 if call.norm.residual else len(shapes)  # what the convolution reads itself
    conv = call.conv.prepare(target, *shapes[:own])
    norm = call.norm.prepare(target, *call.conv.shapes(*shapes[:own]), *shapes[own:])

    def apart(row: Tensor, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        y = conv(row, *inputs[:own])
        made = norm(row, y, *inputs[own:])
        return (made, y) if call.keep and not call.norm.keep else made

    return apart


def _reference(exact: Run, wide: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    with ops.use_backend("reference"):
        return run(exact, wide, None)
