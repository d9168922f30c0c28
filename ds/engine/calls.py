"""The calls that a plan is made of: each knows its cost and packs its own weights.

A call holds the network's weights. `prepare` converts them once, to the form, dtype and device of a
target, and returns the function to run. That function takes the row of what blocks are told, and
the inputs, in channels_last. Some calls add columns of the row as a bias, or scale by them. The row
is one for all images, [columns], or one each, [N, columns].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds import ops
from ds.nets.blocks import (
    Attention,
    GroupNorm,
    Resample,
    doubled,
    halved,
    pixels,
    smoothly_halved,
    split,
)

Shape = tuple[int, int, int]  # [C, H, W] of an image
Run = Callable[..., Tensor | tuple[Tensor, ...]]
Bias = Tensor | slice | None  # a tensor, or columns of the row
ONE_PASS_PIXELS = 1024  # up to which a norm reads an image once: kernels/group_norm_tiles
IN_TILE_PIXELS = 256  # up to which our convolution also normalizes: kernels/conv


@dataclass(frozen=True)
class Target:
    """Where a plan runs: the device, the dtype, and how many images at a time.

    With `float8` some convolutions multiply in float8, see ds.engine.rewrites.in_float8; values
    between them are of the dtype.
    """

    device: torch.device
    dtype: torch.dtype
    images: int
    float8: bool = False

    def cast(self, weight: Tensor) -> Tensor:
        """Convert a weight to the device and dtype; a convolution's becomes channels_last."""
        weight = weight.to(self.device, self.dtype)
        return weight.contiguous(memory_format=_format(weight))

    @property
    def wide(self) -> torch.dtype:
        """The dtype of statistics and of the time table: float32, or float64 for float64."""
        return torch.promote_types(self.dtype, torch.float32)

    def bias(
        self, bias: Bias, dtype: torch.dtype | None = None
    ) -> Callable[[Tensor], Tensor | None]:
        """Return a function from the row to a bias, by default in the target's dtype.

        The bias is [C], or [N, C] of columns of a row for each image.
        """
        dtype = dtype or self.dtype
        if isinstance(bias, slice):
            return lambda row: row[..., bias].to(dtype)
        constant = None if bias is None else bias.to(self.device, dtype)
        return lambda _: constant


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


class Launch(NamedTuple):
    """A kernel that a call launches on a GPU, and how many numbers an image moves through memory.

    `needless` is the part of these that another way to do the same would not move: what has been
    written is read to add a bias or a residual, to pad, or to be written elsewhere.
    """

    kernel: str
    numbers: int
    needless: int = 0


class Call(ABC):
    """One entry of a plan."""

    @abstractmethod
    def prepare(self, target: Target, *shapes: Shape) -> Run:
        """Return the function run(row, *inputs), for inputs of these shapes."""

    @abstractmethod
    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        """Return the shapes of the outputs."""

    def flops(self, *shapes: Shape) -> int:
        """Return the FLOPs for an image, two for each multiplication."""
        return 0

    def weights(self) -> int:
        """Return how many weights are read."""
        return 0

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        """Return the kernels launched on a GPU, in order; by default one, which moves the minimum.

        Activations are counted, weights are not.
        """
        return (Launch(self.kind, values(shapes) + values(self.shapes(*shapes))),)

    @property
    def kind(self) -> str:
        """The name in a printed plan."""
        return type(self).__name__.lower()


@dataclass(frozen=True, eq=False)
class Norm(Call):
    """GroupNorm, with SiLU or not, of the sum or concatenation of its inputs.

    The inputs are x; with `residual`, a tensor to add to x; and perhaps a skip connection to
    concatenate. `shift`, a bias or columns of the row, is added to x too. With `keep`, the tensor
    that was normalized is a second output. It is held divided by `factor`. `affine`, if given, are
    the columns of the weight and then the bias, in place of the layer's own; SiLU follows then.
    """

    layer: GroupNorm
    factor: float = 1.0
    affine: slice | None = None
    shift: Bias = None
    residual: bool = False
    keep: bool = False
    float8: bool = False  # of the normalized output, after SiLU

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        settings, shift = self.settings(target), target.bias(self.shift, target.wide)
        names = ("residual", "skip") if self.residual else ("skip",)
        if self.keep:
            op, options = ops.fused_add_group_norm_silu, {"silu": self.silu}
        else:
            op, options = ops.group_norm_silu if self.silu else ops.group_norm, {}
        if self.float8:
            options["float8"] = True

        def run(row: Tensor, x: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
            parts = dict(zip(names, others, strict=False))
            if self.shift is not None:
                parts["shift"] = shift(row)
            return op(x, *settings(row), **parts, **options)

        return run

    @property
    def silu(self) -> bool:
        """Whether SiLU follows."""
        return self.affine is not None or self.layer.op is ops.group_norm_silu

    def settings(self, target: Target) -> Callable[[Tensor], tuple[Tensor, Tensor, int, float]]:
        """Return a function from the row to the op's weight, bias, groups and eps."""
        layer, affine, eps = self.layer, self.affine, self.layer.eps / self.factor**2
        if affine is not None:
            return lambda row: (*row[..., affine].chunk(2, -1), layer.groups, eps)
        weight, bias = (
            p.detach().to(target.device, target.wide) for p in (layer.weight, layer.bias)
        )
        constant = weight, bias, layer.groups, eps
        return lambda _: constant

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        sources = shapes[:1] + shapes[1 + self.residual :]
        channels = sum(c for c, _, _ in sources)
        return ((channels, *shapes[0][1:]),) * (1 + self.keep)

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        read, (made, *kept) = values(shapes), (values((s,)) for s in self.shapes(*shapes))
        again = values(shapes[1 + self.residual :]) if self.keep else 0  # of a concatenation
        if math.prod(shapes[0][1:]) <= ONE_PASS_PIXELS:
            return (Launch(self.kind, read + made + sum(kept), again),)
        return (
            Launch("norm: sums", read + sum(kept), again),
            Launch("norm: groups", 0),
            Launch(self.kind, (sum(kept) or read) + made),
        )


@dataclass(frozen=True, eq=False)
class Attend(Call):
    """Attention in the layer's heads, the output projection and the residual.

    The inputs are q, k, v and residual. The weight of the projection is None if v has gone through
    it already. It and the bias are the layer's, divided by the factor of the residual.
    """

    layer: Attention  # whose projections made q, k and v
    weight: Tensor | None  # [O, C, 1, 1]
    bias: Tensor
    factor: float = 1.0

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        weight = None if self.weight is None else target.cast(self.weight.flatten(1))
        bias = target.cast(self.bias)

        def run(_: Tensor, *inputs: Tensor) -> Tensor:
            *found, residual = (pixels(each) for each in inputs)
            heads = (split(each, self.layer.heads) for each in found)
            y = ops.attention_residual(*heads, weight, bias, residual)
            return y.unflatten(1, inputs[0].shape[2:]).permute(0, 3, 1, 2)

        return run

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes[3:]

    def flops(self, *shapes: Shape) -> int:
        c, h, w = shapes[0]
        return 4 * c * (h * w) ** 2 + 2 * h * w * self.weights()

    def weights(self) -> int:
        return 0 if self.weight is None else self.weight.numel()


@dataclass(frozen=True, eq=False)
class AddBias(Call):
    """Add columns of the row, one value per channel."""

    columns: slice

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        bias = target.bias(self.columns)
        return lambda row, x: x + bias(row)[..., None, None]

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes


@dataclass(frozen=True, eq=False)
class ScaleShift(Call):
    """Scale by one more than columns of the row, shift by as many others, then apply SiLU."""

    columns: slice

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        columns = target.bias(self.columns)

        def run(row: Tensor, x: Tensor) -> Tensor:
            scale, shift = columns(row)[..., None, None].chunk(2, -3)
            return F.silu(torch.addcmul(shift, x, 1 + scale), inplace=True)

        return run

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        moved = 2 * values(shapes)
        return Launch(self.kind, moved), Launch("silu", moved, moved)


@dataclass(frozen=True, eq=False)
class Scale(Call):
    """Multiply by a number."""

    by: float

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        return lambda _, x: x * self.by

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes


@dataclass(frozen=True, eq=False)
class InFloat32(Call):
    """A call that takes and computes float32 within a narrower plan, and perhaps returns it."""

    call: Call
    returns: bool

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        run = self.call.prepare(replace(target, dtype=target.wide), *shapes)
        dtype = target.wide if self.returns else target.dtype

        def widened(row: Tensor, *inputs: Tensor) -> Tensor:
            return run(row, *(x.to(target.wide) for x in inputs)).to(dtype)

        return widened

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return self.call.shapes(*shapes)

    def flops(self, *shapes: Shape) -> int:
        return self.call.flops(*shapes)

    def weights(self) -> int:
        return self.call.weights()

    @property
    def kind(self) -> str:
        return self.call.kind


class Add(Call):
    """Add two tensors."""

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        return lambda _, x, y: x + y

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes[:1]


class Cat(Call):
    """Concatenate the channels of two tensors."""

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        return lambda _, x, y: torch.cat([x, y], 1)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return ((sum(c for c, _, _ in shapes), *shapes[0][1:]),)


class Halve(Call):
    """Average each 2 x 2 pixels."""

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        return lambda _, x: halved(x)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        c, h, w = shapes[0]
        return ((c, h // 2, w // 2),)


class Upsample(Call):
    """Double every pixel in both directions."""

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        return lambda _, x: doubled(x)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        c, h, w = shapes[0]
        return ((c, 2 * h, 2 * w),)


@dataclass(frozen=True, eq=False)
class Smooth(Call):
    """Halve or double by a filter of four taps, with one of the functions of ds.nets.blocks."""

    how: Resample

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        return lambda _, x: self.how(x)

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        kind = Halve if self.how is smoothly_halved else Upsample
        return kind().shapes(*shapes)

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        # the filter is two means of 2 x 2 pixels and a halving, or a doubling and two means
        small, large = sorted((values(shapes), values(self.shapes(*shapes))))
        filters = Launch("mean", 2 * large, 2 * large)
        return filters, filters, Launch(self.kind, small + large)


def times(weight: Tensor, factor: float) -> Tensor:
    """Return factor * weight, rounded once; the weight itself for a factor of 1."""
    weight = weight.detach()
    return weight if factor == 1 else (factor * weight.double()).to(weight.dtype)


def values(shapes: tuple[Shape, ...]) -> int:
    """Return how many numbers images of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes)
