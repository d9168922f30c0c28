"""The calls that a plan is made of: each knows its cost and packs its own weights.

A call holds the network's weights. `prepare` converts them once, to the form, dtype and device of a
target, and returns the function to run. That function takes the row of the time table, whose
columns some calls add as a bias, and the inputs, in channels_last.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds import ops
from ds.nets.blocks import Attention, GroupNorm, doubled, halved, pixels, split
from ds.ops.conv.winograd import tiles

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
        """Return a function from the row to a bias, by default in the target's dtype."""
        dtype = dtype or self.dtype
        if isinstance(bias, slice):
            return lambda row: row[bias].to(dtype)
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
class Conv(Call):
    """A convolution; a second input, if any, is added to its result.

    With stride 2 the image is padded on the right and below only, or with `pad_all_sides` on all.
    The channels of the result are cut into `parts` of one size, each an output.
    """

    weight: Tensor
    bias: Bias
    stride: int = 1
    parts: int = 1
    pad_all_sides: bool = False

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        weight, bias = target.cast(self.weight), target.bias(self.bias)
        halves = self._pads_before
        padding = [0 if halves else self.weight.shape[2] // 2] * 2
        strides = [self.stride] * 2
        if _has_onednn(target):
            c, h, w = shapes[0]
            size = [target.images, c, h + halves, w + halves]
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, padding, strides, [1, 1], 1, size
            )

            def convolve(x: Tensor, bias: Tensor | None) -> Tensor:
                return torch.ops.mkldnn._convolution_pointwise(
                    x, weight, bias, padding, strides, [1, 1], 1, "none", [], ""
                )
        elif self._is_product and target.device.type == "cuda":
            matrix = weight.flatten(1)

            def convolve(x: Tensor, bias: Tensor | None) -> Tensor:
                y = F.linear(pixels(x).flatten(0, 1), matrix, bias)
                return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        else:

            def convolve(x: Tensor, bias: Tensor | None) -> Tensor:
                return F.conv2d(x, weight, bias, strides, padding)

        def run(row: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = convolve(F.pad(x, (0, 1, 0, 1)) if halves else x, bias(row))
            y = y if residual is None else y.add_(residual)
            return y if self.parts == 1 else y.chunk(self.parts, 1)

        return run

    @property
    def _pads_before(self) -> bool:
        """Whether the image is padded before the convolution, which knows equal padding alone."""
        return self.stride == 2 and not self.pad_all_sides

    @property
    def _is_product(self) -> bool:
        """Whether it is a matrix product: a GPU's libraries fuse the bias into those only.

        For other convolutions they add it in a separate pass.
        """
        return self.weight.shape[2] == 1

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        _, h, w = shapes[0]
        return ((len(self.weight) // self.parts, h // self.stride, w // self.stride),) * self.parts

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        c, h, w = shapes[0]
        made, seen = values(self.shapes(*shapes)), c * h * w
        found = []
        if self._pads_before:
            seen = c * (h + 1) * (w + 1)
            found += [
                Launch("pad: zeros", seen, seen),
                Launch("pad: copy", 2 * c * h * w, 2 * c * h * w),
            ]
        found.append(Launch(self.kind, seen + made))
        if self.bias is not None and not self._is_product:
            found.append(Launch("bias", 2 * made, 2 * made))
        if len(shapes) > 1:
            found.append(Launch("add", 3 * made, 2 * made))
        return tuple(found)

    def flops(self, *shapes: Shape) -> int:
        _, h, w = self.shapes(*shapes)[0]
        return 2 * h * w * self.weight.numel()

    def weights(self) -> int:
        return self.weight.numel()

    @property
    def kind(self) -> str:
        return f"conv {self.weight.shape[2]}x{self.weight.shape[3]}" + "/2" * (self.stride == 2)


def _has_onednn(target: Target) -> bool:
    """Return whether oneDNN computes convolutions here, with weights packed ahead."""
    known = target.dtype == torch.float32 or (
        target.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return target.device.type == "cpu" and torch.backends.mkldnn.is_available() and known


@dataclass(frozen=True, eq=False)
class UpsampleConv(Call):
    """Nearest upsampling and a 3x3 convolution, as a 2x2 convolution for each of four phases.

    The four run as one convolution with four times the channels, edge pixels included.
    """

    weight: Tensor
    bias: Bias

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        out = self.weight.shape[0]
        run = Conv(ops.phase_weight(self.weight), None).prepare(target, *shapes)
        bias = target.bias(self.bias)

        def phases(row: Tensor, x: Tensor) -> Tensor:
            _, _, h, w = x.shape
            parts = run(row, x)  # [N, 4 out, h + 1, w + 1]
            y = x.new_empty((len(x), 2 * h, 2 * w, out)).permute(0, 3, 1, 2)
            for phase in range(4):
                a, b = divmod(phase, 2)
                part = parts[:, phase * out : (phase + 1) * out, a : a + h, b : b + w]
                place = y[:, :, a::2, b::2]
                if self.bias is None:
                    place.copy_(part)
                else:
                    torch.add(part, bias(row)[:, None, None], out=place)
            return y

        return phases

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        _, h, w = shapes[0]
        return ((self.weight.shape[0], 2 * h, 2 * w),)

    def flops(self, *shapes: Shape) -> int:
        _, h, w = shapes[0]
        return 2 * (h + 1) * (w + 1) * self.weights()

    def weights(self) -> int:
        return self.weight.numel() * 16 // 9

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        (c, h, w), made = shapes[0], values(self.shapes(*shapes))
        apart = 4 * len(self.weight) * (h + 1) * (w + 1)
        scatter = Launch("phase", made // 2, made // 2)
        return (Launch(self.kind, c * h * w + apart, apart - made), *[scatter] * 4)

    @property
    def kind(self) -> str:
        return "phases 2x2"


@dataclass(frozen=True, eq=False)
class Winograd(Call):
    """A 3x3 convolution in 36 products for 16 pixels, after doubling the pixels if `doubled`.

    A second input, if any, is added to its result.
    """

    weight: Tensor
    bias: Bias
    doubled: bool = False

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        weight = ops.winograd_weight(self.weight).to(target.device, target.wide)
        bias = target.bias(self.bias, target.wide)
        return lambda row, x, residual=None: ops.winograd_conv(
            x, weight, bias(row), residual, doubled=self.doubled
        )

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        _, h, w = shapes[0]
        return ((self.weight.shape[0], h << self.doubled, w << self.doubled),)

    def flops(self, *shapes: Shape) -> int:
        ((_, h, w),) = self.shapes(*shapes)
        return 2 * tiles(h, w) * self.weights()

    def weights(self) -> int:
        return 4 * self.weight.numel()

    @property
    def kind(self) -> str:
        return "winograd" + " x2" * self.doubled


@dataclass(frozen=True, eq=False)
class Norm(Call):
    """GroupNorm, with SiLU or not, of the sum or concatenation of its inputs.

    The inputs are x; with `residual`, a tensor to add to x; and perhaps a skip connection to
    concatenate. `shift`, a bias or columns of the row, is added to x too. With `keep`, the tensor
    that was normalized is a second output.
    """

    layer: GroupNorm
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
            op, options = self.layer.op, {}
        if self.float8:
            options["float8"] = True

        def run(row: Tensor, x: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
            parts = dict(zip(names, others, strict=False))
            if self.shift is not None:
                parts["shift"] = shift(row)
            return op(x, *settings, **parts, **options)

        return run

    @property
    def silu(self) -> bool:
        """Whether SiLU follows."""
        return self.layer.op is ops.group_norm_silu

    def settings(self, target: Target) -> tuple[Tensor, Tensor, int, float]:
        """Return the op's arguments other than images: weight, bias, groups, eps."""
        layer = self.layer
        weight, bias = (
            p.detach().to(target.device, target.wide) for p in (layer.weight, layer.bias)
        )
        return weight, bias, layer.groups, layer.eps

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
class ImplicitGemm(Call):
    """A convolution by our own kernel, ds.ops.conv, perhaps with the norm that follows.

    A second input, if any, is added to the convolution's result. With `keep`, that result is a
    second output, after the normalized one. With `float8`, input and weight are float8. A named
    `backend` of the op is forced.
    """

    conv: Conv | UpsampleConv
    norm: Norm | None = None
    keep: bool = False
    float8: bool = False
    backend: str = ""

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        doubled, stride = isinstance(self.conv, UpsampleConv), getattr(self.conv, "stride", 1)
        weight, scale = self.conv.weight, None
        if doubled:
            weight = ops.phase_weight(weight)
        if self.float8:
            weight, scale = ops.float8_weight(weight.to(target.device))
            weight = weight.contiguous(memory_format=torch.channels_last)
        else:
            weight = target.cast(weight)
        options = {"stride": stride, **({} if scale is None else {"scale": scale})}
        run = (self._alone if self.norm is None else self._normed)(target, weight, options)
        return _by(self.backend, run) if self.backend else run

    def _alone(self, target: Target, weight: Tensor, options: dict[str, Any]) -> Run:
        bias, parts = target.bias(self.conv.bias, target.wide), getattr(self.conv, "parts", 1)

        def run(row: Tensor, x: Tensor, residual: Tensor | None = None):
            y = ops.conv(x, weight, bias(row), residual, **options)
            return y if parts == 1 else y.chunk(parts, 1)

        return run

    def _normed(self, target: Target, weight: Tensor, options: dict[str, Any]) -> Run:
        shift = self.conv.bias if self.norm.shift is None else self.norm.shift
        bias, settings = target.bias(shift, target.wide), self.norm.settings(target)
        options = {**options, "silu": self.norm.silu, "keep": self.keep}

        def run(row: Tensor, x: Tensor, residual: Tensor | None = None):
            normed, y = ops.conv_group_norm_silu(
                x, weight, *settings, bias=bias(row), residual=residual, **options
            )
            return (normed, y) if self.keep else normed

        return run

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return self.conv.shapes(*shapes) * (1 + self.keep)

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        out, doubled = self.conv.shapes(*shapes), isinstance(self.conv, UpsampleConv)
        made, pixels = values(out), math.prod(out[0][1:])
        convolves = Launch(self.kind, values(shapes) + made)
        if self.norm is None:
            return (convolves,)
        if pixels <= IN_TILE_PIXELS and not doubled:
            return (Launch(self.kind, values(shapes) + made * (1 + self.keep)),)
        normalizes = Launch("norm", 2 * made)
        if pixels <= ONE_PASS_PIXELS:
            return convolves, normalizes
        sums = (Launch("norm: sums", made),) * doubled  # else our convolution leaves them
        return convolves, *sums, Launch("norm: groups", 0), normalizes

    def flops(self, *shapes: Shape) -> int:
        _, h, w = (shapes if isinstance(self.conv, UpsampleConv) else self.conv.shapes(*shapes))[0]
        return 2 * h * w * self.weights()

    def weights(self) -> int:
        return self.conv.weights()

    @property
    def kind(self) -> str:
        kind = f"gemm {self.conv.kind.split()[1]}"
        return kind + "+gn" * (self.norm is not None) + " float8" * self.float8


@dataclass(frozen=True, eq=False)
class Attend(Call):
    """Attention in the layer's heads, the output projection and the residual.

    The inputs are q, k, v and residual.
    """

    layer: Attention  # whose projections made q, k and v
    weight: Tensor | None
    bias: Tensor

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        weight = None if self.weight is None else target.cast(self.weight.detach().flatten(1))
        bias = target.cast(self.bias.detach())

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
        return lambda row, x: x + bias(row)[:, None, None]

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes


@dataclass(frozen=True, eq=False)
class ScaleShift(Call):
    """Scale by one more than columns of the row, shift by as many others, then apply SiLU."""

    columns: slice

    def prepare(self, target: Target, *shapes: Shape) -> Run:
        columns = target.bias(self.columns)

        def run(row: Tensor, x: Tensor) -> Tensor:
            scale, shift = columns(row)[:, None, None].chunk(2)
            return F.silu(torch.addcmul(shift, x, 1 + scale), inplace=True)

        return run

    def shapes(self, *shapes: Shape) -> tuple[Shape, ...]:
        return shapes

    def launches(self, *shapes: Shape) -> tuple[Launch, ...]:
        moved = 2 * values(shapes)
        return Launch(self.kind, moved), Launch("silu", moved, moved)


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


def _by(backend: str, run: Run) -> Run:
    """Return the same function with the op's backend forced."""

    def forced(*args: Tensor) -> Tensor | tuple[Tensor, ...]:
        with ops.use_backend(backend):
            return run(*args)

    return forced


def values(shapes: tuple[Shape, ...]) -> int:
    """Return how many numbers images of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes)
