"""A plan: the forward pass of a U-Net for images of its size, as a flat list of calls."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.engine.calls import (
    Add,
    AddBias,
    Attend,
    Call,
    Cat,
    Conv,
    Halve,
    ImplicitGemm,
    Launch,
    Norm,
    Run,
    ScaleShift,
    Shape,
    Target,
    Upsample,
    UpsampleConv,
    values,
)
from ds.engine.rewrites import Rewrites, Step
from ds.nets import UNet
from ds.nets.blocks import Attention, Downsample, GroupNorm, ResBlock, doubled, halved
from ds.nets.fold import FoldedAttention

INPUT = "x"
TILE = 128  # pixels, and also channels, that one program computes on a GPU


@dataclass(frozen=True, eq=False)
class Plan:
    """Steps from the value "x" to the last one, and the shape of every value, for one image."""

    steps: tuple[Step, ...]
    shapes: dict[str, Shape]

    @classmethod
    def of(cls, net: UNet, target: Target, rewrites: Rewrites | None = None) -> "Plan":
        """Make the plan of a network for a target, by default with the target's own rewrites.

        It holds the network's weights, not copies of them. The network is one that `can_plan`
        accepts.
        """
        steps, shapes = list(_walk(net)), {INPUT: net.shape}
        for call, inputs, outputs in steps:
            found = call.shapes(*(shapes[name] for name in inputs))
            shapes |= dict(zip(outputs, found, strict=True))
        rewrites = rewrites or Rewrites.good_for(target)
        return cls(tuple(rewrites.apply(steps, target, shapes)), shapes)

    def prepare(self, target: Target) -> list[tuple[Run, Step, tuple[str, ...]]]:
        """Pack the weights; return each function with its step and the values it reads last."""
        alive, prepared = {self.steps[-1].outputs[0]}, []
        for step in reversed(self.steps):
            last = tuple({*step.inputs, *step.outputs} - alive)
            alive |= {*step.inputs, *step.outputs}
            run = step.call.prepare(target, *(self.shapes[name] for name in step.inputs))
            prepared.append((run, step, last))
        return prepared[::-1]

    def flops(self, step: Step) -> int:
        """Return the FLOPs of a step for an image."""
        return step.call.flops(*(self.shapes[name] for name in step.inputs))

    def bytes(self, step: Step, target: Target) -> int:
        """Return the fewest bytes that a step must move for a batch."""
        images = values(tuple(self.shapes[name] for name in (*step.inputs, *step.outputs)))
        return target.dtype.itemsize * (target.images * images + step.call.weights())

    def launches(self, step: Step) -> tuple[Launch, ...]:
        """Return the kernels that a step launches on a GPU, with the numbers an image moves."""
        return step.call.launches(*(self.shapes[name] for name in step.inputs))

    def moved(self, step: Step, target: Target) -> int:
        """Return the bytes a step moves for a batch; on a GPU, those of its kernels."""
        if target.device.type != "cuda":
            return self.bytes(step, target)
        numbers = sum(launch.numbers for launch in self.launches(step))
        return target.dtype.itemsize * (target.images * numbers + step.call.weights())

    def needless(self, target: Target) -> int:
        """Return how many bytes all steps move needlessly on a GPU."""
        numbers = sum(launch.needless for step in self.steps for launch in self.launches(step))
        return target.dtype.itemsize * target.images * numbers

    def peak(self) -> int:
        """Return the largest count of numbers per image that are alive at once."""
        alive, most = {INPUT}, 0
        last = {name: i for i, step in enumerate(self.steps) for name in step.inputs}
        for i, step in enumerate(self.steps):
            alive |= {*step.outputs}
            most = max(most, values(tuple(self.shapes[name] for name in alive)))
            alive = {name for name in alive if last.get(name, i) > i}
        return most

    def full_batch(self, multiprocessors: int) -> int:
        """Return the smallest batch whose convolutions keep every multiprocessor of a GPU busy.

        A program makes 128 pixels of 128 channels, of ours and of most of cuDNN's; batches of a
        multiple of these images need whole waves of them in every layer.
        """
        full = 1
        for step in self.steps:
            if isinstance(step.call, Conv | UpsampleConv | ImplicitGemm):
                channels, height, width = self.shapes[step.outputs[0]]
                programs = Fraction(height * width, TILE) * -(-channels // TILE)
                full = math.lcm(full, (multiprocessors / programs).numerator)
        return full

    def text(self, target: Target, *, tflops: float, gbs: float) -> str:
        """Return the plan as a table; a floor is the longer of compute and memory time."""
        head = f"{'call':14}{'makes':38}{'shape':>16}{'MB':>10}{'GFLOP':>10}{'floor, us':>11}"
        lines, total = [head], [0.0] * 3
        for step in self.steps:
            size, work = self.moved(step, target) / 1e6, target.images * self.flops(step) / 1e9
            floor = 1e3 * max(work / tflops, size / gbs)
            total = [a + b for a, b in zip(total, (size, work, floor), strict=True)]
            name, shape = step.outputs[0], " x ".join(map(str, self.shapes[step.outputs[0]]))
            lines.append(f"{step.call.kind:14}{name:38}{shape:>16}{_figures(size, work, floor)}")
        lines.append(f"{f'{len(self.steps)} calls':68}{_figures(*total)}")
        alive = target.images * target.dtype.itemsize * self.peak() / 1e6
        lines.append(
            f"{target.images} images, {str(target.dtype)[6:]}, {alive:.1f} MB alive at most; "
            f"floors at {tflops:g} TFLOP/s and {gbs:g} GB/s"
        )
        if target.device.type == "cuda":
            count = sum(len(self.launches(step)) for step in self.steps)
            lines.append(f"{count} launches, {self.needless(target) / 1e6:.1f} MB moved needlessly")
        return "\n".join(lines)


def _figures(size: float, work: float, floor: float) -> str:
    return f"{size:10.2f}{work:10.2f}{floor:11.1f}"


def blocks(net: UNet) -> dict[str, ResBlock]:
    """Return the residual blocks by name, in the order of their columns in a row."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, ResBlock)}


# What can_run accepts.
RUNS = "U-Nets without conditions and folded attention"


def can_run(net: nn.Module) -> TypeGuard[UNet]:
    """Return whether the engine can run a network: it has a plan, and takes nothing but x and t."""
    return can_plan(net) and not net.config.takes


def can_plan(net: nn.Module) -> TypeGuard[UNet]:
    """Return whether there is a plan of a network: a U-Net, which the plan itself may fold."""
    if not isinstance(net, UNet):
        return False
    return not any(isinstance(layer, FoldedAttention) for layer in net.modules())


@torch.no_grad()
def time_rows(net: UNet, t: Tensor) -> Tensor:
    """Return what depends on times t [M] alone, for each block: what it adds, or scales and adds.

    What it adds is conv1's bias and its time embedding. [M, columns of all blocks], in float64.
    """
    temb = net.config.embed(t).double()
    for i, layer in enumerate(net.temb.dense):
        temb = _linear(layer, temb if i == 0 else F.silu(temb))
    temb = F.silu(temb)
    parts = []
    for block in blocks(net).values():
        told = _linear(block.temb_proj, temb)
        parts.append(told if block.scales else block.conv1.bias.double() + told)
    return torch.cat(parts, 1)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.double(), layer.bias.double())


class _Writer:
    """Collects steps; each makes a value named after its layer."""

    def __init__(self, net: UNet):
        self.steps: list[Step] = []
        self.names = {layer: name for name, layer in net.named_modules()}
        ends = list(itertools.accumulate(b.temb_proj.out_features for b in blocks(net).values()))
        spans = zip([0, *ends], ends, strict=False)
        self.columns = dict(
            zip(blocks(net).values(), (slice(*span) for span in spans), strict=True)
        )

    def call(self, name: str, call: Call, *inputs: str) -> str:
        self.steps.append(Step(call, inputs, (name,)))
        return name

    def conv(self, layer: nn.Conv2d, x: str, *, bias: bool = True) -> str:
        sides = layer.stride[0] == 2 and layer.padding[0] == 1
        call = Conv(
            layer.weight.detach(),
            layer.bias.detach() if bias else None,
            layer.stride[0],
            pad_all_sides=sides,
        )
        return self.call(self.names[layer], call, x)

    def norm(self, layer: nn.Module, x: str) -> str:
        if not isinstance(layer, GroupNorm):
            return x
        return self.call(self.names[layer], Norm(layer), x)

    def block(self, layer: ResBlock, x: str, skip: str | None = None) -> str:
        name = self.names[layer]
        if skip is not None:
            x = self.call(f"{name}.cat", Cat(), x, skip)
        h = self.norm(layer.norm1, x)
        if layer.resample is not None:
            resample = {halved: Halve, doubled: Upsample}[layer.resample]()
            h = self.call(f"{name}.resample", resample, h)
            x = self.call(f"{name}.resample_x", resample, x)
        h = self.conv(layer.conv1, h, bias=layer.scales)
        if not layer.scales:
            h = self.call(f"{name}.shift", AddBias(self.columns[layer]), h)
        if isinstance(layer.nin_shortcut, nn.Conv2d):
            x = self.conv(layer.nin_shortcut, x)
        h = self.norm(layer.norm2, h)
        if layer.scales:
            h = self.call(f"{name}.scale", ScaleShift(self.columns[layer]), h)
        h = self.conv(layer.conv2, h)
        return self.call(name, Add(), h, x)

    def resample(self, layer: nn.Module, x: str) -> str:
        if isinstance(layer, ResBlock):
            return self.block(layer, x)
        if not isinstance(layer, Downsample):
            x = self.call(self.names[layer], Upsample(), x)
        return self.conv(layer.conv, x)

    def attend(self, layer: nn.Module, x: str) -> str:
        if not isinstance(layer, Attention):
            return x
        h = self.norm(layer.norm, x)
        heads = [self.conv(projection, h) for projection in (layer.q, layer.k, layer.v)]
        call = Attend(layer, layer.proj_out.weight, layer.proj_out.bias)
        return self.call(self.names[layer], call, *heads, x)


def _walk(net: UNet) -> Iterator[Step]:
    """Yield the steps of the network's forward pass, one for each layer."""
    write = _Writer(net)
    h = write.conv(net.conv_in, INPUT)
    skips = [h]
    for i, level in enumerate(net.down):
        for block, attn in zip(level.block, level.attn, strict=True):
            h = write.attend(attn, write.block(block, h))
            skips.append(h)
        if i < len(net.down) - 1:
            h = write.resample(level.downsample, h)
            skips.append(h)
    h = write.attend(net.mid.attn_1, write.block(net.mid.block_1, h))
    h = write.block(net.mid.block_2, h)
    for i, level in reversed(list(enumerate(net.up))):
        for block, attn in zip(level.block, level.attn, strict=True):
            h = write.attend(attn, write.block(block, h, skips.pop()))
        if i > 0:
            h = write.resample(level.upsample, h)
    write.conv(net.conv_out, write.norm(net.norm_out, h))
    yield from write.steps
