"""How a plan differs from its network: one small function for each difference, steps to steps.

In exact arithmetic a rewrite does not change the result, and any of them can be left out. The
exceptions are precisions, which follow the target: `in_float8` and `ends_in_float32`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ds.engine.calls import (
    Add,
    AddBias,
    Attend,
    Call,
    Cat,
    InFloat32,
    Norm,
    ScaleShift,
    Shape,
    Target,
    Upsample,
    times,
)
from ds.engine.convolutions import Conv, ImplicitGemm, UpsampleConv, UpsamplePoints, Winograd
from ds.nets.fold import FoldedAttention
from ds.ops.conv.winograd import pays


class Step(NamedTuple):
    """A call with the names of the values it reads and of those it makes."""

    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Rewrites:
    """Which rewrites to do. If several apply to a call, the first in this list takes it."""

    time_table: bool = True  # compute the time embeddings of all blocks ahead
    fold_attention: bool = True
    scale_into_norm: bool = True
    shift_into_conv: bool = True  # a CPU's libraries fuse a bias into the convolution
    shift_into_norm: bool = True
    merge_skips: bool = True
    phase_upsample: bool = True
    add_into_norm: bool = True
    add_into_conv: bool = True
    stack_projections: bool = True
    winograd: bool = True  # on a CPU, for enough tiles and channels
    # Our own kernel. None: where FASTER says so. On a GPU that FASTER does not name: where that
    # saves the launch of a small layer, or a pass over memory.
    norm_into_conv: bool | None = True
    implicit_gemm: bool | None = True

    @classmethod
    def good_for(cls, target: Target) -> "Rewrites":
        """Return the default rewrites of a target."""
        cpu = target.device.type == "cpu"
        own = False if cpu else None
        return cls(
            shift_into_conv=cpu, add_into_norm=not cpu, stack_projections=not cpu,
            winograd=cpu and target.dtype in (torch.float32, torch.bfloat16),
            norm_into_conv=own, implicit_gemm=own,
        )  # fmt: skip

    def apply(self, steps: list[Step], target: Target, shapes: dict[str, Shape]) -> list[Step]:
        """Return the steps after the chosen rewrites, given the shapes of the values."""
        for rewrite in REWRITES:
            if getattr(self, rewrite.__name__):
                steps = rewrite(steps)
        if target.float8:
            steps = in_float8(steps)
        if self.winograd:
            steps = winograd(steps, target, shapes)
        for rewrite, unmeasured in ((norm_into_conv, is_small), (implicit_gemm, spares_a_pass)):
            wanted = getattr(self, rewrite.__name__)
            steps = rewrite(steps, _choice(wanted, target, shapes, unmeasured))
        narrow = target.device.type == "cpu" and target.dtype == torch.bfloat16
        return ends_in_float32(steps) if narrow else steps


def fold_attention(steps: list[Step]) -> list[Step]:
    """Premultiply two pairs of projections of an attention layer of one head.

    The pixels are then the keys.
    """
    made = _makers(steps)
    replaced: dict[str, Step | None] = {}
    for step in steps:
        if isinstance(step.call, Attend) and step.call.layer.heads == 1:
            q, k, v, residual = step.inputs
            layer, factor = FoldedAttention(step.call.layer), step.call.factor
            (pixels,) = made[k].inputs
            replaced[q] = Step(Conv(layer.q.weight.detach(), layer.q.bias), (pixels,), (q,))
            replaced[k] = None
            value = Conv(times(layer.v.weight, 1 / factor), None)
            replaced[v] = Step(value, (pixels,), (v,))
            call = replace(step.call, weight=None, bias=times(layer.bias, 1 / factor))
            replaced[step.outputs[0]] = Step(call, (q, pixels, v, residual), step.outputs)
    return _replaced(steps, replaced)


def scale_into_norm(steps: list[Step]) -> list[Step]:
    """Let a norm take its weight and bias from the row, and apply SiLU."""
    return _fuse(steps, Norm, ScaleShift, lambda norm, scale: Step(
        replace(norm.call, affine=scale.call.columns), norm.inputs, scale.outputs
    ))  # fmt: skip


def shift_into_conv(steps: list[Step]) -> list[Step]:
    """Let a convolution without a bias add the columns of the row itself."""
    return _fuse(steps, Conv, AddBias, lambda conv, shift: Step(
        replace(conv.call, bias=shift.call.columns), conv.inputs, shift.outputs
    ))  # fmt: skip


def shift_into_norm(steps: list[Step]) -> list[Step]:
    """Let a norm add the columns of the row before it normalizes."""
    return _fuse(steps, AddBias, Norm, lambda shift, norm: Step(
        replace(norm.call, shift=shift.call.columns), shift.inputs, norm.outputs
    ))  # fmt: skip


def merge_skips(steps: list[Step]) -> list[Step]:
    """Let a norm concatenate its input; the shortcut reads the concatenation from the norm."""
    return _fuse(steps, Cat, Norm, lambda cat, norm: Step(
        replace(norm.call, keep=True), cat.inputs, norm.outputs + cat.outputs
    ), alone=False)  # fmt: skip


def phase_upsample(steps: list[Step]) -> list[Step]:
    """Convolve before doubling pixels: 1x1, or a 2x2 kernel for each phase of the doubled image."""

    def joined(up: Step, conv: Step) -> Step:
        kind = UpsamplePoints if conv.call.weight.shape[2] == 1 else UpsampleConv
        return Step(kind(conv.call.weight, conv.call.bias), up.inputs, conv.outputs)

    return _fuse(steps, Upsample, Conv, joined)


def add_into_norm(steps: list[Step]) -> list[Step]:
    """Let a norm add the branches of a block, and the bias of the convolution that ends one.

    The norm must be the first reader of the sum. Later readers get what the norm normalized. With a
    skip connection that is more than the sum, so then there must be no later reader.
    """
    made, readers = _makers(steps), _readers(steps)
    result: dict[str, Step | None] = {}
    for add in steps:
        if not isinstance(add.call, Add):
            continue
        norm, *others = readers[add.outputs[0]]
        if not isinstance(norm.call, Norm) or norm.inputs[0] not in add.outputs:
            continue
        keep = norm.call.keep or bool(others)
        if (norm.call.keep and others) or not (keep or norm.call.silu):
            continue
        call, conv = replace(norm.call, residual=True, keep=keep), made[add.inputs[0]]
        if isinstance(conv.call, Conv) and isinstance(conv.call.bias, torch.Tensor):
            call = replace(call, shift=conv.call.bias)
            result[conv.outputs[0]] = conv._replace(call=replace(conv.call, bias=None))
        kept = add.outputs if others else ()
        inputs, outputs = add.inputs + norm.inputs[1:], norm.outputs + kept
        result |= {add.outputs[0]: None, norm.outputs[0]: Step(call, inputs, outputs)}
    return _replaced(steps, result)


def add_into_conv(steps: list[Step]) -> list[Step]:
    """Let the last convolution of a residual branch add the other branch."""
    return _fuse(steps, Conv, Add, lambda conv, add: Step(
        conv.call, (*conv.inputs, *(set(add.inputs) - set(conv.outputs))), add.outputs
    ))  # fmt: skip


def stack_projections(steps: list[Step]) -> list[Step]:
    """Compute the projections of an attention layer as one product, read in parts."""
    made = _makers(steps)
    result: dict[str, Step | None] = {}
    for step in steps:
        if not isinstance(step.call, Attend):
            continue
        first, *rest = each = [made[x] for x in step.inputs[:3] if isinstance(made[x].call, Conv)]
        weight = torch.cat([projection.call.weight for projection in each])
        bias = torch.cat([_bias(projection.call) for projection in each])
        outputs = tuple(projection.outputs[0] for projection in each)
        result |= {projection.outputs[0]: None for projection in rest}
        result[outputs[0]] = Step(Conv(weight, bias, parts=len(each)), first.inputs, outputs)
    return _replaced(steps, result)


def _bias(conv: Conv) -> torch.Tensor:
    return conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias


def winograd(steps: list[Step], target: Target, shapes: dict[str, Shape]) -> list[Step]:
    """Compute 3x3 convolutions by Winograd where that is worthwhile."""
    way = "packed bfloat16" if target.dtype == torch.bfloat16 else "packed float32"
    return [
        step._replace(call=Winograd(call.weight, call.bias, doubled=isinstance(call, UpsampleConv)))
        if isinstance(call := step.call, Conv | UpsampleConv)
        and call.weight.shape[2] == 3
        and getattr(call, "stride", 1) == 1
        and pays(way, call.weight, target.images, *shapes[step.outputs[0]][1:])
        else step
        for step in steps
    ]


def norm_into_conv(steps: list[Step], chosen: Callable[[Step], Step | None]) -> list[Step]:
    """Let a convolution normalize its result, and also keep it if others read it."""
    readers = _readers(steps)

    def fused(conv: Step, norm: Step) -> Step | None:
        if not _is_for_our_kernel(conv.call):
            return None
        (x, *others), (normed, *kept) = norm.inputs, norm.outputs
        if x not in conv.outputs or len(others) > norm.call.residual or norm.call.float8:
            return None  # x is the other branch, or there is a skip connection
        if len(readers[x]) > 1:
            kept = [x]
        if len(conv.inputs) + len(others) > 2:
            return None  # a convolution adds one residual
        if norm.call.shift is not None and (conv.call.bias is not None or kept == [x]):
            return None  # it adds one bias, and other readers of x must not see it
        call = ImplicitGemm(conv.call, norm.call, bool(kept))
        return chosen(Step(call, (*conv.inputs, *others), (normed, *kept)))

    return _fuse(steps, Conv, Norm, fused, alone=False)


def implicit_gemm(steps: list[Step], chosen: Callable[[Step], Step | None]) -> list[Step]:
    """Compute convolutions by our own kernel."""

    def own(step: Step) -> Step:
        if not _is_for_our_kernel(step.call):
            return step
        return chosen(step._replace(call=ImplicitGemm(step.call))) or step

    return [own(step) for step in steps]


def _is_for_our_kernel(call: Call) -> bool:
    """Return whether our kernel can compute a call: with stride 2 it pads right and below only."""
    return isinstance(call, UpsampleConv) or (isinstance(call, Conv) and not call.pad_all_sides)


def in_float8(steps: list[Step]) -> list[Step]:
    """Let 3x3 convolutions multiply in float8 if a norm with SiLU makes their input.

    A norm bounds its output, so no scale is needed. The network's last convolution keeps its
    precision, because it makes the result.
    """
    readers = _readers(steps)
    narrow = {
        step.outputs[0]
        for step in steps
        if isinstance(step.call, Norm)
        and step.call.silu
        and all(_is_3x3(r.call) and r is not steps[-1] for r in readers[step.outputs[0]])
    }

    def call(step: Step) -> Call:
        if step.outputs[0] in narrow:
            return replace(step.call, float8=True)
        if step.inputs[0] in narrow:
            return ImplicitGemm(step.call, float8=True)
        return step.call

    return [step._replace(call=call(step)) for step in steps]


def ends_in_float32(steps: list[Step]) -> list[Step]:
    """Compute the first and the last convolution of a plan in float32.

    They have the network's few channels on one side, so this costs little, and neither its input
    nor its result is rounded. The first stays narrow where another call reads the input.
    """
    first, *middle, last = steps
    if isinstance(first.call, Conv) and len(_readers(steps)[first.inputs[0]]) == 1:
        first = first._replace(call=InFloat32(first.call, returns=False))
    if isinstance(last.call, Conv):
        last = last._replace(call=InFloat32(last.call, returns=True))
    return [first, *middle, last]


def _is_3x3(call: Call) -> bool:
    return isinstance(call, Conv) and call.weight.shape[2] == 3


# Convolutions for which a kernel of ours was measured to be faster than cuDNN, with its backend of
# ds.ops.conv: by PyTorch's name of the GPU, then by `choice_name`. benchmarks/gpu_report.py writes
# the file.
FASTER: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("faster.json").read_text())


def choice_name(step: Step, dtype: torch.dtype, shapes: dict[str, Shape]) -> str:
    """Return a convolution's name in FASTER: "gemm 3x3+gn 128x32x32 to 128x32x32 bias bfloat16".

    The name says what is added to the result, since cuDNN adds it in separate passes.
    """
    call, images = step.call, ("x".join(map(str, shapes[names[0]])) for names in step[1:])
    bias = " bias" * (call.conv.bias is not None or bool(call.norm and call.norm.shift is not None))
    residual = " residual" * (len(step.inputs) > 1)
    return f"{call.kind} {' to '.join(images)}{bias}{residual} {str(dtype)[6:]}"


SMALL_PIXELS = 64  # up to which a layer is so short that its launch counts


def is_small(step: Step, shapes: dict[str, Shape]) -> bool:
    """Return whether a convolution is so small that fusing its norm to save a launch pays."""
    return math.prod(shapes[step.outputs[0]][1:]) <= SMALL_PIXELS


def spares_a_pass(step: Step, shapes: dict[str, Shape]) -> bool:
    """Return whether our kernel saves a GPU passes over memory.

    cuDNN adds biases and residuals, pads, and interleaves phases in separate passes; our kernel
    fuses all of these.
    """
    launches = step.call.conv.launches(*(shapes[name] for name in step.inputs))
    return any(launch.needless for launch in launches)


def _choice(
    wanted: bool | None,
    target: Target,
    shapes: dict[str, Shape],
    unmeasured: Callable[[Step, dict[str, Shape]], bool],
) -> Callable[[Step], Step | None]:
    """Return a function from a step to the step with our kernel, or None to leave it to others.

    The choice is the wanted one, else the measured one, else the expected one if our kernel runs.
    """
    if wanted is not None:
        return lambda step: step if wanted else None
    cuda = target.device.type == "cuda"
    here = cuda and torch.cuda.is_available()  # plans for GPUs can be made without one
    gpu = torch.cuda.get_device_name(target.device) if here else ""
    runs = cuda and target.dtype != torch.float64

    def chosen(step: Step) -> Step | None:
        if gpu not in FASTER:
            return step if runs and unmeasured(step, shapes) else None
        backend = FASTER[gpu].get(choice_name(step, target.dtype, shapes))
        return backend and step._replace(call=replace(step.call, backend=backend))

    return chosen


REWRITES = (
    fold_attention, scale_into_norm, shift_into_conv, shift_into_norm, merge_skips,
    phase_upsample, add_into_norm, add_into_conv, stack_projections,
)  # fmt: skip


def _makers(steps: list[Step]) -> dict[str, Step]:
    """Return the step that makes each value."""
    return {name: step for step in steps for name in step.outputs}


def _readers(steps: list[Step]) -> dict[str, list[Step]]:
    """Return the steps that read each value, in order."""
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in step.inputs:
            readers.setdefault(name, []).append(step)
    return readers


def _replaced(steps: list[Step], result: dict[str, Step | None]) -> list[Step]:
    """Replace the steps whose first output is named in `result`; None removes a step."""
    new = (result.get(step.outputs[0], step) for step in steps)
    return [step for step in new if step is not None]


def _fuse(
    steps: list[Step],
    first: type[Call],
    second: type[Call],
    fused: Callable[[Step, Step], Step | None],
    *,
    alone: bool = True,
) -> list[Step]:
    """Fuse each step of the second type with a step of the first type that it reads.

    With `alone`, only if nothing else reads that value. A step is fused at most once, and not if
    `fused` returns None.
    """
    readers = _readers(steps)
    made = {step.outputs[0]: step for step in steps if isinstance(step.call, first)}
    gone, result = set(), {}
    for step in steps:
        if not isinstance(step.call, second):
            continue
        for name in step.inputs:
            if name not in made or name in gone or (alone and len(readers[name]) > 1):
                continue
            if (joined := fused(made[name], step)) is not None:
                gone.add(name)
                result[step.outputs[0]] = joined
                break
    return _replaced(steps, dict.fromkeys(gone) | result)
