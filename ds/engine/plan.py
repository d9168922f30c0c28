"""A plan: the forward pass of a U-Net for images of its size, as a flat list of calls."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeGuard

from torch import nn

from ds.engine.calls import (
    Launch,
    Run,
    Shape,
    Target,
    values,
)
from ds.engine.convolutions import Conv, ImplicitGemm, UpsampleConv
from ds.engine.rewrites import Rewrites, Step
from ds.engine.walk import INPUT, walk
from ds.nets.blocks import AbstractUNet
from ds.nets.fold import FoldedAttention

TILE = 128  # pixels, and also channels, that one program computes on a GPU


@dataclass(frozen=True, eq=False)
class Plan:
    """Steps from the value "x" to the last one, and the shape of every value, for one image."""

    steps: tuple[Step, ...]
    shapes: dict[str, Shape]

    @classmethod
    def of(cls, net: AbstractUNet, target: Target, rewrites: Rewrites | None = None) -> "Plan":
        """Make the plan of a network for a target, by default with the target's own rewrites.

        It holds the network's weights, not copies of them. The network is one that `can_run`
        accepts.
        """
        steps, shapes = walk(net), {INPUT: (net.config.inputs, *net.config.size)}
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


# What can_run accepts.
RUNS = "U-Nets without folded attention"


def can_run(net: nn.Module) -> TypeGuard[AbstractUNet]:
    """Return whether there is a plan of a network, so that the engine can run it.

    It is a U-Net, whose attention the plan itself may fold.
    """
    if not isinstance(net, AbstractUNet):
        return False
    return not any(isinstance(layer, FoldedAttention) for layer in net.modules())
