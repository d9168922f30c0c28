"""What a plan does otherwise than the network: one small function each, from steps to steps.

In exact arithmetic each leaves the result as it is, and any of them can be left out; but for
`in_float8`, which is a precision: a place has it or has it not.
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
    Attend,
    Call,
    Cat,
    Conv,
    ImplicitGemm,
    Norm,
    Phases,
    Place,
    Shape,
    Shift,
    Upsample,
    Winograd,
)
from ds.nets.fold import FoldedAttention
from ds.ops.conv.winograd import pays


class Step(NamedTuple):
    """A call with the names of the values it reads and of those it makes."""

    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Rewrites:
    """Which rewrites to do. Of those that compete for a call, the first that is named takes it."""

    time_table: bool = True  # the time's part of every block ahead, for all times of the plan
    fold_attention: bool = True
    shift_into_conv: bool = True  # ... which adds a bias as it goes, in the CPU's libraries
    shift_into_norm: bool = True
    merge_skips: bool = True
    phase_upsample: bool = True
    add_into_norm: bool = True
    add_into_conv: bool = True
    stack_projections: bool = True
    winograd: bool = True  # where tiles and channels are enough, on a CPU
    # By our own kernel. None: where FASTER says so, or for a GPU that it does not name, where that
    # spares a launch of a small layer, or a pass over memory.
    norm_into_conv: bool | None = True
    implicit_gemm: bool | None = True

    @classmethod
    def good_for(cls, place: Place) -> "Rewrites":
        """Return the rewrites that are worth it in a place."""
        cpu = place.device.type == "cpu"
        own = False if cpu else None
        return cls(
            shift_into_conv=cpu, add_into_norm=not cpu, stack_projections=not cpu,
            winograd=cpu and place.dtype in (torch.float32, torch.bfloat16),
            norm_into_conv=own, implicit_gemm=own,
        )  # fmt: skip

    def apply(self, steps: list[Step], place: Place, shapes: dict[str, Shape]) -> list[Step]:
        """Return the steps after the rewrites that are on; `shapes` are those of the values."""
        for rewrite in REWRITES:
            if getattr(self, rewrite.__name__):
                steps = rewrite(steps)
        if place.float8:
            steps = in_float8(steps)
        if self.winograd:
            steps = winograd(steps, place, shapes)
        for rewrite, unmeasured in ((norm_into_conv, is_small), (implicit_gemm, spares_a_pass)):
            wanted = getattr(self, rewrite.__name__)
            steps = rewrite(steps, _choice(wanted, place, shapes, unmeasured))
        return steps


def fold_attention(steps: list[Step]) -> list[Step]:
    """Multiply two pairs of an attention layer's projections out; the keys are the pixels then."""
    made = _makers(steps)
    replaced: dict[str, Step | None] = {}
    for step in steps:
        if isinstance(step.call, Attend):
            q, k, v, residual = step.inputs
            layer = FoldedAttention(step.call.layer)
            (pixels,) = made[k].inputs
            replaced[q] = Step(Conv(layer.q.weight.detach(), layer.q.bias), (pixels,), (q,))
            replaced[k] = None
            replaced[v] = Step(Conv(layer.v.weight.detach(), None), (pixels,), (v,))
            call = replace(step.call, weight=None, bias=layer.bias)
            replaced[step.outputs[0]] = Step(call, (q, pixels, v, residual), step.outputs)
    return _replaced(steps, replaced)


def shift_into_conv(steps: list[Step]) -> list[Step]:
    """Let a convolution without a bias add the columns of the row that are added to its result."""
    return _fuse(steps, Conv, Shift, lambda conv, shift: Step(
        replace(conv.call, bias=shift.call.columns), conv.inputs, shift.outputs
    ))  # fmt: skip


def shift_into_norm(steps: list[Step]) -> list[Step]:
    """Let a norm add the columns of the row before it normalizes."""
    return _fuse(steps, Shift, Norm, lambda shift, norm: Step(
        replace(norm.call, shift=shift.call.columns), shift.inputs, norm.outputs
    ))  # fmt: skip


def merge_skips(steps: list[Step]) -> list[Step]:
    """Let a norm concatenate its input; the shortcut takes the concatenation from there."""
    return _fuse(steps, Cat, Norm, lambda cat, norm: Step(
        replace(norm.call, keep=True), cat.inputs, norm.outputs + cat.outputs
    ), alone=False)  # fmt: skip


def phase_upsample(steps: list[Step]) -> list[Step]:
    """Convolve before doubling pixels, a 2x2 kernel for each phase of the doubled image."""
    return _fuse(steps, Upsample, Conv, lambda up, conv: Step(
        Phases(conv.call.weight, conv.call.bias), up.inputs, conv.outputs
    ))  # fmt: skip


def add_into_norm(steps: list[Step]) -> list[Step]:
    """Let a norm add the branches of a block, and the bias of the convolution that ends one.

    It does where it is the first to read the sum. Who reads that later is given what the norm
    normalized; with a skip connection that is more than the sum, which nobody else may want then.
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
    """Compute the projections of an attention layer as one product, whose parts are read apart."""
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


def winograd(steps: list[Step], place: Place, shapes: dict[str, Shape]) -> list[Step]:
    """Let 3x3 convolutions multiply less, where they multiply enough to pay for it."""
    return [
        step._replace(call=Winograd(call.weight, call.bias, doubled=isinstance(call, Phases)))
        if isinstance(call := step.call, Conv | Phases)
        and call.weight.shape[2] == 3
        and getattr(call, "stride", 1) == 1
        and pays(call.weight, place.images, *shapes[step.outputs[0]][1:])
        else step
        for step in steps
    ]


def norm_into_conv(steps: list[Step], chosen: Callable[[Step], Step | None]) -> list[Step]:
    """Let a convolution normalize its result, which it keeps if it is read elsewhere, too."""
    readers = _readers(steps)

    def fused(conv: Step, norm: Step) -> Step | None:
        (x, *others), (normed, *kept) = norm.inputs, norm.outputs
        if x not in conv.outputs or len(others) > norm.call.residual or norm.call.float8:
            return None  # x is the other branch, or there is a skip connection
        if len(readers[x]) > 1:
            kept = [x]
        if len(conv.inputs) + len(others) > 2:
            return None  # a convolution adds one residual
        if norm.call.shift is not None and (conv.call.bias is not None or kept == [x]):
            return None  # it adds one bias, which others who read x must not see
        call = ImplicitGemm(conv.call, norm.call, bool(kept))
        return chosen(Step(call, (*conv.inputs, *others), (normed, *kept)))

    return _fuse(steps, Conv, Norm, fused, alone=False)


def implicit_gemm(steps: list[Step], chosen: Callable[[Step], Step | None]) -> list[Step]:
    """Compute convolutions by our own kernel."""

    def own(step: Step) -> Step:
        if not isinstance(step.call, Conv | Phases):
            return step
        return chosen(step._replace(call=ImplicitGemm(step.call))) or step

    return [own(step) for step in steps]


def in_float8(steps: list[Step]) -> list[Step]:
    """Let 3x3 convolutions multiply in float8 where a norm with SiLU makes their input for them.

    A norm bounds what it makes, which therefore needs no scale. The network's last convolution is
    left as it is: what it rounds is the result.
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


def _is_3x3(call: Call) -> bool:
    return isinstance(call, Conv) and call.weight.shape[2] == 3


# The convolutions for which a kernel of ours was measured to be faster than cuDNN, and which one,
# a backend of ds.ops.conv. By the name that PyTorch gives a GPU, and `choice_name`; written by
# benchmarks/gpu_report.py. None yet: not measured.
FASTER: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("faster.json").read_text())


def choice_name(step: Step, dtype: torch.dtype, shapes: dict[str, Shape]) -> str:
    """Name a convolution in FASTER, as "gemm 3x3+gn 128x32x32 to 128x32x32 bias bfloat16".

    What is added to its result is part of the name, since cuDNN adds it by passes of its own.
    """
    call, images = step.call, ("x".join(map(str, shapes[names[0]])) for names in step[1:])
    bias = " bias" * (call.conv.bias is not None or bool(call.norm and call.norm.shift is not None))
    residual = " residual" * (len(step.inputs) > 1)
    return f"{call.kind} {' to '.join(images)}{bias}{residual} {str(dtype)[6:]}"


SMALL_PIXELS = 64  # of images whose layers are so short that a launch is a good part of them


def is_small(step: Step, shapes: dict[str, Shape]) -> bool:
    """Say whether a convolution is so small that its norm is worth a launch spared."""
    return math.prod(shapes[step.outputs[0]][1:]) <= SMALL_PIXELS


def spares_a_pass(step: Step, shapes: dict[str, Shape]) -> bool:
    """Say whether our kernel spares a GPU passes over memory.

    cuDNN adds a bias and a residual, pads, and interleaves phases by passes of their own; our
    kernel does all of that as it goes.
    """
    launches = step.call.conv.launches(*(shapes[name] for name in step.inputs))
    return any(launch.needless for launch in launches)


def _choice(
    wanted: bool | None,
    place: Place,
    shapes: dict[str, Shape],
    unmeasured: Callable[[Step, dict[str, Shape]], bool],
) -> Callable[[Step], Step | None]:
    """Return what gives a step for our kernel with its backend, or None where it is not to be ours.

    As wanted, or else as measured, or else as is to be expected of it where it runs at all.
    """
    if wanted is not None:
        return lambda step: step if wanted else None
    cuda = place.device.type == "cuda"
    here = cuda and torch.cuda.is_available()  # a plan can be made anywhere
    gpu = torch.cuda.get_device_name(place.device) if here else ""
    runs = cuda and place.dtype != torch.float64

    def chosen(step: Step) -> Step | None:
        if gpu not in FASTER:
            return step if runs and unmeasured(step, shapes) else None
        backend = FASTER[gpu].get(choice_name(step, place.dtype, shapes))
        return backend and step._replace(call=replace(step.call, backend=backend))

    return chosen


REWRITES = (
    fold_attention, shift_into_conv, shift_into_norm, merge_skips, phase_upsample, add_into_norm,
    add_into_conv, stack_projections,
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
    """Put steps in the place of those that make these values first; None takes one away."""
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
    """Put one step in the place of each second one that reads what a first one makes.

    `alone`: only where nothing else reads it. Each is fused once at most, and not where `fused`
    says None.
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
