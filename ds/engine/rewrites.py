"""What a plan does otherwise than the network: one small function each, from steps to steps.

In exact arithmetic each leaves the result as it is, and any of them can be left out; but for
`in_float8`, which is a precision: a place has it or has it not.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ds import ops
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
from ds.ops.winograd import pays


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
    add_into_conv: bool = True
    winograd: bool = True  # where tiles and channels are enough, on a CPU
    norm_into_conv: bool | None = True  # by our own kernel; None: where FASTER says so
    implicit_gemm: bool | None = True  # likewise, convolutions without a norm

    @classmethod
    def good_for(cls, place: Place) -> "Rewrites":
        """Return the rewrites that are worth it in a place."""
        cpu = place.device.type == "cpu"
        own = False if cpu else None
        return cls(
            shift_into_conv=cpu, winograd=cpu and place.dtype in (torch.float32, torch.bfloat16),
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
        for rewrite in (norm_into_conv, implicit_gemm):
            steps = rewrite(steps, _choice(getattr(self, rewrite.__name__), place, shapes))
        return steps


def fold_attention(steps: list[Step]) -> list[Step]:
    """Multiply two pairs of an attention layer's projections out; the keys are the pixels then."""
    made = {output: step for step in steps for output in step.outputs}
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
    rewritten = (replaced.get(step.outputs[0], step) for step in steps)
    return [step for step in rewritten if step is not None]


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
        norm.call, cat.inputs, norm.outputs + cat.outputs
    ), alone=False)  # fmt: skip


def phase_upsample(steps: list[Step]) -> list[Step]:
    """Convolve before doubling pixels, a 2x2 kernel for each phase of the doubled image."""
    return _fuse(steps, Upsample, Conv, lambda up, conv: Step(
        Phases(conv.call.weight, conv.call.bias), up.inputs, conv.outputs
    ))  # fmt: skip


def add_into_conv(steps: list[Step]) -> list[Step]:
    """Let the last convolution of a residual branch add the other branch."""
    return _fuse(steps, Conv, Add, lambda conv, add: Step(
        conv.call, (*conv.inputs, *(set(add.inputs) - set(conv.outputs))), add.outputs
    ))  # fmt: skip


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


def norm_into_conv(steps: list[Step], chosen: Callable[[Step], bool]) -> list[Step]:
    """Let a convolution normalize its result, which it keeps if it is read elsewhere, too."""
    readers = Counter(name for step in steps for name in step.inputs)

    def fused(conv: Step, norm: Step) -> Step | None:
        kept = conv.outputs if readers[conv.outputs[0]] > 1 else ()
        shifted = norm.call.shift is not None and (kept or conv.call.bias is not None)
        call = ImplicitGemm(conv.call, norm.call, bool(kept))
        step = Step(call, conv.inputs, norm.outputs + kept)
        apart = len(norm.inputs) > 1 or norm.call.float8
        return step if not (apart or shifted) and chosen(step) else None

    return _fuse(steps, Conv, Norm, fused, alone=False)


def implicit_gemm(steps: list[Step], chosen: Callable[[Step], bool]) -> list[Step]:
    """Compute convolutions by our own kernel."""
    own = (
        step._replace(call=ImplicitGemm(step.call))
        if isinstance(step.call, Conv | Phases)
        else step
        for step in steps
    )
    return [new if chosen(new) else step for step, new in zip(steps, own, strict=True)]


def in_float8(steps: list[Step]) -> list[Step]:
    """Let 3x3 convolutions multiply in float8 where a norm with SiLU makes their input for them.

    A norm bounds what it makes, which therefore needs no scale. The network's last convolution is
    left as it is: what it rounds is the result.
    """
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in step.inputs:
            readers.setdefault(name, []).append(step)
    narrow = {
        step.outputs[0]
        for step in steps
        if isinstance(step.call, Norm)
        and step.call.layer.op is ops.group_norm_silu
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


# The convolutions for which our kernel was measured to be faster than cuDNN, for each GPU by the
# name PyTorch gives it, in the form of `choice_name`. None yet: not measured.
FASTER: dict[str, frozenset[str]] = {}


def choice_name(step: Step, dtype: torch.dtype, shapes: dict[str, Shape]) -> str:
    """Name a convolution in FASTER, as "gemm 3x3+gn 128x32x32 to 128x32x32 bfloat16"."""
    images = ("x".join(map(str, shapes[names[0]])) for names in step[1:])
    return f"{step.call.kind} {' to '.join(images)} {str(dtype)[6:]}"


def _choice(wanted: bool | None, place: Place, shapes: dict[str, Shape]) -> Callable[[Step], bool]:
    """Return what says whether our kernel is to compute a step: as wanted, or else as measured."""
    if wanted is not None:
        return lambda _: wanted
    here = place.device.type == "cuda" and torch.cuda.is_available()  # a plan can be made anywhere
    gpu = torch.cuda.get_device_name(place.device) if here else ""
    faster = FASTER.get(gpu, frozenset())
    return lambda step: choice_name(step, place.dtype, shapes) in faster


REWRITES = (
    fold_attention, shift_into_conv, shift_into_norm, merge_skips, phase_upsample, add_into_conv,
)  # fmt: skip


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
    readers = Counter(name for step in steps for name in step.inputs)
    made = {step.outputs[0]: step for step in steps if isinstance(step.call, first)}
    gone, result = set(), {}
    for step in steps:
        if not isinstance(step.call, second):
            continue
        for name in step.inputs:
            if name not in made or name in gone or (alone and readers[name] > 1):
                continue
            if (joined := fused(made[name], step)) is not None:
                gone.add(name)
                result[step.outputs[0]] = joined
                break
    kept = (step for step in steps if step.outputs[0] not in gone)
    return [result.get(step.outputs[0], step) for step in kept]
